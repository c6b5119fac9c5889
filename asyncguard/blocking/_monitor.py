"""A monitor: what a user asks to be told of stalls, and what has been told so far."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import anyio

from asyncguard import _clock
from asyncguard._hooks import Hook
from asyncguard._options import (
    checked_directory,
    checked_flag,
    checked_hook,
    checked_seconds,
)
from asyncguard.blocking._ledger import Ledger
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._report import awaited_line, compose, excuse
from asyncguard.blocking._stall import Stall
from asyncguard.blocking._watch import LoopWatch
from asyncguard.events import BlockedLine, BlockReport, InFlight

__all__ = ["SHORTEST_THRESHOLD", "LoopMonitor"]

SHORTEST_THRESHOLD = 0.005
"""Below this many seconds, the system's own scheduling looks like stalls."""

logger = logging.getLogger("asyncguard.blocking")

_FLUSH_TIMEOUT = 2.0

_watches: weakref.WeakKeyDictionary[Any, LoopWatch] = weakref.WeakKeyDictionary()
"""The watch over each running loop: one, however many monitors listen."""

_live_watches: weakref.WeakSet[LoopWatch] = weakref.WeakSet()
"""Those of loops that are gone as well, until they have told what they saw."""

_watches_lock = threading.Lock()

_monitors: weakref.WeakSet[LoopMonitor] = weakref.WeakSet()


class LoopMonitor:
    """Reports what blocks the event loop, and for how long.

    Use it around anything asynchronous, with or without ASGI:

        async with LoopMonitor(threshold=0.05):
            await consume(queue)

    It watches the loop that it is entered on: asyncio's own loops, uvloop or trio. One monitor may watch
    several loops at once, each in its own thread.

    Args:
        threshold: The shortest stall to report, in seconds; at least 0.005.
        on_block: Called with each `BlockReport`, on a thread of its own, soon after the stall. Its
            exceptions are logged once and reach nobody else.
        project_root: The directory whose files are yours. By default, everything that is neither in
            the standard library nor in a ``site-packages`` folder.
        log: Whether to log to ``asyncguard.blocking``: each line's first stall at once, then at most
            one record a minute.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.1,
        on_block: Callable[[BlockReport], object] | None = None,
        project_root: str | os.PathLike[str] | None = None,
        log: bool = True,
    ) -> None:
        self._threshold = checked_seconds("threshold", threshold, minimum=SHORTEST_THRESHOLD)
        checked_hook("on_block", on_block)
        self._project_root = checked_directory("project_root", project_root)
        self._log = checked_flag("log", log)
        self._hook = Hook("on_block", on_block, logger) if on_block is not None else None
        self._ledger = Ledger()
        self._latest: LoopWatch | None = None
        _monitors.add(self)

    # -- for users -------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The shortest stall that is reported, in seconds."""
        return self._threshold

    @property
    def lines(self) -> tuple[BlockedLine, ...]:
        """What each line has cost so far, the most costly first; the last 1000 lines that blocked.

        Stalls of the application's start-up are not among them.
        """
        return self._ledger.lines()

    @property
    def in_flight(self) -> tuple[InFlight, ...]:
        """The requests that have begun and not ended on the loops watched now, the oldest first."""
        now = _clock.monotonic()
        records = [
            record
            for watch in list(_live_watches)
            if watch.heard_by(self._receive)
            for record in list(watch.in_flight)
        ]
        return tuple(
            InFlight(record.label, now - record.started, awaited_line(record, self._project_root))
            for record in sorted(records, key=lambda record: record.started)
        )

    @property
    def excused(self) -> Mapping[str, int]:
        """How many stalls nobody was blamed for, so that they were not reported.

        ``starved`` counts those in which other processes had the cores, ``suspended`` those in which
        this process was stopped (SIGSTOP, a sleeping machine), ``gil`` those in which other threads of
        this process had the global interpreter lock, and ``unexplained`` those that showed neither a
        line nor a request.
        """
        return self._ledger.excused()

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
        watch = _watches.get(running_loop())
        if watch is None:
            return
        heard = self._leave(watch)
        with anyio.move_on_after(_FLUSH_TIMEOUT, shield=True):
            while not heard.is_set():  # noqa: ASYNC110 - it is set by another thread
                await anyio.sleep(0.005)

    # -- for the middleware ----------------------------------------------------------------------

    def _watch(self) -> LoopWatch:
        """Watch the running loop from now on, if that is not so already."""
        loop = running_loop()
        watch = self._latest
        if watch is not None and watch.active and watch.loop() is loop:
            return watch
        with _watches_lock:
            watch = _watches.get(loop)
            if watch is None or not watch.active:
                watch = _watches[loop] = LoopWatch(loop, self._threshold)
                _live_watches.add(watch)
        watch.listen(self._receive, self._threshold)
        self._latest = watch
        return watch

    def _leave(self, watch: LoopWatch) -> threading.Event:
        """Stop listening to `watch`.

        Returns:
            What is set once all that happened before has been heard of.
        """
        self._latest = None
        return watch.unlisten(self._receive)

    # -- on the reporter's thread ----------------------------------------------------------------

    def _receive(self, stall: Stall) -> None:
        innocent = excuse(stall, self._threshold)
        if innocent is not None:
            self._ledger.enter_excused(innocent)
            return
        report = compose(stall, self._threshold, self._project_root)
        unlogged = self._ledger.enter(report)
        if self._hook is not None:
            self._hook(report)
        if self._log and unlogged is not None:
            since = f" ({unlogged} more of this line since it was last logged)" if unlogged else ""
            level = logging.INFO if report.starting else logging.WARNING
            logger.log(level, "%s%s", report, since, extra={"asyncguard_report": report})


def _forget_watches() -> None:
    """In a forked child: the threads of the parent's watches are not there, but its locks may be."""
    global _watches_lock
    _watches_lock = threading.Lock()
    for monitor in list(_monitors):
        monitor._ledger.renew_lock()
    for watch in list(_live_watches):
        watch.abandon()
    _watches.clear()
    _live_watches.clear()


def _finish_watches() -> None:
    """At the end of the process: tell of what the loops' last iterations held."""
    for watch in list(_live_watches):
        watch.end_at_exit().wait(_FLUSH_TIMEOUT)


atexit.register(_finish_watches)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_watches)
