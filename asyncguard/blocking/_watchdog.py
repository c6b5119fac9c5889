"""The thread that looks at what a loop's thread does while the loop is held."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._lookups import read_stack, running_request
from asyncguard.blocking._probes import Probe
from asyncguard.blocking._stall import Sample
from asyncguard.blocking._vitals import LoopVitals, Reading

__all__ = ["Watchdog"]

logger = logging.getLogger("asyncguard.blocking")

_MOST_SAMPLES = 64
_LONGEST_NAP = 1.0
_WAKING = 0.005
"""Seconds that waking up may take without being called late."""


class Watchdog:
    """Wakes twice per threshold, and looks at the loop's thread if the loop has been held for long.

    Args:
        probe: What tells since when the loop is held.
        threshold: Returns the shortest stall of interest, in seconds.
        turn: Returns the request whose coroutine holds the loop, if that is known.
        alive: Called after each look; the watchdog ends when it returns `False`.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        threshold: Callable[[], float],
        turn: Callable[[], RequestRecord | None],
        alive: Callable[[], bool],
    ) -> None:
        self._probe = probe
        self._threshold = threshold
        self._turn = turn
        self._alive = alive
        self._thread = threading.get_ident()
        self._samples: deque[Sample] = deque(maxlen=_MOST_SAMPLES)
        self._due = float("inf")
        self._overslept = 0.0
        self._vitals = LoopVitals()
        self._baseline = self._vitals.read(0.0)
        self._held_before: float | None = None
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
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except BaseException:
            self._vitals.close()
            raise

    def stop(self) -> None:
        """End the thread soon; nothing happens if it has been told so before."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """End the thread's nap, since the threshold is another one now."""
        if self._bell.locked():
            with contextlib.suppress(RuntimeError):  # rung twice at once
                self._bell.release()

    def abandon(self) -> None:
        """Give back what is left of it in a forked child, where its thread is not."""
        self._vitals.close()

    # -- on the loop's thread --------------------------------------------------------------------

    def read(self) -> Reading:
        """Take a reading now."""
        return self._vitals.read(self._overslept)

    def seen(self, start: float, end: float, reading: Reading) -> tuple[list[Sample], Reading]:
        """What was seen of a hold from `start` to `end`, and what the threads did in that time."""
        samples = [sample for sample in list(self._samples) if start <= sample.at <= end]
        # The watchdog itself may still be asleep, though it is past its time.
        late = max(0.0, end - max(self._due, start) - _WAKING)
        return samples, reading._replace(overslept=reading.overslept + late).since(self._baseline)

    def begin_anew(self, reading: Reading) -> None:
        """Forget what was seen so far: the stall that it belongs to has been taken down."""
        self._baseline = reading
        self._samples.clear()

    # -- on its own thread -----------------------------------------------------------------------

    def _run(self) -> None:
        self._vitals.watchdog_is_here()
        nap = 0.0
        while not self._stopped:
            self._due = _clock.monotonic() + nap
            if self._bell.acquire(timeout=nap):
                nap = 0.0
                continue
            # From here to the look, nothing may let the GIL go: no I/O, no lock. A call in C that held
            # it has just returned, and the loop's thread still stands on its line.
            try:
                nap = self._wake_up()
                if not self._alive():
                    break
            except Exception:
                nap = _LONGEST_NAP
                if not self._failed:
                    self._failed = True
                    logger.exception("asyncguard failed to look at the loop; it goes on trying in silence")
        self._vitals.close()

    def _wake_up(self) -> float:
        """Look, if the loop is held; returns for how long to nap now."""
        since = self._probe.held_since()
        now = _clock.monotonic()
        half = self._threshold() / 2
        held = 0.0 if since is None else now - since
        if held >= half:
            self._samples.append(self._look(now, sys._current_frames().get(self._thread)))
            nap = max(half / 2, held / 8)
        else:
            nap = max(half - held, half / 4)
        self._overslept += max(0.0, now - self._due - _WAKING)
        self._due = now
        self._forget_samples(before=now if since is None else since)
        # Not in the middle of a hold: what it has cost so far would be forgotten.
        if since is None or (since != self._held_before and held < half):
            reading = self._vitals.read(self._overslept)
            # Nor if this thread was held up meanwhile: there may be a hold by now.
            if reading.at - now < half:
                self._baseline = reading
        self._held_before = since
        return min(nap, _LONGEST_NAP)

    def _look(self, now: float, frame: FrameType | None) -> Sample:
        stack = read_stack(frame, self._probe.outside)
        record, callback = stack.record, stack.callback
        if not callback:
            callback, record = running_request(self._probe.runner())
        return Sample(now, stack.frames, self._turn() or record, callback)

    def _forget_samples(self, before: float) -> None:
        """Drop looks at holds that ended before they were a stall."""
        # The loop's thread may clear them at the same time.
        with contextlib.suppress(IndexError):
            while self._samples[0].at < before:
                self._samples.popleft()
