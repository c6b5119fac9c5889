"""Timers and sections on trio."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from types import TracebackType
from typing import Any

import trio

__all__ = ["TrioLoop"]

logger = logging.getLogger("asyncguard.timeouts")


class ScopeSection:
    """A block that is stopped by its cancel scope.

    On trio cancellation stays: code inside that is to await something while it cleans up has to shield it.
    And trio itself keeps the cancellation from what is shielded, or in a thread.
    """

    __slots__ = ("_over", "_scope")

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._over = False

    def __enter__(self) -> ScopeSection:
        self._scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._over = True
        return bool(self._scope.__exit__(kind, error, traceback))

    def is_over(self) -> bool:
        return self._over

    def is_shielded(self) -> bool:
        return False

    def when_resumed(self, call: Callable[[], None]) -> None:
        raise NotImplementedError  # nobody waits for what trio does by itself

    def cancel(self) -> None:
        self._scope.cancel()


class Alarm:
    """A call at a certain time."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def ring(self) -> None:
        if self._call is not None:
            try:
                Context().run(self._call)
            except Exception:
                logger.exception("asyncguard failed at a deadline")


class AlarmClock:
    """All alarms of one run of trio, in one system task, which ends when there are none."""

    def __init__(self) -> None:
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._numbers = itertools.count()
        self._sleep: trio.CancelScope | None = None
        self._runs = False

    def set(self, at: float, alarm: Alarm) -> None:
        heapq.heappush(self._alarms, (at, next(self._numbers), alarm))
        if not self._runs:
            self._runs = True
            trio.lowlevel.spawn_system_task(self._run, name="asyncguard-alarms", context=Context())
        elif self._sleep is not None and at < self._sleep.deadline:
            self._sleep.deadline = at

    async def _run(self) -> None:
        try:
            while self._alarms:
                with trio.CancelScope(deadline=self._alarms[0][0]) as self._sleep:
                    await trio.sleep_forever()
                while self._alarms and self._alarms[0][0] <= trio.current_time():
                    heapq.heappop(self._alarms)[2].ring()
        finally:
            self._runs = False
            self._sleep = None


_alarm_clock: trio.lowlevel.RunVar[AlarmClock] = trio.lowlevel.RunVar("asyncguard-alarms")


class TrioLoop:
    """The run of trio that this thread is in."""

    __slots__ = ("_token",)

    section = ScopeSection

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    def call_later(self, delay: float, call: Callable[[], None]) -> Alarm:
        try:
            clock = _alarm_clock.get()
        except LookupError:
            clock = AlarmClock()
            _alarm_clock.set(clock)
        alarm = Alarm(call)
        clock.set(trio.current_time() + delay, alarm)
        return alarm

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)

    def is_here(self) -> bool:
        return trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> trio.CancelScope:
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await work()

        trio.lowlevel.spawn_system_task(run, name="asyncguard-answer", context=context)
        return scope
