"""How busy a loop is: its utilisation and its lag over the last 1, 10 and 60 seconds.

The loop's thread only adds to two sums. The watchdog marks how far they have come, and a window is the
difference between now and the mark at its beginning.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import NamedTuple

from asyncguard.events import Windows

__all__ = ["LoopLoad"]

_WINDOWS = (1.0, 10.0, 60.0)
_MARK_EVERY = 0.5


class _Mark(NamedTuple):
    at: float
    busy: float
    delay: float


class LoopLoad:
    """The sums of one loop.

    Attributes:
        busy: Seconds for which the loop was held, so far.
        delay: The integral over time of how late the loop would come to what becomes due then. A hold of
            L seconds adds L² / 2: what becomes due during it waits for L / 2 on average.
        waited: Seconds of stalls in which the loop's thread used no CPU, so far.
    """

    def __init__(self, now: float) -> None:
        self.busy = 0.0
        self.delay = 0.0
        self.waited = 0.0
        self._marks: deque[_Mark] = deque([_Mark(now, 0.0, 0.0)], maxlen=int(_WINDOWS[-1] / _MARK_EVERY) + 2)

    def mark(self, now: float, *, at_once: bool = False) -> None:
        """Take down how far the sums have come, if that was not done just now."""
        if at_once or now - self._marks[-1].at >= _MARK_EVERY:
            self._marks.append(_Mark(now, self.busy, self.delay))

    def utilisation(self, now: float, held: float) -> Windows:
        """The share of each window in which the loop was held, from 0 to 1.

        Args:
            now: The end of the windows.
            held: For how long the loop has been held by then, if it is.
        """
        end = _Mark(now, self.busy + held, 0.0)
        return Windows(*(min(1.0, busy / seconds) for seconds, busy, _ in self._over(end)))

    def lag(self, now: float, held: float) -> Windows:
        """How late the loop came to what was due, on average over each window, in seconds."""
        end = _Mark(now, 0.0, self.delay + held * held / 2)
        return Windows(*(delay / seconds for seconds, _, delay in self._over(end)))

    def _over(self, end: _Mark) -> list[_Mark]:
        """The length of each window, and what the sums grew by in it."""
        marks = [*self._marks, end]
        grown = []
        for window in _WINDOWS:
            begin = _at(marks, end.at - window)
            seconds = max(end.at - begin.at, 1e-9)
            grown.append(_Mark(seconds, max(0.0, end.busy - begin.busy), max(0.0, end.delay - begin.delay)))
        return grown


def _at(marks: list[_Mark], moment: float) -> _Mark:
    """How far the sums had come at a moment, as if they had grown evenly between two marks."""
    for later, earlier in pairwise(reversed(marks)):
        if earlier.at <= moment:
            share = (moment - earlier.at) / max(later.at - earlier.at, 1e-9)
            return _Mark(
                moment,
                earlier.busy + share * (later.busy - earlier.busy),
                earlier.delay + share * (later.delay - earlier.delay),
            )
    return marks[0]
