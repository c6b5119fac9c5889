"""Having work done on another event loop than the running one, whichever kinds the two are of.

Neither loop waits for the other while tasks of its own could run.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from typing import Any, TypeVar

import anyio

from asyncguard._tasks import outwait, scheduler, start

__all__ = ["Loop"]

T = TypeVar("T")


def _context_for_another_loop() -> Context:
    context = copy_context()
    if (sniffio := sys.modules.get("sniffio")) is not None:  # it finds out anew which kind of loop it is on
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


class Loop:
    """The event loop that this is made on, for others to give work to."""

    def __init__(self) -> None:
        self._soon = scheduler()
        self._jobs: set[_Job] = set()
        self._is_open = True

    @classmethod
    @asynccontextmanager
    async def opened(cls) -> AsyncIterator[Loop]:
        """For as long as a block is open; what has not been done by then is cancelled."""
        loop = cls()
        try:
            yield loop
        finally:
            loop._is_open = False
            for job in tuple(loop._jobs):
                job.cancel()
                await outwait(job.gone)

    async def run(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Await ``call(*args)`` there, in a task of its own, with a copy of the context from here.

        It is cancelled with who awaits it.
        """
        job = _Job(call, args)
        context = _context_for_another_loop()
        self._soon(lambda: self._begin(job, context))
        try:
            await job.ended.wait()
        except BaseException:
            self._soon(job.cancel)
            await outwait(job.ended)
            raise
        value: T = job.result()
        return value

    def bound(self, call: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """The same function, for others to await: it runs here."""

        async def run(*args: Any) -> T:
            return await self.run(call, *args)

        return run

    def _begin(self, job: _Job, context: Context) -> None:
        if not self._is_open:
            job.tell()
            return

        def on_end() -> None:
            self._jobs.discard(job)
            job.gone.set()
            job.tell()

        self._jobs.add(job)
        job.gone = anyio.Event()
        job.cancel = start(job.run, on_end, name="asyncguard-testing", context=context)


class _Job:
    """A call on one loop, and its outcome for another: the one that makes this.

    Attributes:
        ended: For who awaits it: it has ended.
        gone: The same for the loop that makes the call.
        cancel: Calls it off, on the loop that makes the call.
    """

    gone: anyio.Event

    def __init__(self, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self.ended = anyio.Event()
        self.cancel: Callable[[], object] = lambda: None
        self._call = call
        self._args = args
        self._back = scheduler()
        self._value: Any = None
        self._error: BaseException | None = RuntimeError("the other side of this request has gone")

    async def run(self) -> None:
        try:
            self._value = await self._call(*self._args)
            self._error = None
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # it is raised where it is awaited
            self._error = error

    def tell(self) -> None:
        """It has ended, or is never going to begin."""
        self._back(self.ended.set)

    def result(self) -> Any:
        error, self._error = self._error, None
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del error
