"""The watch over one event loop: its probe, its watchdog and the stalls they find.

One loop has one watch, however many monitors listen to it. The loop's own thread does no more than compare
two times an iteration; looking at stacks is the watchdog's work, and making reports of them the
reporter's, each on a thread of its own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from asyncguard import _clock
from asyncguard._request import RequestRecord, current_request
from asyncguard.blocking._lookups import RunningTask, read_stack, running_task
from asyncguard.blocking._probes import Probe, attach_probe
from asyncguard.blocking._reporter import Reporter
from asyncguard.blocking._stall import Aftermath, LongTurn, Sample, Stall
from asyncguard.blocking._vitals import ThreadVitals, Vitals

__all__ = ["LoopWatch"]

_AFTERMATH_ROUNDS = 6
"""Iterations in which a request runs that was due during a stall. asyncio needs five from a connection
waiting in the backlog to the first turn of its request."""

_MOST_SAMPLES = 64


class LoopWatch:
    """Watches the loop that runs in the thread which makes it.

    Attributes:
        threshold: The shortest stall that any listener wants to hear of, in seconds.
        turn: The request whose coroutine holds the loop now, if any.
        turn_since: Since when it does.
        trio_task: On trio, the task that runs now.
        starting_until: When the application's start-up was over; plus infinity before that.
        aftermath: Who runs right after a stall, while that is being noted.
        stalled_until: The end of the last stall.
        in_flight: The requests that have begun and not ended.
        loop: Returns the loop, or `None` once it is gone: the watch does not keep it alive.
        active: `False` once the watch has stopped; a new one is needed then.
    """

    def __init__(self, loop: Any, threshold: float) -> None:
        self.threshold: float = threshold
        self.turn: RequestRecord | None = None
        self.turn_since: float = 0.0
        self.trio_task: RunningTask | None = None
        self.starting_until: float = float("-inf")
        self.aftermath: Aftermath | None = None
        self.stalled_until: float = 0.0
        self.in_flight: set[RequestRecord] = set()
        self.active: bool = True
        self._listeners: dict[Callable[[Stall], None], float] = {}
        self.loop: Callable[[], Any] = weakref.ref(loop)
        self._thread = threading.current_thread()
        self._samples: deque[Sample] = deque(maxlen=_MOST_SAMPLES)
        self._long_turns: list[LongTurn] = []
        self._stall: Stall | None = None
        self._overslept = 0.0
        self._vitals = ThreadVitals(threading.get_ident(), threading.get_native_id())
        self._baseline = (_clock.monotonic(), self._vitals.read(), 0.0)
        self._reporter = Reporter(self._thread.name)
        self._stop = threading.Lock()
        self._stop.acquire()
        self._probe: Probe = attach_probe(self, loop)
        threading.Thread(
            target=self._watch, name=f"asyncguard-watchdog-{self._thread.name}", daemon=True
        ).start()

    # -- listeners, on the loop's thread ---------------------------------------------------------

    def listen(self, listener: Callable[[Stall], None], threshold: float) -> None:
        """Have `listener` called, on the reporter's thread, with each stall of at least `threshold`."""
        self._listeners[listener] = threshold
        self.threshold = min(self._listeners.values())

    def unlisten(self, listener: Callable[[Stall], None]) -> Reporter | None:
        """Stop calling `listener`; the watch ends with its last one.

        Returns:
            The reporter, if the watch has ended, so that the caller can wait for its last reports.
        """
        if not self.active or listener not in self._listeners:
            return None
        if len(self._listeners) > 1:
            self.close_aftermath()
            del self._listeners[listener]
            self.threshold = min(self._listeners.values())
            return None
        since, now = self._probe.held_since(), _clock.monotonic()
        self._probe.detach()
        if since is not None:
            # Stopped in the middle of a stall: it ends here, as far as this watch can tell.
            since = max(since, self.stalled_until)
            if now - since >= self.threshold:
                self.stalled(since, now)
        self._end()
        return self._reporter

    def heard_by(self, listener: Callable[[Stall], None]) -> bool:
        """Whether `listener` is told of stalls."""
        return listener in self._listeners

    def abandon(self) -> None:
        """Forget everything, in a forked child: the threads of this watch stayed in the parent."""
        self._probe.detach()
        self.active = False
        self.aftermath = None
        self._listeners.clear()
        self._vitals.close()

    # -- what happens on the loop's thread -------------------------------------------------------

    def note_long_turn(self, record: RequestRecord, since: float, until: float) -> None:
        """Take down a turn of a request that was as long as a stall by itself."""
        if self._stall is not None:
            self.close_aftermath()
        if self.aftermath is None:
            # From now on, not from the next poll: who runs later in this iteration was due as well.
            self.aftermath = Aftermath(_AFTERMATH_ROUNDS)
        self._long_turns.append(LongTurn(record, since, until, self._vitals.read()))
        self._probe.long_turn(since, until)

    def stalled(self, start: float, end: float) -> None:
        """Take down a stall that has just ended, and begin to note who runs now."""
        self._take_down(start, end, self._vitals.read())

    def _take_down(self, start: float, end: float, vitals: Vitals) -> None:
        if self._stall is not None:
            self.close_aftermath()
        if self.aftermath is None:
            self.aftermath = Aftermath(_AFTERMATH_ROUNDS)
        measured_from, before, overslept = self._baseline
        self._stall = Stall(
            start=start,
            end=end,
            wall_end=_clock.wall(),
            samples=[sample for sample in list(self._samples) if start <= sample.at <= end],
            long_turns=[turn for turn in self._long_turns if turn.until > start],
            aftermath=self.aftermath,
            cpu=vitals.cpu - before.cpu,
            starved=vitals.queued - before.queued,
            overslept=self._overslept - overslept,
            measured=end - measured_from,
            thread=self._thread.name,
            starting=start < self.starting_until,
        )
        self._long_turns = []
        self._samples.clear()
        self.stalled_until = end

    def settle(self) -> None:
        """Note the end of one iteration after a stall."""
        aftermath = self.aftermath
        if aftermath is not None:
            aftermath.rounds -= 1
            if aftermath.rounds <= 0:
                self.close_aftermath()

    def close_aftermath(self) -> None:
        """Hand the last stall over to the reporter, with all that is known of it."""
        stall, self._stall, self.aftermath = self._stall, None, None
        if stall is not None:
            for listener, threshold in self._listeners.items():
                if stall.duration >= threshold:
                    self._reporter.put(listener, stall)

    # -- what happens on the watchdog's thread ---------------------------------------------------

    def _watch(self) -> None:
        monotonic = _clock.monotonic
        wait = self._stop.acquire
        thread = self._thread.ident
        held_before: float | None = None
        delay = self.threshold / 2
        while True:
            due = monotonic() + delay
            if wait(timeout=delay):
                break
            # From here to the sample, nothing may let the GIL go: no I/O, no lock. A call in C that
            # held it has just returned, and the loop's thread still stands on its line.
            since = self._probe.held_since()
            now = monotonic()
            half = self.threshold / 2
            if since is not None and now - since >= half:
                self._samples.append(self._sample(now, sys._current_frames().get(thread or 0)))
                delay = min(max(half / 2, (now - since) / 8), 1.0)
            else:
                delay = half if since is None else max(half - (now - since), half / 4)
            self._overslept += max(0.0, now - due - 0.005)
            self._forget_samples(before=now if since is None else since)
            if since is None or since != held_before:
                self._baseline = (now, self._vitals.read(), self._overslept)
                held_before = since
            loop = self.loop()
            if loop is None or (isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()):
                # Closed without a shutdown, as test clients do: nobody else will end this watch.
                if self._stall is None and self._long_turns:
                    # The loop went without another poll.
                    last = self._long_turns[-1]
                    self._take_down(self._long_turns[0].since, last.until, last.vitals)
                self._end()
                break
            del loop
        self._vitals.close()

    def _sample(self, now: float, frame: FrameType | None) -> Sample:
        stack = read_stack(frame, self._probe.outside)
        context, callback = stack.context, stack.callback
        if context is None:
            task = self.trio_task
            loop = self.loop()
            if isinstance(loop, asyncio.AbstractEventLoop):
                task = running_task(loop)
            if task is not None:
                callback, context = task
        record = self.turn
        if record is None and context is not None:
            record = context.get(current_request)
        return Sample(now, stack.frames, record, callback)

    def _forget_samples(self, before: float) -> None:
        """Drop looks at holds that ended before they were a stall."""
        while self._samples and self._samples[0].at < before:
            self._samples.popleft()

    def _end(self) -> None:
        self.close_aftermath()
        self.active = False
        self._listeners.clear()
        self._reporter.finish()
        if self._stop.locked():
            self._stop.release()
