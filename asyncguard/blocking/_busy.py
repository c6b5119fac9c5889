"""Requests that hold the loop for long in pieces that are too small to be stalls.

Counted on the loop's thread, and only for requests that have had half of the threshold already.
"""

from __future__ import annotations

import itertools
from types import CodeType

from asyncguard import _clock
from asyncguard._frames import await_chain
from asyncguard._request import RequestRecord
from asyncguard._source import is_user_code, source_line
from asyncguard.blocking._advice import BUSY_ADVICE
from asyncguard.events import BusyReport, SourceLine

__all__ = ["BusyTime", "report_busy"]

_WINDOW = 10
"""Over how many times the threshold a request's pieces are added up. One that lives longer, as a websocket
does, may use a tenth of the loop without being reported."""

_MOST_PLACES = 64
_numbers = itertools.count(1)


class BusyTime:
    """What one request has held the loop for within a window.

    Args:
        record: The request.
        began: When the window began.
        threshold: How many seconds are too many.

    Attributes:
        seconds: How many there have been so far.
        ends: When the window ends.
        turns: How many turns were added.
        longest: The longest of them, in seconds.
    """

    def __init__(self, record: RequestRecord, began: float, threshold: float) -> None:
        self.record = record
        self.began = began
        self.ends = began + _WINDOW * threshold
        self.seconds = 0.0
        self.turns = 0
        self.longest = 0.0
        self._places: dict[tuple[tuple[CodeType, int], ...], float] = {}

    def add(self, held: float) -> None:
        """Add a turn that has just ended, at the place where the request now awaits something."""
        self.seconds += held
        self.turns += 1
        self.longest = max(self.longest, held)
        place = tuple(await_chain(self.record.coroutine))
        if place in self._places or len(self._places) < _MOST_PLACES:
            self._places[place] = self._places.get(place, 0.0) + held

    def line(self, project_root: str | None) -> SourceLine | None:
        """The user's innermost line at which it gave the loop back after most of the time."""
        lines: dict[tuple[CodeType, int], float] = {}
        for place, held in self._places.items():
            for code, line in reversed(place):
                if is_user_code(code.co_filename, project_root):
                    lines[code, line] = lines.get((code, line), 0.0) + held
                    break
        return source_line(*max(lines, key=lines.__getitem__)) if lines else None


def report_busy(busy: BusyTime, ended: float, project_root: str | None) -> BusyReport:
    """Make the report; `ended` is when the window ended or the request did."""
    return BusyReport(
        id=next(_numbers),
        noticed=_clock.wall(),
        request=busy.record.label,
        loop_time=busy.seconds,
        window=ended - busy.began,
        turns=busy.turns,
        longest=busy.longest,
        line=busy.line(project_root),
        advice=BUSY_ADVICE,
    )
