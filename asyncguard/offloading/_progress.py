"""How far an offloaded function has come."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["report_progress", "report_to"]

_report: Callable[[float], object] | None = None


def report_progress(fraction: float) -> None:
    """Tell whoever awaits the call how far its function has come; see `Offloaded.using`.

    It may be called from any thread of the function. Where nobody can be told, it does nothing.

    Args:
        fraction: What part of the work is done, from 0 to 1.

    Raises:
        TypeError: If it is no number.
    """
    try:
        number = fraction.__float__()  # NumPy's have it, too, and strings have not
    except AttributeError:
        raise TypeError(f"fraction must be a number from 0 to 1, not {fraction!r}") from None
    if _report is not None:
        _report(number)


def report_to(report: Callable[[float], object] | None) -> None:
    """What `report_progress` is to call from now on, in all threads of this process."""
    global _report
    _report = report
