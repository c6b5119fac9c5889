"""The half of a monitor that works on the reporter's thread: it makes reports, and tells of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from asyncguard._hooks import Hook
from asyncguard.blocking._busy import BusyTime, report_busy
from asyncguard.blocking._hang import Hang, report_hang
from asyncguard.blocking._ledger import Ledger
from asyncguard.blocking._report import compose, compose_gil, excuse
from asyncguard.blocking._stall import Stall
from asyncguard.events import BlockReport, BusyReport, HangReport

__all__ = ["MonitorListener"]

logger = logging.getLogger("asyncguard.blocking")

_MOST_SUMMARIES = 20


class MonitorListener:
    """Tells the log, the hooks and the ledger of one monitor. See `_watch.Listener` for its attributes."""

    def __init__(
        self,
        *,
        threshold: float,
        busy_threshold: float,
        hang_after: float,
        on_hang: Literal["log", "abort"] | Callable[[HangReport], object],
        on_block: Callable[[BlockReport], object] | None,
        on_busy: Callable[[BusyReport], object] | None,
        project_root: str | None,
        log: bool,
    ) -> None:
        self.threshold = threshold
        self.busy_threshold = busy_threshold
        self.hang_after = hang_after
        self.aborts = on_hang == "abort"
        self.project_root = project_root
        self.ledger = Ledger()
        self._on_block = Hook("on_block", on_block, logger) if on_block is not None else None
        self._on_busy = Hook("on_busy", on_busy, logger) if on_busy is not None else None
        self._on_hang = Hook("on_hang", on_hang, logger) if callable(on_hang) else None
        self._log = log

    def hear_stall(self, stall: Stall) -> None:
        innocent = excuse(stall, self.threshold, self.project_root)
        report = compose_gil(stall, self.project_root) if innocent == "gil" else None
        if innocent is None:
            report = compose(stall, self.threshold, self.project_root)
        elif report is None:
            self.ledger.enter_excused(innocent)
            return
        assert report is not None
        first = self.ledger.enter(report)
        if self._on_block is not None:
            self._on_block(report)
        if first:
            level = logging.INFO if report.starting else logging.WARNING
            self._tell(level, report)

    def hear_busy(self, busy: BusyTime, ended: float) -> None:
        report = report_busy(busy, ended, self.project_root)
        first = self.ledger.enter_busy(report)
        if self._on_busy is not None:
            self._on_busy(report)
        if first:
            self._tell(logging.WARNING, report)

    def hear_hang(self, hang: Hang) -> None:
        report = report_hang(hang)
        # The log first: nothing may come after the hook, if it hangs as well.
        self._tell(logging.CRITICAL if self.aborts else logging.ERROR, report)
        if self._on_hang is not None:
            self._on_hang(report)

    def miss_stall(self) -> None:
        self.ledger.enter_dropped()

    def sum_up(self) -> None:
        summaries = self.ledger.untold()
        for summary in summaries[:_MOST_SUMMARIES]:
            self._tell(logging.INFO if summary.starting else logging.WARNING, summary)
        if len(summaries) > _MOST_SUMMARIES:
            others = len(summaries) - _MOST_SUMMARIES
            self._tell(logging.WARNING, f"{others} other lines and routes held the loop again")

    def _tell(self, level: int, event: object) -> None:
        if self._log:
            logger.log(level, "%s", event, extra={"asyncguard_report": event})
