"""Trio's loop, as the pool needs it."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context
from typing import Any

import trio

from asyncguard.offloading._loops import Channel

__all__ = ["TrioLoop"]


class TrioOutcome:
    """A result that one task waits for."""

    __slots__ = ("_error", "_is_done", "_result", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._is_done

    def set_result(self, result: Any) -> None:
        self._result = result
        self._wake()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self._is_done = True
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    def _abort(self, _: Any) -> trio.lowlevel.Abort:
        self._is_done, self._task = True, None
        return trio.lowlevel.Abort.SUCCEEDED

    def __await__(self) -> Generator[Any, Any, Any]:
        if self._is_done:
            yield from trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105
        else:
            self._task = trio.lowlevel.current_task()
            yield from trio.lowlevel.wait_task_rescheduled(self._abort).__await__()  # noqa: ASYNC105
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result


class TrioLoop:
    """The run of trio that this thread is in."""

    __slots__ = ("_readers", "_token", "_writers")

    outcome = TrioOutcome

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._readers: dict[Channel, trio.CancelScope] = {}
        self._writers: dict[Channel, trio.CancelScope] = {}

    def is_here(self) -> bool:
        return trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token

    def call_later(self, delay: float, call: Callable[[], None]) -> trio.CancelScope:
        scope = trio.CancelScope()

        async def ring() -> None:
            with scope:
                await trio.sleep(delay)
                _guarded(call)

        trio.lowlevel.spawn_system_task(ring, name="asyncguard-timer", context=Context())
        return scope

    def add_reader(self, channel: Channel, call: Callable[[], None]) -> None:
        self._readers[channel] = _watch(trio.lowlevel.wait_readable, channel, call)

    def add_writer(self, channel: Channel, call: Callable[[], None]) -> None:
        self._writers[channel] = _watch(trio.lowlevel.wait_writable, channel, call)

    def remove_writer(self, channel: Channel) -> None:
        scope = self._writers.pop(channel, None)
        if scope is not None:
            scope.cancel()

    def close(self, channel: Channel) -> None:
        for watched in (self._readers, self._writers):
            scope = watched.pop(channel, None)
            if scope is not None:
                scope.cancel()
        if channel.fileno() >= 0 and self.is_here():
            trio.lowlevel.notify_closing(channel)
        channel.close()


def _watch(
    ready: Callable[[Channel], Awaitable[None]], channel: Channel, call: Callable[[], None]
) -> trio.CancelScope:
    scope = trio.CancelScope()

    async def watch() -> None:
        with scope:
            while channel.fileno() >= 0 and not scope.cancel_called:
                try:
                    await ready(channel)
                except trio.ClosedResourceError:
                    return
                _guarded(call)

    trio.lowlevel.spawn_system_task(watch, name="asyncguard-offload", context=Context())
    return scope


def _guarded(call: Callable[[], None]) -> None:
    """A system task that raises ends the whole run."""
    try:
        call()
    except Exception:
        traceback.print_exc()  # not by a logger, whose filters may be what failed
