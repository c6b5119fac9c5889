"""What each line has cost so far, and how many stalls nobody was blamed for."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from asyncguard.blocking._report import Excuse
from asyncguard.events import BlockedLine, BlockReport, BusyReport, SourceLine, StallHistogram

__all__ = ["BusySummary", "Ledger", "Summary"]

_MOST_REQUESTS = 10
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Summary(NamedTuple):
    """What one line has cost since it was last told of."""

    line: SourceLine | None
    starting: bool
    times: int
    total: float
    worst: float
    victims: int

    def __str__(self) -> str:
        place = self.line or "Code that could not be seen"
        times = "once more" if self.times == 1 else f"{self.times} more times"
        waited = f"; {self.victims} requests waited" if self.victims > 1 else ""
        waited = "; 1 request waited" if self.victims == 1 else waited
        worst = f", {self.worst * 1000:.0f} ms at worst" if self.times > 1 else ""
        return f"{place} blocked the loop {times}, for {self.total:.2f} s in all{worst}{waited}"


class BusySummary(NamedTuple):
    """What one route has held the loop for, in small pieces, since it was last told of."""

    request: str
    times: int
    total: float

    @property
    def starting(self) -> bool:
        """`False`: no request is served while the application starts."""
        return False

    def __str__(self) -> str:
        times = "once more" if self.times == 1 else f"{self.times} more times"
        return f"{self.request} held the loop in small pieces {times}, for {self.total:.2f} s in all"


@dataclass(slots=True)
class _Entry:
    worst: BlockReport
    requests: list[str] = field(default_factory=list)
    count: int = 0
    total: float = 0.0
    victims: int = 0
    untold: Summary | None = None

    def add(self, report: BlockReport) -> None:
        self.count += 1
        self.total += report.duration
        self.victims += len(report.victims)
        if report.duration > self.worst.duration:
            self.worst = report
        if (
            report.request is not None
            and report.request not in self.requests
            and len(self.requests) < _MOST_REQUESTS
        ):
            self.requests.append(report.request)

    def add_untold(self, report: BlockReport) -> None:
        _, _, count, total, worst, victims = self.untold or Summary(None, False, 0, 0.0, 0.0, 0)
        self.untold = Summary(
            report.line,
            report.starting,
            count + 1,
            total + report.duration,
            max(worst, report.duration),
            victims + len(report.victims),
        )

    def summed_up(self) -> BlockedLine:
        worst = self.worst
        return BlockedLine(
            line=worst.line,
            call=worst.call,
            requests=tuple(self.requests),
            count=self.count,
            total=self.total,
            worst=worst.duration,
            victims=self.victims,
            advice=worst.advice,
        )


class Ledger:
    """The costs of the last `MOST_LINES` lines that blocked. Any thread may use it.

    A start-up is kept apart: it blocks nobody, so its lines cost nothing; but they are logged.
    """

    MOST_LINES = 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[bool, str, int], _Entry] = OrderedDict()
        self._busy: OrderedDict[str, BusySummary] = OrderedDict()
        self._excused: dict[str, int] = dict.fromkeys(get_args(Excuse), 0)
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._total = 0.0
        # Taken by loops' threads, which must not wait for a reporter that holds the other one.
        self._dropping = threading.Lock()
        self._dropped = 0

    def enter(self, report: BlockReport) -> bool:
        """Add a report to what its line has cost so far.

        Returns:
            Whether it is the line's first. Of the others, `untold` tells.
        """
        line = report.line
        key = (report.starting, "", 0) if line is None else (report.starting, line.file, line.line)
        with self._lock:
            first = key not in self._entries
            entry = self._entries.setdefault(key, _Entry(report))
            self._entries.move_to_end(key)
            entry.add(report)
            if not report.starting:
                self._counts[bisect.bisect_left(_BOUNDS, report.duration)] += 1
                self._total += report.duration
            if not first:
                entry.add_untold(report)
            if len(self._entries) > self.MOST_LINES:
                self._entries.popitem(last=False)
            return first

    def enter_busy(self, report: BusyReport) -> bool:
        """Add a report of a request that held the loop in small pieces.

        Returns:
            Whether it is the route's first. Of the others, `untold` tells.
        """
        with self._lock:
            before = self._busy.get(report.request)
            _, count, total = before or BusySummary(report.request, -1, -report.loop_time)
            self._busy[report.request] = BusySummary(report.request, count + 1, total + report.loop_time)
            self._busy.move_to_end(report.request)
            if len(self._busy) > self.MOST_LINES:
                self._busy.popitem(last=False)
            return before is None

    def untold(self) -> list[Summary | BusySummary]:
        """What has been entered since it was told of, by `enter` or by this; the most costly first."""
        with self._lock:
            summaries: list[Summary | BusySummary] = [
                entry.untold for entry in self._entries.values() if entry.untold is not None
            ]
            for entry in self._entries.values():
                entry.untold = None
            for request, summary in self._busy.items():
                if summary.times:
                    summaries.append(summary)
                    self._busy[request] = BusySummary(request, 0, 0.0)
        return sorted(summaries, key=lambda summary: summary.total, reverse=True)

    def enter_excused(self, reason: Excuse) -> None:
        """Count a stall that nobody is blamed for."""
        with self._lock:
            self._excused[reason] += 1

    def excused(self) -> dict[str, int]:
        """How many stalls nobody was blamed for, by the reason."""
        with self._lock:
            return dict(self._excused)

    def enter_dropped(self) -> None:
        """Count a stall that was not looked into."""
        with self._dropping:
            self._dropped += 1

    def dropped(self) -> int:
        """How many stalls were not looked into."""
        with self._dropping:
            return self._dropped

    def stalls(self) -> StallHistogram:
        """How many stalls there were of which length."""
        with self._lock:
            return StallHistogram(_BOUNDS, tuple(self._counts), self._total)

    def lines(self) -> tuple[BlockedLine, ...]:
        """What each line has cost, the most costly first."""
        with self._lock:
            lines = [entry.summed_up() for (starting, *_), entry in self._entries.items() if not starting]
        return tuple(sorted(lines, key=lambda line: line.total, reverse=True))

    def renew_locks(self) -> None:
        """In a forked child, where another thread of the parent may have held them."""
        self._lock = threading.Lock()
        self._dropping = threading.Lock()
