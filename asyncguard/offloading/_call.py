"""What a call is made of, before anybody has run it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol

from asyncguard.offloading._address import Address

__all__ = ["CallOptions", "OnCancel", "Runner"]

OnCancel = Literal["raise", "kill", "abandon"]
"""What becomes of a call that nobody waits for any more: see `offload`."""


class CallOptions(NamedTuple):
    """How a call is to be run.

    Attributes:
        timeout: In how many seconds it has to end, those in the queue included; `None` for any time.
        on_cancel: What becomes of it when nobody waits for it any more.
        priority: Which of those that wait comes first: the greatest.
        context: The context variables that the function is to see.
        on_progress: Called on the loop with each fraction that the function reports.
    """

    timeout: float | None = None
    on_cancel: OnCancel = "raise"
    priority: int = 0
    context: tuple[ContextVar[Any], ...] = ()
    on_progress: Callable[[float], object] | None = None


class Runner(Protocol):
    """What runs calls."""

    async def run_call(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Any:
        """Run one call; returns what the function returns."""
