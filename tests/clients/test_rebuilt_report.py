"""From a line that builds clients again and again to the report of it, and to what is said."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncguard._frames import raw_frames
from asyncguard._request import RequestRecord
from asyncguard.clients._kinds import KINDS
from asyncguard.clients._rebuilt_report import Rebuilding, compose
from asyncguard.events import Advice, ClientReport, SourceLine
from tests.servers import ROOT

LINE = SourceLine("app/routes.py", 64, "offers", "async with httpx.AsyncClient() as client:")
REPORT = ClientReport(
    id=1,
    noticed=0.0,
    request="GET /offers",
    client="httpx.AsyncClient",
    line=LINE,
    exact=True,
    call="httpx.AsyncClient",
    stack=(LINE,),
    times=3,
    seconds=0.02714,
    advice=Advice("Share it", "cures/#client-per-request"),
)
SAID_AFTER = (
    "; 3 before it were thrown away with their requests, after 27.1 ms to build each. "
    "Share it (cures/#client-per-request)"
)


async def endpoint() -> None: ...


def make_rebuilding(**changes: Any) -> Rebuilding:
    scope = {"type": "http", "method": "GET", "path": "/offers", "endpoint": endpoint}
    values: dict[str, Any] = {
        "record": RequestRecord(scope, 0.0),
        "kind": KINDS[0],
        "times": 3,
        "seconds": 0.02714,
        "noticed": 5000.0,
        "frames": raw_frames(sys._getframe(1)),
        "outside": 0,
    }
    return Rebuilding(**(values | changes))


def test_a_report_says_all_that_is_known() -> None:
    report = compose(make_rebuilding(), None)
    assert (report.request, report.client, report.times) == ("GET /offers", "httpx.AsyncClient", 3)
    assert (report.seconds, report.noticed, report.exact) == (0.02714, 5000.0, True)
    assert report.line is not None
    assert report.line.function == "test_a_report_says_all_that_is_known"
    assert report.call == "make_rebuilding"
    assert report.stack[-1] == report.line
    assert report.advice == KINDS[0].advice


def test_reports_are_numbered() -> None:
    first, second = (compose(make_rebuilding(), None) for _ in range(2))
    assert second.id == first.id + 1


def test_without_a_line_of_the_users_the_endpoint_is_named(tmp_path: Path) -> None:
    report = compose(make_rebuilding(outside=None), str(tmp_path))
    assert report.line is not None
    assert (report.line.function, report.exact, report.call) == ("endpoint", False, "")
    # All that is known of how it came there.
    assert report.stack[-1].function == "test_without_a_line_of_the_users_the_endpoint_is_named"
    assert len(report.stack) > 10


def test_before_routing_there_is_no_line_at_all(tmp_path: Path) -> None:
    record = RequestRecord({"type": "http", "method": "GET", "path": "/offers"}, 0.0)
    report = compose(make_rebuilding(record=record, outside=None), str(tmp_path))
    assert report.line is None
    assert f" at {report.stack[-1]}; 3 before it" in str(report)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, f" at {LINE}"),
        ({"exact": False}, f" for the endpoint {LINE}"),
        ({"line": None, "exact": False}, f" at {LINE}"),
        ({"line": None, "exact": False, "stack": ()}, ""),
    ],
    ids=["seen", "for an endpoint", "in a library", "unknown"],
)
def test_the_sentence(changes: dict[str, Any], place: str) -> None:
    report = dataclasses.replace(REPORT, **changes)
    assert str(report) == f"GET /offers builds its own httpx.AsyncClient{place}{SAID_AFTER}"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_advice_leads_somewhere(kind: Any) -> None:
    page, _, anchor = kind.advice.docs.partition("/#")
    headings = (ROOT / "docs" / f"{page}.md").read_text()
    assert f"\n## {anchor.replace('-', ' ').capitalize()}\n" in headings
