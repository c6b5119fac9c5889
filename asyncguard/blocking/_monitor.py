"""A monitor: what a user asks to be told of stalls, and what has been told so far."""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from asyncguard import _clock
from asyncguard._options import (
    checked_choice,
    checked_directory,
    checked_flag,
    checked_hook,
    checked_seconds,
)
from asyncguard._reporter import FLUSH_TIMEOUT, until_set
from asyncguard.blocking._listener import MonitorListener
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._report import awaited_line
from asyncguard.blocking._watch import LoopWatch
from asyncguard.events import (
    BlockedLine,
    BlockReport,
    BusyReport,
    HangReport,
    InFlight,
    StallHistogram,
    Windows,
)

__all__ = ["SHORTEST_THRESHOLD", "LoopMonitor"]

SHORTEST_THRESHOLD = 0.001
"""In seconds. Below a few milliseconds, what the system itself does looks like stalls."""


_watches: weakref.WeakKeyDictionary[Any, LoopWatch] = weakref.WeakKeyDictionary()
"""The watch over each running loop: one, however many monitors listen."""

_live_watches: weakref.WeakSet[LoopWatch] = weakref.WeakSet()
"""Those of loops that are gone as well, until they have told what they saw."""

_watches_lock = threading.RLock()
"""May be taken again by a signal handler that asks for the requests in flight."""

_monitors: weakref.WeakSet[LoopMonitor] = weakref.WeakSet()


class LoopMonitor:
    """Reports what blocks the event loop, and for how long.

    Use it around anything asynchronous, with or without ASGI:

        async with LoopMonitor(threshold=0.05):
            await consume(queue)

    It watches the loop that it is entered on: asyncio's own loops, uvloop or trio. One monitor may watch
    several loops at once, each in its own thread.

    Args:
        threshold: The shortest stall to report, in seconds; at least 0.001.
        busy_threshold: For how many seconds a request may hold the loop in pieces that are no stalls by
            themselves, before that is reported; added up over ten times as long. `None` for any time.
        hang_after: After how many seconds a stall that goes on is logged, once, with the stack of every
            thread. `None` for never.
        on_hang: What else to do then: ``"log"`` for nothing; ``"abort"`` to end the process by SIGABRT, so
            that its supervisor starts another (it is not ended while a debugger has stopped the loop); or
            a function, which is called with the `HangReport` on a thread of its own.
        on_block: Called with each `BlockReport`, on a thread of its own, soon after the stall. Its
            exceptions are logged once and reach nobody else.
        on_busy: Called with each `BusyReport`, in the same way.
        project_root: The directory whose files are yours. By default, everything that is neither in
            the standard library nor in a ``site-packages`` folder.
        log: Whether to log to ``asyncguard.blocking``: each line's first stall at once, and once a minute
            what all lines have cost since.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.1,
        busy_threshold: float | None = 1.0,
        hang_after: float | None = 10.0,
        on_hang: Literal["log", "abort"] | Callable[[HangReport], object] = "log",
        on_block: Callable[[BlockReport], object] | None = None,
        on_busy: Callable[[BusyReport], object] | None = None,
        project_root: str | os.PathLike[str] | None = None,
        log: bool = True,
    ) -> None:
        checked_hook("on_block", on_block)
        checked_hook("on_busy", on_busy)
        if callable(on_hang):
            checked_hook("on_hang", on_hang)
        else:
            checked_choice("on_hang", on_hang, ("log", "abort"), other="a function")
        self._listener = MonitorListener(
            threshold=checked_seconds("threshold", threshold, minimum=SHORTEST_THRESHOLD),
            busy_threshold=math.inf
            if busy_threshold is None
            else checked_seconds("busy_threshold", busy_threshold),
            hang_after=math.inf if hang_after is None else checked_seconds("hang_after", hang_after),
            on_hang=on_hang,
            on_block=on_block,
            on_busy=on_busy,
            project_root=checked_directory("project_root", project_root),
            log=checked_flag("log", log),
        )
        self._latest: LoopWatch | None = None
        _monitors.add(self)

    # -- for users -------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The shortest stall that is reported, in seconds."""
        return self._listener.threshold

    @property
    def utilisation(self) -> Windows:
        """The share of the time in which the loop was busy, from 0 to 1: the rest it waited for I/O.

        Of the busiest loop, if several are watched. On uvloop it is estimated: the CPU time of the loop's
        thread, and the stalls in which it used none.
        """
        return _worst([watch.utilisation for watch in self._watched])

    @property
    def lag(self) -> Windows:
        """How late the loop came to what was due, on average, in seconds.

        Of the latest loop, if several are watched. On asyncio and trio it is worked out from how long the
        loop was held each time; on uvloop it is how late a timer was.
        """
        return _worst([watch.lag for watch in self._watched])

    @property
    def stalls(self) -> StallHistogram:
        """How many stalls were reported of which length, so far. Those of the start-up are left out."""
        return self._listener.ledger.stalls()

    @property
    def dropped(self) -> int:
        """How many stalls were not looked into, since they came in faster than they could be reported."""
        return self._listener.ledger.dropped()

    @property
    def _watched(self) -> list[LoopWatch]:
        with _watches_lock:
            watches = list(_live_watches)
        return [watch for watch in watches if watch.heard_by(self._listener)]

    @property
    def lines(self) -> tuple[BlockedLine, ...]:
        """What each line has cost so far, the most costly first; the last 1000 lines that blocked.

        Stalls of the application's start-up are not among them.
        """
        return self._listener.ledger.lines()

    @property
    def in_flight(self) -> tuple[InFlight, ...]:
        """The requests that have begun and not ended on the loops watched now, the oldest first."""
        now = _clock.monotonic()
        records = [record for watch in self._watched for record in list(watch.in_flight)]
        root = self._listener.project_root
        return tuple(
            InFlight(record.label, now - record.started, awaited_line(record, root))
            for record in sorted(records, key=lambda record: record.started)
        )

    @property
    def excused(self) -> Mapping[str, int]:
        """How many stalls nobody was blamed for, so that they were not reported.

        ``starved`` counts those in which other processes had the cores, ``suspended`` those in which
        this process was stopped (SIGSTOP, a sleeping machine), ``gil`` those in which other threads of
        this process had the global interpreter lock and none of their lines was seen, and ``unexplained``
        those that showed neither a line nor a request.
        """
        return self._listener.ledger.excused()

    async def __aenter__(self) -> LoopMonitor:
        self._watch()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop watching the running loop, and wait up to 2 s until the last reports are out."""
        try:
            watch = _watches.get(running_loop())
        except RuntimeError:
            return  # a forked child leaves a block of its parent's: what it raises must come through
        if watch is None:
            return
        await until_set(self._leave(watch))

    # -- for the middleware ----------------------------------------------------------------------

    def _watch(self) -> LoopWatch:
        """Watch the running loop from now on, if that is not so already."""
        loop = asyncio._get_running_loop() or running_loop()
        watch = self._latest
        if watch is not None and watch.loop() is loop and watch.active:
            return watch
        with _watches_lock:
            watch = _watches.get(loop)
            if watch is None or not watch.active:
                watch = _watches[loop] = LoopWatch(loop, self.threshold)
                _live_watches.add(watch)
        watch.listen(self._listener)
        self._latest = watch
        return watch

    def _leave(self, watch: LoopWatch) -> threading.Event:
        """Stop listening to `watch`.

        Returns:
            What is set once all that happened before has been heard of.
        """
        self._latest = None
        return watch.unlisten(self._listener)


def _worst(windows: Sequence[Windows]) -> Windows:
    """The highest of each figure; 0 where nothing is watched."""
    return Windows(*(max(figures) for figures in zip(*windows, strict=True))) if windows else Windows(0, 0, 0)


def _forget_watches() -> None:
    """In a forked child: the threads of the parent's watches are not there, but its locks may be."""
    global _watches_lock
    _watches_lock = threading.RLock()
    for monitor in list(_monitors):
        monitor._listener.ledger.renew_locks()
    for watch in list(_live_watches):
        watch.abandon()
    _watches.clear()
    _live_watches.clear()


def _finish_watches() -> None:
    """At the end of the process: tell of what the loops' last iterations held."""
    with _watches_lock:
        watches = list(_live_watches)
    for watch in watches:
        watch.end_at_exit().wait(FLUSH_TIMEOUT)


atexit.register(_finish_watches)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_watches)
