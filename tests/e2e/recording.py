"""How the reports of a guarded server reach the test, without a guess at when they are there.

The server appends each `BlockReport` to a file, a line of JSON. The test then visits ``/barrier/TOKEN``,
which blocks the loop itself: reports come in the order of their stalls, so once that one is in the file
all earlier ones are. A test that expects no report thus also sees that one would have come.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asyncguard import Advice, BlockReport, SourceLine, StackSample, Victim
from tests import raw_client
from tests.servers import ROOT

__all__ = ["STALL", "THRESHOLD", "Recorded", "Recording", "add_barrier", "marked", "write"]

THRESHOLD = 0.05
"""From how many seconds on the guarded applications report."""

STALL = 0.15
"""For how many seconds most of their lines block."""

VARIABLE = "ASYNCGUARD_TEST_REPORTS"
_BARRIER_STALL = 0.11
_BARRIER_TIMEOUT = 5.0
_BARRIER_ATTEMPTS = 5


# -- in the server -------------------------------------------------------------------------------


def write(report: BlockReport) -> None:
    """Hand a report to the test; all workers write to one file."""
    # Not `asdict`: it copies all that is in a report, in Python, and that keeps the loop from the GIL.
    line = json.dumps({"pid": os.getpid(), **_shallow(report)}, default=_shallow) + "\n"
    descriptor = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _shallow(event: Any) -> dict[str, Any]:
    return {field.name: getattr(event, field.name) for field in fields(event)}


def add_barrier(app: Starlette) -> None:
    """Have requests to ``/barrier/...`` block the loop.

    As what answers where no route matches: a middleware would be in the stack of every request, and a
    route would stand for all barriers.
    """
    not_found = app.router.default

    async def barrier(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/barrier/"):
            time.sleep(_BARRIER_STALL)  # blocks: barrier
            await Response(status_code=204)(scope, receive, send)
        else:
            await not_found(scope, receive, send)

    app.router.default = barrier


# -- in the test ---------------------------------------------------------------------------------


@dataclass
class Recorded:
    """What was reported during a block of the test.

    Attributes:
        reports: The reports, in order.
        pids: The processes that wrote them.
        elapsed: How long the block took, in seconds.
    """

    reports: list[BlockReport] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    elapsed: float = 0.0

    @property
    def only(self) -> BlockReport:
        assert len(self.reports) == 1, str(self)
        return self.reports[0]

    def __str__(self) -> str:
        return "\n".join([f"{len(self.reports)} reports", *map(str, self.reports)])


class Recording:
    """The reports of one server."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "reports.jsonl"
        self._path.touch()
        self._began = 0
        self.env = {VARIABLE: str(self._path)}

    def read(self, offset: int = 0) -> Recorded:
        """All that was written from `offset` on, but for barriers."""
        recorded = Recorded()
        for line in self._path.read_text()[offset:].splitlines(keepends=True):
            if line.endswith("\n") and '"GET /barrier/' not in line.partition('"victims"')[0]:
                values = json.loads(line)
                recorded.pids.append(values.pop("pid"))
                recorded.reports.append(_report(values))
        return recorded

    def await_report(self, request: str) -> None:
        """Wait until a stall by `request` has been reported: all that belongs to it is over then.

        Within a block of `during`, a stall before the block does not count.
        """
        assert self._await_text(f'"request": "{request}"', 30.0, self._began), request

    @contextmanager
    def during(self, port: int) -> Iterator[Recorded]:
        """The reports of all stalls within a ``with`` block; they are there when it ends."""
        recorded = Recorded()
        offset = self._began = len(self._path.read_text())
        began = time.monotonic()
        try:
            yield recorded
        finally:
            self._await_barrier(port)
        found = self.read(offset)
        recorded.reports, recorded.pids = found.reports, found.pids
        recorded.elapsed = time.monotonic() - began

    def _await_barrier(self, port: int) -> None:
        # On a machine under stress, the stall may be put down to it and go unreported: try again.
        for _ in range(_BARRIER_ATTEMPTS):
            path = f"/barrier/{uuid.uuid4().hex}"
            assert raw_client.get(port, path).status == 204
            if self._await_text(f'"GET {path}"', _BARRIER_TIMEOUT):
                return
        raise AssertionError(f"{_BARRIER_ATTEMPTS} stalls in a row were not reported")

    def _await_text(self, text: str, seconds: float, offset: int = 0) -> bool:
        deadline = time.monotonic() + seconds
        while text not in self._path.read_text()[offset:]:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def _report(values: dict[str, Any]) -> BlockReport:
    for name in ("stack", "victims"):
        made: Callable[..., Any] = SourceLine if name == "stack" else Victim
        values[name] = tuple(made(**each) for each in values[name])
    values["samples"] = tuple(
        StackSample(tuple(SourceLine(**line) for line in sample["stack"]), sample["seconds"])
        for sample in values["samples"]
    )
    values["line"] = values["line"] and SourceLine(**values["line"])
    values["advice"] = values["advice"] and Advice(**values["advice"])
    return BlockReport(**values)


def marked(file: str | Path, name: str, comment: str = "blocks") -> int:
    """The number of the one line of a file that bears the comment ``# blocks: NAME``."""
    lines = (ROOT / file).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {comment}: {name}")]
    assert len(found) == 1, (name, found)
    return found[0]
