"""One call for each of many items, a few at a time: what `Offloaded.map` returns.

No async generator: one that is left by `break` ends at some later time, in some other task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import anyio

from asyncguard._tasks import scheduler, start
from asyncguard.errors import OffloadError

__all__ = ["Results"]

R = TypeVar("R")


class Results(Generic[R]):
    """The results of calls, in the order of the items.

    At most `limit` calls run at once, and at most as many results wait to be taken: whoever takes them slowly
    slows down the calls. When a call fails, no further one is started; the results before it are still there
    to be taken, then its exception is raised. Those behind it are called off.

    Leaving the loop over it calls off what runs, as soon as nothing refers to the iterator any more, which is
    at once if it has no name. Who gives it one can say so by `aclose`, which also waits for them.

    Args:
        call: Makes one call.
        items: What is to be called with.
        limit: How many calls may run at once.
    """

    def __init__(self, call: Callable[[Any], Awaitable[R]], items: Iterator[Any], limit: int) -> None:
        self._calls = _Calls(call, items, limit)

    def __aiter__(self) -> Results[R]:
        return self

    async def __anext__(self) -> R:
        try:
            result: R = await self._calls.next_result()
        except BaseException:
            await self.aclose()
            raise
        return result

    async def aclose(self) -> None:
        """Call off the calls that run, and wait for their end. Nothing comes after that."""
        self._calls.call_off()
        await self._calls.ended()

    def __del__(self) -> None:
        # In whichever thread that is: the tasks must not be touched from here.
        calls = self._calls
        if calls.soon is not None and calls.running:
            calls.soon(calls.call_off)


class _Call:
    """One call: its place in the order, and what came of it."""

    __slots__ = ("cancel", "error", "is_done", "result")

    def __init__(self) -> None:
        self.cancel: Callable[[], object] | None = None
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        self.is_done = True
        self.error = error
        if isinstance(error, StopAsyncIteration):  # would look like the end of the items
            self.error = RuntimeError("a call of map() raised StopAsyncIteration")
            self.error.__cause__ = error


class _Calls:
    """The calls that run and the results that wait. The tasks know this, and not the iterator."""

    def __init__(self, call: Callable[[Any], Awaitable[Any]], items: Iterator[Any], limit: int) -> None:
        self._call = call
        self._items: Iterator[Any] | None = items
        self._limit = limit
        self._order: deque[_Call] = deque()
        self._changed: anyio.Event | None = None
        self.running: set[_Call] = set()
        self.soon: Callable[[Callable[[], object]], None] | None = None

    async def next_result(self) -> Any:
        if self.soon is None:
            self.soon = scheduler()
        while True:
            self._start_some()
            if not self._order:
                raise StopAsyncIteration
            if self._order[0].is_done:
                break
            await self._change()
        first = self._order.popleft()
        if first.error is not None:
            error, first.error = first.error, None
            try:
                raise error
            finally:
                del error  # its traceback leads here
        return first.result

    async def ended(self) -> None:
        """Wait until no call runs."""
        with anyio.CancelScope(shield=True):
            while self.running:
                await self._change()

    def call_off(self) -> None:
        """End all calls that run, and start no more."""
        self._items = None
        self._order.clear()
        self._call_off(self.running)

    def _call_off(self, calls: Iterable[_Call]) -> None:
        for call in list(calls):
            if call.cancel is not None:
                call.cancel()

    async def _change(self) -> None:
        if self._changed is None or self._changed.is_set():
            self._changed = anyio.Event()
        await self._changed.wait()

    def _start_some(self) -> None:
        while (
            self._items is not None
            and len(self.running) < self._limit
            and len(self._order) - len(self.running) < self._limit
        ):
            call = _Call()
            try:
                item = next(self._items)
            except StopIteration:
                self._items = None
                return
            except BaseException as error:  # raised in its place
                self._items = None
                call.fail(error)
                self._order.append(call)
                return
            self._order.append(call)
            self.running.add(call)
            call.cancel = start(partial(self._run, call, item), partial(self._ended, call))

    async def _run(self, call: _Call, item: Any) -> None:
        try:
            call.result = await self._call(item)
            call.is_done = True
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            self._failed(call, error)

    def _ended(self, call: _Call) -> None:
        if not call.is_done:
            self._failed(call, OffloadError("a call of map() was called off"))
        call.cancel = None
        self.running.discard(call)
        if self._changed is not None:
            self._changed.set()

    def _failed(self, failed: _Call, error: BaseException) -> None:
        failed.fail(error)
        self._items = None
        if failed in self._order:
            place = self._order.index(failed)
            behind = [self._order.pop() for _ in range(len(self._order) - place - 1)]
            self._call_off(behind)
