"""The thread that looks at what a loop's thread does while the loop is held."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._load import LoopLoad
from asyncguard.blocking._lookups import CollectorHeld, read_stack, running_request
from asyncguard.blocking._probes import Probe
from asyncguard.blocking._stall import Others, Sample
from asyncguard.blocking._threads import OtherThreads
from asyncguard.blocking._vitals import LoopVitals, Reading, kept_waking

__all__ = ["Watchdog"]

logger = logging.getLogger("asyncguard.blocking")

_MOST_SAMPLES = 64
_LONGEST_NAP = 1.0
_WAKING = 0.005
"""Seconds that waking up may take without being called late."""
_QUIET = 1.0
"""Seconds without an iteration of the loop after which the watchdog rests; without a request, after which it
takes its time."""
_UNHURRIED = 0.8
"""Times the threshold: for how long it naps then. It still wakes before a hold becomes a stall."""


class Watched(Protocol):
    """What a watchdog needs of a `LoopWatch`.

    Attributes:
        probe: What tells since when the loop is held.
        threshold: The shortest stall of interest, in seconds.
        hang_after: After how long a stall that goes on is to be told of, in seconds.
        turn: The request whose coroutine holds the loop, if that is known.
        in_flight: The requests that have begun and not ended.
        load: How busy the loop is.
    """

    probe: Probe
    threshold: float
    hang_after: float
    turn: RequestRecord | None
    in_flight: set[RequestRecord]
    load: LoopLoad

    def is_alive(self) -> bool:
        """Whether to go on."""

    def note_hang(self, seconds: float, record: RequestRecord | None) -> None:
        """The loop has been held for so long by `record`, and still is."""


class Watchdog:
    """Wakes twice per threshold, and looks at the loop's thread if the loop has been held for long.

    Made on the loop's thread.

    Args:
        watch: The watch that it belongs to.
    """

    def __init__(self, watch: Watched) -> None:
        self._watch = watch
        self._thread = threading.get_ident()
        self._samples: deque[Sample] = deque(maxlen=_MOST_SAMPLES)
        self._due = float("inf")
        self._overslept = 0.0
        self._vitals = LoopVitals()
        self._others = OtherThreads({self._thread})
        self._others_seen: deque[Others] = deque(maxlen=_MOST_SAMPLES)
        self._baseline = self._vitals.read(0.0)
        self._held_before: float | None = None
        self._asleep_in_hold = 0.0
        self._busy_before = 0.0
        self._quiet_since = self._deserted_since = _clock.monotonic()
        self._collector = CollectorHeld()
        self._still = False
        self._failed = False
        self._stopped = False
        self._bell = threading.Lock()
        self._bell.acquire()

    def start(self, name: str) -> None:
        """Start the thread.

        Raises:
            RuntimeError: If the system has no thread to give.
        """
        try:
            if sys.platform == "linux":  # elsewhere, there is nothing to be learned from it
                threading.Thread(target=self._vitals.rest, name=f"{name}-resting", daemon=True).start()
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except BaseException:
            self._vitals.close()
            raise

    def stop(self) -> None:
        """End the thread soon; nothing happens if it has been told so before."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """End the thread's nap: there is something to see, or another pace to keep."""
        if self._bell.locked():
            with contextlib.suppress(RuntimeError):  # rung twice at once
                self._bell.release()

    def abandon(self) -> None:
        """Give back what is left of it in a forked child, where its thread is not."""
        self._vitals.close()
        self._collector.release()

    # -- on the loop's thread --------------------------------------------------------------------

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Let no new window begin in a ``with`` block, though nothing seems to hold the loop."""
        self._still = True
        try:
            yield
        finally:
            self._still = False

    def read(self) -> Reading:
        """Take a reading now."""
        # First this: taking it lets the GIL go, and who had it until just now still stands on its line.
        with CollectorHeld():
            self._look_at_others()
        reading = self._vitals.read(0.0)
        # Not before: taking it lets the GIL go, and the watchdog may have woken meanwhile.
        return reading._replace(overslept=self._late(_clock.monotonic()))

    def seen(self, start: float, end: float, reading: Reading) -> tuple[list[Sample], list[Others], Reading]:
        """What was seen of a hold from `start` to `end`, of others, and what the threads did meanwhile."""
        samples = [sample for sample in list(self._samples) if start <= sample.at <= end]
        return samples, list(self._others_seen), reading.since(self._baseline)

    def late(self, now: float) -> float:
        """For how long the watchdog has been kept from looking, since the last time that all was well."""
        return self._late(now) - self._baseline.overslept

    def kept_from_gil(self, reading: Reading) -> float:
        """For how many seconds at most the loop's thread has waited for the GIL since the last reading.

        0 if the watchdog has not waited for it as well: then something else kept it.
        """
        spent = reading.since(self._baseline)
        # A thread that waits for the GIL wakes once per switch interval to ask for it.
        waited = spent.turns * sys.getswitchinterval()
        return waited if kept_waking(spent.watchdog_turns, spent.overslept) else 0.0

    def begin_anew(self, reading: Reading) -> None:
        """Forget what was seen so far: the stall that it belongs to has been taken down."""
        self._set_baseline(reading)
        self._samples.clear()
        # In a long hold the naps grow long: the next stall must not pass within one.
        if self._due - reading.at > self._watch.threshold / 2:
            self.wake()

    # -- on its own thread -----------------------------------------------------------------------

    def _run(self) -> None:
        self._vitals.watchdog_is_here()
        self._others.apart_from.add(threading.get_ident())
        nap = 0.0
        while not self._stopped:
            now = _clock.monotonic()
            self._expect(now, now + nap)
            self._bell.acquire(timeout=nap)
            # From here to the look, nothing may let the GIL go: no I/O, no lock. A call in C that held
            # it has just returned, and the loop's thread still stands on its line.
            try:
                nap = self._wake_up()
                if not self._watch.is_alive():
                    break
            except Exception:
                nap = _LONGEST_NAP
                if not self._failed:
                    self._failed = True
                    logger.exception("asyncguard failed to look at the loop; it goes on trying in silence")
        self._samples.clear()  # they lead to requests
        self._vitals.close()

    def _wake_up(self) -> float:
        """Look, if the loop is held; returns for how long to nap now."""
        watch, woken = self._watch, _clock.monotonic()
        since = watch.probe.held_since()
        now = _clock.monotonic()
        half = watch.threshold / 2
        held = 0.0 if since is None else now - since
        if held >= half:
            with self._collector:
                self._samples.append(self._look(now, sys._current_frames().get(self._thread)))
            nap = max(half / 2, held / 8)
        else:
            nap = max(half - held, half / 4)
        overslept = self._expect(now, now)
        self._forget_samples(before=now if since is None else since)
        cpu = None
        if since is None and overslept >= half:
            # The loop may have been kept from the interpreter lock as well, and is about to find out.
            with self._collector:
                self._look_at_others()
        # Not in the middle of a hold: what it has cost so far would be forgotten.
        elif since is None or (since != self._held_before and held < half):
            reading = self._vitals.read(self._overslept)
            # Nor if this thread was held up for as long as a stall meanwhile: there may be one by now, and
            # what it has cost in the last of the numbers. For less it often is: each lets the GIL go.
            if _clock.monotonic() - woken < watch.threshold and not self._still:
                self._set_baseline(reading)
            cpu = reading.cpu
            # Reading lets the GIL go. A call in C that came meanwhile has just returned: look at once.
            if _clock.monotonic() - woken >= _WAKING:
                nap = 0.0
        self._watch_for_hang(since, held, overslept)
        self._held_before = since
        watch.probe.mark(now, cpu)
        if since is None and self._is_quiet(now) and watch.probe.rest():
            return _LONGEST_NAP
        if since is None and self._is_deserted(now):
            nap = _UNHURRIED * watch.threshold
        return min(nap, _LONGEST_NAP)

    def _expect(self, now: float, due: float) -> float:
        """Be called late after `due`; returns by how much it has been late this time."""
        before, overslept = self._overslept, self._late(now)
        # With no call in between, so that the loop's thread sees both or neither.
        self._overslept = overslept
        self._due = due
        return overslept - before

    def _late(self, now: float) -> float:
        """For how many seconds it has been late in all, now included: it may still be asleep."""
        return self._overslept + max(0.0, now - self._due - _WAKING)

    def _watch_for_hang(self, since: float | None, held: float, overslept: float) -> None:
        # A process that was stopped in the middle of a callback does not hang.
        if since is None or since != self._held_before:
            self._asleep_in_hold = 0.0
        self._asleep_in_hold += overslept
        if held - self._asleep_in_hold >= self._watch.hang_after:
            self._watch.note_hang(held, self._samples[-1].record if self._samples else None)

    def _is_quiet(self, now: float) -> bool:
        """Whether the loop has not run for a while."""
        busy = self._watch.load.busy
        if busy != self._busy_before:
            self._busy_before, self._quiet_since = busy, now
        return now - self._quiet_since >= _QUIET

    def _is_deserted(self, now: float) -> bool:
        """Whether there has been no request for a while, though the loop has run for something else."""
        if self._watch.in_flight:
            self._deserted_since = now
        return now - self._deserted_since >= _QUIET

    def _look(self, now: float, frame: FrameType | None) -> Sample:
        probe = self._watch.probe
        frames, record, callback, task = read_stack(frame, probe.outside)
        if not callback:
            callback, record, task = running_request(probe.runner())
        self._look_at_others()
        return Sample(now, frames, self._watch.turn or record, callback, task)

    def _look_at_others(self) -> None:
        """See which threads computed since the last reading, if the loop's did not."""
        cpu, before = self._vitals.cpu(), self._baseline
        if cpu is None or before.cpu is None or cpu - before.cpu >= (_clock.monotonic() - before.at) / 4:
            return
        if others := self._others.computing():
            self._others_seen.append(others)

    def _set_baseline(self, reading: Reading) -> None:
        self._baseline = reading
        self._others.begin_anew()
        self._others_seen.clear()

    def _forget_samples(self, before: float) -> None:
        """Drop looks at holds that ended before they were a stall."""
        # The loop's thread may clear them at the same time.
        with contextlib.suppress(IndexError):
            while self._samples[0].at < before:
                self._samples.popleft()
