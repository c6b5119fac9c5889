"""The watch over one event loop: what happens on the loop's own thread.

One loop has one watch, however many monitors listen to it. The loop's thread does no more than compare two
times an iteration; looking at stacks is the watchdog's work, and making reports of them the reporter's,
each on a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol

from asyncguard import _clock
from asyncguard._reporter import Reporter
from asyncguard._request import RequestRecord
from asyncguard.blocking._busy import BusyTime
from asyncguard.blocking._hang import Hang, abort, is_debugged, look_at_threads
from asyncguard.blocking._load import LoopLoad
from asyncguard.blocking._lookups import CollectorHeld, due_timers, running_request
from asyncguard.blocking._probes import Probe, attach_probe, kind_of
from asyncguard.blocking._stall import Aftermath, LongTurn, Stall
from asyncguard.blocking._vitals import Reading
from asyncguard.blocking._watchdog import Watchdog
from asyncguard.events import Windows

__all__ = ["Listener", "LoopWatch"]

logger = logging.getLogger("asyncguard.blocking")

P = ParamSpec("P")

_REPORTED_WITHIN = 0.2
"""Seconds after which a stall is reported, whoever may still come."""


def _harmless(
    method: Callable[Concatenate[LoopWatch, P], None],
) -> Callable[Concatenate[LoopWatch, P], None]:
    """Keep what goes wrong in the watch from the loop and the request that it is called by."""

    @functools.wraps(method)
    def guarded(self: LoopWatch, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("asyncguard failed to see a stall; further failures are not logged")

    return guarded


class Listener(Protocol):
    """Who wants to be told. It is called on the reporter's thread, and forgotten when it is gone.

    Attributes:
        threshold: The shortest stall of interest, in seconds.
        busy_threshold: How long a request may hold the loop in small pieces; plus infinity for any time.
        hang_after: After how long a stall that goes on is of interest; plus infinity for never.
        aborts: Whether the process is to be ended then.
    """

    threshold: float
    busy_threshold: float
    hang_after: float
    aborts: bool

    def hear_stall(self, stall: Stall) -> None:
        """A stall of at least the threshold has ended."""

    def hear_busy(self, busy: BusyTime, ended: float) -> None:
        """A request has held the loop for too long, in a window that ended at `ended`."""

    def hear_hang(self, hang: Hang) -> None:
        """A stall has lasted too long and goes on."""

    def miss_stall(self) -> None:
        """A stall was dropped, since they come faster than they can be told of. On the loop's thread."""

    def sum_up(self) -> None:
        """A minute is over, or the watch."""


class LoopWatch:
    """Watches the loop that runs in the thread which makes it.

    Attributes:
        threshold: The shortest stall that any listener wants to hear of, in seconds.
        busy_after: After how much time on the loop a request's turns are to be added up, in seconds.
        hang_after: After how long somebody wants to hear of a stall that goes on, in seconds.
        turn: The request whose coroutine holds the loop now, if any.
        starting_until: When the application's start-up was over; plus infinity before that.
        aftermath: Who runs right after a stall, while that is being noted.
        stalled_until: The end of the last stall.
        in_flight: The requests that have begun and not ended.
        busy: What requests have held the loop for that may come to hold it for too long.
        resting: Whether `Probe.end_rest` is to be called when a request begins.
        load: How busy the loop is.
        probe: What tells of the loop itself.
        loop: Returns the loop, or `None` once it is gone, or the watch has ended: the watch does not keep it
            alive.
        active: `False` once the watch has ended; a new one is needed then.
    """

    def __init__(self, loop: Any, threshold: float) -> None:
        self.threshold: float = threshold
        self.busy_after: float = math.inf
        self.hang_after: float = math.inf
        self.turn: RequestRecord | None = None
        self.starting_until: float = float("-inf")
        self.aftermath: Aftermath | None = None
        self.stalled_until: float = 0.0
        self.in_flight: set[RequestRecord] = set()
        self.busy: dict[RequestRecord, BusyTime] = {}
        self.resting: bool = False
        self.load: LoopLoad = LoopLoad(_clock.monotonic())
        self.loop: Callable[[], Any] = weakref.ref(loop)
        self.active: bool = True
        self._kind = kind_of(loop)
        self._listeners: dict[weakref.ref[Listener], None] = {}
        self._hang_began = -math.inf
        self._told_of_hang: set[weakref.ref[Listener]] = set()
        self._untold: deque[Stall] = deque()
        self._ending = threading.Lock()
        self._failed = False
        self._thread = threading.current_thread().name
        self._thread_id = threading.get_ident()
        self._reporter = Reporter(f"asyncguard-reporter-{self._thread}", logger, self._sum_up)
        self.probe: Probe = attach_probe(self, loop)
        self._watchdog = Watchdog(self)
        try:
            self._watchdog.start(f"asyncguard-watchdog-{self._thread}")
        except RuntimeError:
            logger.exception("no thread to be had: stalls are timed, but their lines will not be seen")
        self.probe.attach()

    # -- listeners -------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """Have `listener` told of what it wants to hear."""
        self._listeners[weakref.ref(listener)] = None
        self._adjust()

    def heard_by(self, listener: Listener) -> bool:
        """Whether `listener` is told."""
        return weakref.ref(listener) in self._listeners

    def unlisten(self, listener: Listener) -> threading.Event:
        """Stop telling `listener`, on the loop's thread; the watch ends with its last one.

        Returns:
            What is set once `listener` has heard all that happened before.
        """
        if self.active and self.heard_by(listener):
            self._tell_leaving(listener)
            del self._listeners[weakref.ref(listener)]
            if self._reporter.running:
                self._reporter.put(listener.sum_up)
            if self._listeners:
                self._adjust()
            else:
                self.probe.detach()
                self._end()
        return self._reporter.flush()

    def _listening(self) -> list[Listener]:
        """Those that are still there."""
        return [listener for reference in list(self._listeners) if (listener := reference()) is not None]

    def _adjust(self) -> None:
        """Watch for what the listeners that are still there want to hear. Called on the loop's thread."""
        listening = self._listening()
        self._listeners = dict.fromkeys(map(weakref.ref, listening))
        self.busy_after = min((listener.busy_threshold for listener in listening), default=math.inf) / 2
        self.hang_after = min((listener.hang_after for listener in listening), default=math.inf)
        threshold = min((listener.threshold for listener in listening), default=self.threshold)
        if threshold != self.threshold:
            self.threshold = threshold
            self.probe.threshold_changed()
            self._watchdog.wake()

    @_harmless
    def _tell_leaving(self, listener: Listener) -> None:
        """Tell of what it has not been told, and of the hold in which it leaves: that ends here for it."""
        for stall in list(self._untold):
            self._tell_of(stall, listener)
        since, now = self.probe.held_since(), _clock.monotonic()
        if since is not None and now - max(since, self.stalled_until) >= listener.threshold:
            start = max(since, self.stalled_until)
            self._tell_of(self._stall_of(start, now, self._watchdog.read(), None, Aftermath()), listener)

    # -- on the loop's thread --------------------------------------------------------------------

    @_harmless
    def note_turn(self, record: RequestRecord) -> None:
        """A turn of `record`'s has begun right after a stall."""
        aftermath = self.aftermath  # asked for once: the watchdog may close it
        if aftermath is not None:
            aftermath.note_turn(record, record.turn_since)

    def end_turn(self, record: RequestRecord, outer: RequestRecord | None) -> None:
        """End the turn of `record`'s that it has on the loop.

        Args:
            record: The request.
            outer: Whose turn it was before, and is again: an application may call another guarded one.
        """
        record.released = now = _clock.monotonic()
        held = now - record.turn_since
        record.loop_time += held
        if held >= self.threshold:
            self.note_long_turn(record, record.turn_since, now)
        elif record.loop_time >= self.busy_after:
            self.note_busy(record, held, now)
        # Not before: the watchdog forgets what it saw as soon as nothing holds the loop.
        self.turn = outer

    @_harmless
    def note_long_turn(self, record: RequestRecord, since: float, until: float) -> None:
        """Take down a turn of a request that was as long as a stall by itself.

        It is a stall of its own, even if the loop goes on to run others: their lines are others.
        """
        record.busy_at = self._busy_at(record) + until - since
        start = self.probe.hold_began(since)
        if since - start < self.threshold:
            start = since
        self._take_down(start, until, LongTurn(record, since, until))

    @_harmless
    def stalled(self, start: float, end: float) -> None:
        """Take down a stall that has just ended, and begin to note who runs now."""
        self._take_down(start, end, None)

    @_harmless
    def note_long_poll(self, start: float, end: float) -> None:
        """A poll took as long as a stall: nothing happened, or the loop's thread did not get the GIL back."""
        if self._watchdog.late(end) < self.threshold:
            return
        with self._watchdog.standing_still():
            reading = self._watchdog.read()
            waited = min(self._watchdog.kept_from_gil(reading), end - start)
            if waited >= self.threshold:
                self.load.busy += waited
                self.load.delay += waited * waited / 2
                self._take_down(end - waited, end, None, reading)

    @_harmless
    def note_step(self, runner: Any) -> None:
        """Note that a task has a step right after a stall; see `running_request`."""
        record, aftermath = running_request(runner).record, self.aftermath
        if aftermath is not None and record in self.in_flight:
            aftermath.note_turn(record, _clock.monotonic())

    def note_due(self, record: RequestRecord, due: float) -> None:
        """A timer of a request's fires now, which was due then."""
        aftermath = self.aftermath
        if aftermath is not None:
            aftermath.note_due(record, due)

    def wake(self, now: float) -> None:
        """Wake the watchdog, which rests: something happens on the loop."""
        self.load.mark(now, at_once=True)
        self._watchdog.wake()

    @_harmless
    def settle(self) -> None:
        """Note the end of one iteration after a stall."""
        aftermath = self.aftermath
        if aftermath is None:
            return
        aftermath.round += 1
        now = _clock.monotonic()
        if aftermath.round >= aftermath.last or self._is_overdue(now):
            self.close_aftermath()
        else:
            self._note_resumed(aftermath, now)

    @_harmless
    def close_aftermath(self) -> None:
        """Hand the last stalls over to the reporter, with all that is known of them."""
        self.aftermath = None
        while self._untold:
            with contextlib.suppress(IndexError):  # the watchdog may do the same, where the loop has stopped
                stall = self._untold.popleft()
                for listener in self._listening():
                    self._tell_of(stall, listener)

    @_harmless
    def note_busy(self, record: RequestRecord, held: float, now: float) -> None:
        """Add up a turn of a request that has had half of what is too much."""
        half, busy_at = self.busy_after, self._busy_at(record)
        if record.loop_time < busy_at:
            return
        busy = self.busy.get(record) or BusyTime(record, record.started, 2 * half)
        self.busy[record] = busy
        if busy_at > 0:
            busy.seconds = half + record.loop_time - busy_at - held
            record.busy_at = -math.inf  # from now on each turn
        if now <= busy.ends:
            busy.add(held)
            return
        self._close_busy(busy, busy.ends)
        if record in self.busy:
            self.busy[record] = BusyTime(record, now, 2 * half)
            record.busy_at = record.loop_time + half

    def _busy_at(self, record: RequestRecord) -> float:
        return self.busy_after if record.busy_at is None else record.busy_at

    @_harmless
    def end_busy(self, record: RequestRecord) -> None:
        """The request has ended: report it if it has held the loop for too long."""
        busy = self.busy.get(record)
        if busy is not None:
            self._close_busy(busy, min(busy.ends, _clock.monotonic()))
            self.busy.pop(record, None)

    def _close_busy(self, busy: BusyTime, ended: float) -> None:
        for listener in self._listening():
            if busy.seconds >= listener.busy_threshold:
                # Once a request: one that lives long would be reported again and again.
                self.busy.pop(busy.record, None)
                busy.record.busy_at = math.inf
                self._reporter.put(functools.partial(listener.hear_busy, busy, ended))

    def _take_down(
        self, start: float, end: float, turn: LongTurn | None, reading: Reading | None = None
    ) -> None:
        reading = reading or self._watchdog.read()
        if len(self._listening()) < len(self._listeners):
            self._adjust()
        if self._is_overdue(end):
            self.close_aftermath()
        aftermath = self.aftermath or Aftermath()
        aftermath.last = aftermath.round + Aftermath.ROUNDS + 1
        for record, late in due_timers(self.loop()):
            aftermath.note_due(record, end - late)
        stall = self._stall_of(start, end, reading, turn, aftermath)
        self._untold.append(stall)
        self.aftermath = aftermath  # not before: the watchdog may have closed it with the stalls there were
        self.load.waited += max(0.0, end - start - (stall.spent.cpu or 0.0))
        self._watchdog.begin_anew(reading)
        self.stalled_until = end
        self.probe.aftermath_began()
        self._note_resumed(aftermath, end)

    def _note_resumed(self, aftermath: Aftermath, now: float) -> None:
        for record in self.probe.resumed():
            if record in self.in_flight:
                aftermath.note_turn(record, now)

    def _stall_of(
        self, start: float, end: float, reading: Reading, turn: LongTurn | None, aftermath: Aftermath
    ) -> Stall:
        samples, others, spent = self._watchdog.seen(start, end, reading)
        return Stall(
            start=start,
            end=end,
            wall_end=_clock.wall(),
            samples=samples,
            others=others,
            turn=turn,
            aftermath=aftermath,
            round=aftermath.round,
            spent=spent,
            loop=self._kind,
            thread=self._thread,
            starting=start < self.starting_until,
        )

    def _is_overdue(self, now: float) -> bool:
        """Whether a stall has to be reported now, whoever may still turn out to have waited for it."""
        untold = self._untold
        with contextlib.suppress(IndexError):  # told by another thread meanwhile
            return bool(untold) and now - untold[0].end > _REPORTED_WITHIN
        return False

    def _tell_of(self, stall: Stall, listener: Listener) -> None:
        if stall.duration < listener.threshold:
            return
        if not self._reporter.put(functools.partial(listener.hear_stall, stall)):
            listener.miss_stall()

    # -- on the watchdog's thread ----------------------------------------------------------------

    def note_hang(self, seconds: float, record: RequestRecord | None) -> None:
        """The loop has been held for so long by `record`, and still is."""
        began = _clock.monotonic() - seconds
        if began > self._hang_began:
            # By the time at which it began, not at its end: to the watchdog it may last a little longer.
            self._told_of_hang.clear()
            self._hang_began = began + 0.001
        told = []
        for listener in self._listening():
            reference = weakref.ref(listener)
            if seconds >= listener.hang_after and reference not in self._told_of_hang:
                self._told_of_hang.add(reference)
                told.append(listener)
        if not told:
            return
        with CollectorHeld():
            hang = Hang(seconds, record, look_at_threads(self._thread_id))
        for listener in told:
            self._reporter.put(functools.partial(listener.hear_hang, hang))
        if any(listener.aborts for listener in told) and not is_debugged(hang):
            abort(self._reporter.flush())

    # -- on the reporter's thread ----------------------------------------------------------------

    def _sum_up(self) -> None:
        for listener in self._listening():
            listener.sum_up()

    # -- read from anywhere ----------------------------------------------------------------------

    @property
    def utilisation(self) -> Windows:
        """The share of the last seconds in which the loop was held."""
        return self.load.utilisation(*self._now())

    @property
    def lag(self) -> Windows:
        """How late the loop came to what was due."""
        return self.load.lag(*self._now())

    def _now(self) -> tuple[float, float]:
        since, now = self.probe.held_since(), _clock.monotonic()
        return now, 0.0 if since is None else max(0.0, now - since)

    # -- the end ---------------------------------------------------------------------------------

    def end_from_outside(self) -> None:
        """End the watch of a loop that will not run again, from any thread."""
        self.probe.forget()
        self._end()

    def end_at_exit(self) -> threading.Event:
        """End the watch because the process ends.

        Returns:
            What is set once everybody has heard of all that happened before.
        """
        self._reporter.at_exit = True
        self.end_from_outside()
        return self._reporter.flush()

    def abandon(self) -> None:
        """Forget everything, in a forked child: the threads of this watch stayed in the parent."""
        self.probe.detach()
        self.active = False
        self.loop = lambda: None
        self.aftermath = None
        self.in_flight.clear()
        self.busy.clear()
        self._untold.clear()
        self._listeners.clear()
        self._watchdog.abandon()

    def is_alive(self) -> bool:
        """Whether to go on; asked by the watchdog after each look."""
        if self._is_overdue(_clock.monotonic()):
            with self._ending:
                self.close_aftermath()  # the next stall lasts so long that the loop cannot do it
        loop = self.loop()
        if loop is None or (isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()):
            # Closed without a shutdown, as test clients do: nobody else will end this watch.
            self.end_from_outside()
        elif isinstance(loop, asyncio.AbstractEventLoop) and not loop.is_running():
            # Its last iteration may have held a stall, and there was none after it to settle it.
            with self._ending:
                self.close_aftermath()
            self.probe.pause()
        return self.active

    def _end(self) -> None:
        with self._ending:
            if self.active:
                self.active = False
                self.loop = lambda: None  # one question less for each request
                self.close_aftermath()
                if self._reporter.running or self._reporter.at_exit:
                    for listener in self._listening():
                        self._reporter.put(listener.sum_up)
                self._listeners.clear()
                # A request that is cut off with its loop leads to that loop: both would never be freed.
                self.in_flight.clear()
                self.busy.clear()
                self._watchdog.stop()
                self._reporter.finish()
