"""What timeouts need of an event loop: a timer, a task at the side, and code that can be stopped.

`_asyncio` and `_trio` have it each in their own way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from types import TracebackType
from typing import Any, Protocol

from asyncguard.timeouts._asyncio import AsyncioLoop

__all__ = ["Loop", "Revocable", "Section", "running_loop"]


class Revocable(Protocol):
    """Something to come, or under way, that can be called off."""

    def cancel(self) -> object:
        """Call it off; nothing happens if it is over."""


class Section(Protocol):
    """A ``with`` block that can be stopped from outside it.

    Its own cancellation ends at the end of the block; any other passes through.
    """

    def __enter__(self) -> Section: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool: ...

    def is_over(self) -> bool:
        """Whether the block has ended."""

    def is_shielded(self) -> bool:
        """Whether cancelling it now would break a promise that was given to the code inside."""

    def when_resumed(self, call: Callable[[], None]) -> None:
        """Call `call` once after the code inside has gone on from what it awaits now."""

    def cancel(self) -> None:
        """Cancel the code inside, once. Does nothing after the end of the block."""


class Loop(Protocol):
    """The event loop of a request."""

    def call_later(self, delay: float, call: Callable[[], None]) -> Revocable:
        """Call `call` after `delay` seconds, in an empty context: what it holds back holds nothing else."""

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        """Call `call` soon, asked from any thread; nothing happens if the loop has ended."""

    def is_here(self) -> bool:
        """Whether the calling thread runs the loop."""

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Revocable:
        """Run `work` in a task of its own, in `context`. It must not raise."""

    def section(self) -> Section:
        """A block of the current task that can be stopped."""


def running_loop() -> Loop:
    """The loop that runs in this thread."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return AsyncioLoop(loop)
    from asyncguard.timeouts._trio import TrioLoop  # trio is optional: whoever runs it has it

    return TrioLoop()
