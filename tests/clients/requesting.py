"""An application without a server, whose requests do what a test wants."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asyncguard._request import RequestRecord, current_request
from asyncguard.clients._rebuilt import AGAIN, Lines
from asyncguard.clients._rebuilt_report import Rebuilding, compose
from asyncguard.events import ClientReport

__all__ = ["VERIFY", "Service", "Work"]

Work = Callable[[], Awaitable[object]]

VERIFY: Any = False
"""A client that verifies no certificate loads none, and takes no time."""


class Service:
    """An application whose requests do what a test wants."""

    def __init__(self, project_root: str | None = None) -> None:
        self.reports: list[ClientReport] = []
        self.lines = Lines(project_root, self._tell)
        self._project_root = project_root

    def _tell(self, rebuilding: Rebuilding) -> None:
        self.reports.append(compose(rebuilding, self._project_root))

    def begin(self) -> RequestRecord:
        record = RequestRecord({"type": "http", "method": "GET", "path": "/offers"}, 0.0)
        record.builds = self.lines
        return record

    async def request(self, work: Work) -> None:
        """One request; the work is alone in a coroutine, so that what it has left is gone with it."""
        record = self.begin()
        token = current_request.set(record)
        try:
            await work()
        finally:
            current_request.reset(token)
            record.finish()

    async def requests(self, work: Work, times: int = AGAIN + 1) -> None:
        for _ in range(times):
            await self.request(work)
