"""What each line has cost so far, and how many stalls nobody was blamed for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import get_args

from asyncguard import _clock
from asyncguard.blocking._report import Excuse
from asyncguard.events import BlockedLine, BlockReport

__all__ = ["Ledger"]

_MOST_REQUESTS = 10
_LOG_AGAIN_AFTER = 60.0


@dataclass(slots=True)
class _Entry:
    worst: BlockReport
    requests: list[str] = field(default_factory=list)
    count: int = 0
    total: float = 0.0
    victims: int = 0
    logged: float = float("-inf")
    unlogged: int = 0

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
        self._excused: dict[str, int] = dict.fromkeys(get_args(Excuse), 0)

    def enter(self, report: BlockReport) -> int | None:
        """Add a report to what its line has cost so far.

        Returns:
            How many reports of this line have not been logged, if it is time to log it again: the first
            at once, then one a minute. `None` if it is not.
        """
        line = report.line
        key = (report.starting, "", 0) if line is None else (report.starting, line.file, line.line)
        now = _clock.monotonic()
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(report))
            self._entries.move_to_end(key)
            entry.add(report)
            if len(self._entries) > self.MOST_LINES:
                self._entries.popitem(last=False)
            if now - entry.logged < _LOG_AGAIN_AFTER:
                entry.unlogged += 1
                return None
            unlogged, entry.unlogged, entry.logged = entry.unlogged, 0, now
            return unlogged

    def enter_excused(self, reason: Excuse) -> None:
        """Count a stall that nobody is blamed for."""
        with self._lock:
            self._excused[reason] += 1

    def excused(self) -> dict[str, int]:
        """How many stalls nobody was blamed for, by the reason."""
        with self._lock:
            return dict(self._excused)

    def lines(self) -> tuple[BlockedLine, ...]:
        """What each line has cost, the most costly first."""
        with self._lock:
            lines = [entry.summed_up() for (starting, *_), entry in self._entries.items() if not starting]
        return tuple(sorted(lines, key=lambda line: line.total, reverse=True))

    def renew_lock(self) -> None:
        """In a forked child, where another thread of the parent may have held it."""
        self._lock = threading.Lock()
