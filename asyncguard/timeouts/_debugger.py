"""Whether somebody looks at the process with a debugger: then time that passes is theirs."""

from __future__ import annotations

import sys

__all__ = ["is_debugged"]

_STOPPED_FOR = 1.0
_DEBUGGERS = ("bdb", "debugpy", "ipdb", "pdb", "pudb", "pydevd", "_pydevd")


def is_debugged(late: float) -> bool:
    """Whether a debugger is attached, asked on the loop's thread when a timer fires.

    Args:
        late: By how many seconds the timer came late. One that comes very late, where a debugger has been
            loaded, was kept by its prompt, which may have been left since.
    """
    tracer = sys.gettrace()
    kinds = (*type(tracer).__mro__, *type(getattr(tracer, "__self__", None)).__mro__)
    modules = {kind.__module__ for kind in kinds} | {str(getattr(tracer, "__module__", ""))}
    if any(module.startswith(_DEBUGGERS) for module in modules):
        return True
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
        return True
    if late <= _STOPPED_FOR:
        return False
    loaded = sys.modules.keys() & set(_DEBUGGERS)
    # Many import pdb and never stop in it: its prompt needs a terminal.
    return bool(loaded - {"bdb", "pdb"} or (loaded and _has_terminal()))


def _has_terminal() -> bool:
    stream = sys.__stdin__
    return stream is not None and not stream.closed and stream.isatty()
