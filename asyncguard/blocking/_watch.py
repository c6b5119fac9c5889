"""The watch over one event loop: what happens on the loop's own thread.

One loop has one watch, however many monitors listen to it. The loop's thread does no more than compare two
times an iteration; looking at stacks is the watchdog's work, and making reports of them the reporter's,
each on a thread of its own.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._probes import Probe, attach_probe
from asyncguard.blocking._reporter import Reporter
from asyncguard.blocking._stall import Aftermath, LongTurn, Stall
from asyncguard.blocking._vitals import Reading
from asyncguard.blocking._watchdog import Watchdog

__all__ = ["LoopWatch"]

logger = logging.getLogger("asyncguard.blocking")

P = ParamSpec("P")
Listener = Callable[[Stall], None]

_AFTERMATH_ROUNDS = 8
"""Iterations in which a request runs that was due during a stall. From a connection waiting in the backlog
to the first turn of its request, uvicorn needs five and hypercorn eight."""


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


class LoopWatch:
    """Watches the loop that runs in the thread which makes it.

    Attributes:
        threshold: The shortest stall that any listener wants to hear of, in seconds.
        turn: The request whose coroutine holds the loop now, if any.
        turn_since: Since when it does.
        starting_until: When the application's start-up was over; plus infinity before that.
        aftermath: Who runs right after a stall, while that is being noted.
        stalled_until: The end of the last stall.
        in_flight: The requests that have begun and not ended.
        loop: Returns the loop, or `None` once it is gone: the watch does not keep it alive.
        active: `False` once the watch has ended; a new one is needed then.
    """

    def __init__(self, loop: Any, threshold: float) -> None:
        self.threshold: float = threshold
        self.turn: RequestRecord | None = None
        self.turn_since: float = 0.0
        self.starting_until: float = float("-inf")
        self.aftermath: Aftermath | None = None
        self.stalled_until: float = 0.0
        self.in_flight: set[RequestRecord] = set()
        self.loop: Callable[[], Any] = weakref.ref(loop)
        self.active: bool = True
        self._listeners: dict[weakref.WeakMethod[Listener], float] = {}
        self._long_turns: list[LongTurn] = []
        self._stall: Stall | None = None
        self._ending = threading.Lock()
        self._failed = False
        self._thread = threading.current_thread().name
        self._reporter = Reporter(f"asyncguard-reporter-{self._thread}")
        self._probe: Probe = attach_probe(self, loop)
        self._watchdog = Watchdog(
            self._probe,
            threshold=lambda: self.threshold,
            turn=lambda: self.turn,
            alive=self._is_alive,
        )
        try:
            self._watchdog.start(f"asyncguard-watchdog-{self._thread}")
        except RuntimeError:
            logger.exception("no thread to be had: stalls are timed, but their lines will not be seen")
        self._probe.attach()

    # -- listeners -------------------------------------------------------------------------------

    def listen(self, listener: Listener, threshold: float) -> None:
        """Have `listener`, a bound method, called with each stall of at least `threshold`.

        It is called on the reporter's thread, and forgotten when its object is gone.
        """
        self._listeners[weakref.WeakMethod(listener)] = threshold
        self._set_threshold(min(self._listeners.values()))

    def heard_by(self, listener: Listener) -> bool:
        """Whether `listener` is told of stalls."""
        return weakref.WeakMethod(listener) in self._listeners

    def unlisten(self, listener: Listener) -> threading.Event:
        """Stop calling `listener`, on the loop's thread; the watch ends with its last one.

        Returns:
            What is set once `listener` has heard all that happened before.
        """
        method = weakref.WeakMethod(listener)
        if self.active and method in self._listeners:
            self._tell_leaving(listener, self._listeners[method])
            del self._listeners[method]
            if self._listeners:
                self._set_threshold(min(self._listeners.values()))
            else:
                self._probe.detach()
                self._end()
        return self._reporter.flush()

    def _set_threshold(self, threshold: float) -> None:
        if threshold != self.threshold:
            self.threshold = threshold
            self._probe.threshold_changed()
            self._watchdog.wake()

    @_harmless
    def _tell_leaving(self, listener: Listener, threshold: float) -> None:
        """Tell of the last stall, and of the hold in which the listener leaves: it ends here for it."""
        if self._stall is not None and self._stall.duration >= threshold:
            self._reporter.put(listener, self._stall)
        since, now = self._probe.held_since(), _clock.monotonic()
        if since is not None and now - max(since, self.stalled_until) >= threshold:
            stall = self._stall_of(max(since, self.stalled_until), now, self._watchdog.read())
            self._reporter.put(listener, stall)

    # -- on the loop's thread --------------------------------------------------------------------

    @_harmless
    def note_long_turn(self, record: RequestRecord, since: float, until: float) -> None:
        """Take down a turn of a request that was as long as a stall by itself."""
        if self._stall is not None:
            self.close_aftermath()
        if self.aftermath is None:
            # From now on, not from the next poll: who runs later in this iteration was due as well.
            self.aftermath = Aftermath(_AFTERMATH_ROUNDS)
        self._long_turns.append(LongTurn(record, since, until, self._watchdog.read()))
        self._probe.long_turn(since, until)

    @_harmless
    def stalled(self, start: float, end: float) -> None:
        """Take down a stall that has just ended, and begin to note who runs now."""
        self._take_down(start, end, self._watchdog.read())

    @_harmless
    def settle(self) -> None:
        """Note the end of one iteration after a stall."""
        aftermath = self.aftermath
        if aftermath is not None:
            aftermath.rounds -= 1
            if aftermath.rounds <= 0:
                self.close_aftermath()

    @_harmless
    def close_aftermath(self) -> None:
        """Hand the last stall over to the reporter, with all that is known of it."""
        stall, self._stall, self.aftermath = self._stall, None, None
        if stall is None:
            return
        for method, threshold in list(self._listeners.items()):
            listener = method()
            if listener is None:
                del self._listeners[method]
                self._set_threshold(min(self._listeners.values(), default=self.threshold))
            elif stall.duration >= threshold:
                self._reporter.put(listener, stall)

    def _take_down(self, start: float, end: float, reading: Reading) -> None:
        if self._stall is not None:
            self.close_aftermath()
        self._stall = self._stall_of(start, end, reading)
        self.aftermath = self._stall.aftermath
        self._watchdog.begin_anew(reading)
        self._long_turns = []
        self.stalled_until = end

    def _stall_of(self, start: float, end: float, reading: Reading) -> Stall:
        samples, spent = self._watchdog.seen(start, end, reading)
        return Stall(
            start=start,
            end=end,
            wall_end=_clock.wall(),
            samples=samples,
            long_turns=[turn for turn in self._long_turns if turn.until > start],
            aftermath=self.aftermath or Aftermath(_AFTERMATH_ROUNDS),
            spent=spent,
            thread=self._thread,
            starting=start < self.starting_until,
        )

    # -- the end ---------------------------------------------------------------------------------

    def end_from_outside(self) -> None:
        """End the watch of a loop that will not run again, from any thread."""
        self._finish_last_iteration()
        self._probe.forget()
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
        self._probe.detach()
        self.active = False
        self.aftermath = None
        self._listeners.clear()
        self._watchdog.abandon()

    def _is_alive(self) -> bool:
        """Whether to go on; asked by the watchdog after each look."""
        loop = self.loop()
        if loop is None or (isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()):
            # Closed without a shutdown, as test clients do: nobody else will end this watch.
            self.end_from_outside()
        elif isinstance(loop, asyncio.AbstractEventLoop) and not loop.is_running():
            self._finish_last_iteration()
            self._probe.pause()
        return self.active

    @_harmless
    def _finish_last_iteration(self) -> None:
        """Take down a stall in the iteration that was the last: there was no poll after it to end it."""
        if self._stall is None and self._long_turns:
            last = self._long_turns[-1]
            self._take_down(self._long_turns[0].since, last.until, last.vitals)

    def _end(self) -> None:
        with self._ending:
            if self.active:
                self.active = False
                self.close_aftermath()
                self._listeners.clear()
                self._watchdog.stop()
                self._reporter.finish()
