"""Timers and sections on asyncio's event loops, uvloop included."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import current_task
from collections.abc import Callable, Coroutine
from contextvars import Context
from types import TracebackType
from typing import Any

from asyncguard.timeouts._lookups import awaited_future, cancel_scope, is_shielded

__all__ = ["AsyncioLoop"]

_LOOK_AGAIN_AFTER = 0.01


class TaskSection:
    """A block of a task that `asyncio.Task.cancel` stops: one exception, and the code may clean up.

    As in `asyncio.timeout`, the requests are withdrawn at the end of the block, so that a cancellation which
    came from elsewhere is told from its own.
    """

    __slots__ = ("_baseline", "_outside", "_requests", "_task")

    def __init__(self) -> None:
        self._task = task = current_task()
        self._outside = None if task is None else cancel_scope(task)
        self._baseline = 0 if task is None else task.cancelling()
        self._requests = 0

    def __enter__(self) -> TaskSection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        if not self._requests or task is None:
            return False
        others = False
        while self._requests:
            self._requests -= 1
            others = task.uncancel() > self._baseline
        return isinstance(error, asyncio.CancelledError) and not others

    def is_over(self) -> bool:
        return self._task is None

    def is_shielded(self) -> bool:
        return self._task is not None and is_shielded(self._task, self._outside)

    def when_resumed(self, call: Callable[[], None]) -> None:
        future = awaited_future(self._task) if self._task is not None else None
        if future is None:
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_AFTER, call)
        else:
            # The task asked to be woken before: it has had its step when this is called.
            future.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        if self._task is not None and not self._task.done():
            self._requests += 1
            self._task.cancel()


class AsyncioLoop:
    """A loop of asyncio's kind."""

    __slots__ = ("_loop",)

    section = TaskSection

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call_later(self, delay: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(delay, call, context=Context())

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(call)

    def is_here(self) -> bool:
        return asyncio._get_running_loop() is self._loop

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> asyncio.Task[None]:
        return self._loop.create_task(work(), context=context)
