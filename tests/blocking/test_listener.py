"""What a monitor makes of what it hears: the log, the hooks and the ledger."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import pytest

from asyncguard._request import RequestRecord
from asyncguard.blocking import _listener
from asyncguard.blocking._busy import BusyTime
from asyncguard.blocking._hang import Hang
from asyncguard.blocking._ledger import BusySummary, Summary
from asyncguard.blocking._listener import MonitorListener
from asyncguard.blocking._stall import Stall
from asyncguard.events import BlockReport, BusyReport, HangReport, SourceLine
from tests.reports import REPORT


def listener(**options: Any) -> MonitorListener:
    plain: dict[str, Any] = {
        "threshold": 0.1,
        "busy_threshold": 1.0,
        "hang_after": 10.0,
        "on_hang": "log",
        "on_block": None,
        "on_busy": None,
        "project_root": None,
        "log": True,
    }
    return MonitorListener(**(plain | options))


def report(line: int = 1, **changes: Any) -> BlockReport:
    return dataclasses.replace(REPORT, **({"line": SourceLine("app.py", line, "f")} | changes))


Tell = Callable[..., None]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Tells a listener of stalls that are to become given reports."""
    monkeypatch.setattr(_listener, "excuse", lambda stall, threshold, root: None)
    monkeypatch.setattr(_listener, "compose", lambda stall, threshold, project_root: stall)

    def tell(listener: MonitorListener, *reports: BlockReport) -> None:
        for each in reports:
            listener.hear_stall(cast(Stall, each))

    return tell


# -- stalls ------------------------------------------------------------------------------------------


def test_the_options_arrive_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def composed(*arguments: object) -> BlockReport:
        asked.append(arguments)
        return report()

    monkeypatch.setattr(_listener, "excuse", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(_listener, "compose", composed)
    found = listener(threshold=0.25, hang_after=math.inf, on_hang="abort", project_root="/root")
    stall = cast(Stall, object())
    found.hear_stall(stall)
    assert asked == [(stall, 0.25, "/root")] * 2
    assert (found.threshold, found.busy_threshold, found.hang_after, found.aborts) == (
        0.25,
        1.0,
        math.inf,
        True,
    )


def test_a_lines_first_stall_is_logged_at_once(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    hooked: list[BlockReport] = []
    each = [report(1), report(1, request="GET /b"), report(2), report(1)]
    found = listener(on_block=hooked.append)
    tell(found, *each)
    assert [record.getMessage() for record in caplog.records] == [str(each[0]), str(each[2])]
    assert hooked == each
    assert [entry.count for entry in found.ledger.lines()] == [3, 1]


def test_the_log_record(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    event = report()
    tell(listener(), event)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asyncguard.blocking", logging.WARNING)
    assert record.__dict__["asyncguard_report"] is event


def test_a_start_up_is_no_warning_and_costs_no_line(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    events: list[BlockReport] = []
    found = listener(on_block=events.append)
    starting = report(starting=True, advice=None, request=None)
    tell(found, starting, starting)
    found.sum_up()
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.INFO]
    assert found.ledger.lines() == ()
    assert len(events) == 2


def test_a_log_that_is_switched_off(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    hooked: list[BlockReport] = []
    found = listener(log=False, on_block=hooked.append)
    tell(found, report(), report())
    found.sum_up()
    found.hear_hang(Hang(10.0, None, ()))
    assert caplog.records == []
    assert len(hooked) == 2


def test_a_broken_hook_keeps_nothing_from_the_log(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[BlockReport] = []

    def broken(event: BlockReport) -> None:
        calls.append(event)
        raise LookupError

    found = listener(on_block=broken)
    tell(found, report(1), report(2))
    assert len(calls) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING"]
    assert "on_block" in caplog.records[0].getMessage()
    assert len(found.ledger.lines()) == 2


# -- excuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["starved", "suspended", "gil", "unexplained"])
def test_the_innocent_are_counted_and_not_reported(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    monkeypatch.setattr(_listener, "excuse", lambda stall, threshold, root: reason)
    monkeypatch.setattr(_listener, "compose_gil", lambda stall, project_root: None)
    events: list[BlockReport] = []
    found = listener(on_block=events.append)
    tell(found, report(), report())
    assert (events, found.ledger.lines(), caplog.records) == ([], (), [])
    excused = found.ledger.excused()
    assert excused[reason] == 2
    assert sum(excused.values()) == 2


def test_a_thread_whose_line_was_seen_is_reported(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_listener, "excuse", lambda stall, threshold, root: "gil")
    roots: list[str | None] = []

    def composed(stall: Stall, project_root: str | None) -> BlockReport:
        roots.append(project_root)
        return cast(BlockReport, stall)

    monkeypatch.setattr(_listener, "compose_gil", composed)
    events: list[BlockReport] = []
    found = listener(on_block=events.append, project_root="/root")
    event = report(cause="gil", held_by="worker", request=None)
    tell(found, event)
    assert events == [event]
    assert roots == ["/root"]
    assert [record.getMessage() for record in caplog.records] == [str(event)]
    assert sum(found.ledger.excused().values()) == 0
    assert len(found.ledger.lines()) == 1


@pytest.mark.parametrize("reason", ["starved", "suspended", "unexplained"])
def test_only_who_was_kept_from_the_gil_blames_a_thread(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(_listener, "excuse", lambda stall, threshold, root: reason)
    monkeypatch.setattr(_listener, "compose_gil", lambda stall, project_root: stall)
    found = listener()
    tell(found, report())
    assert found.ledger.excused()[reason] == 1
    assert found.ledger.lines() == ()


def test_what_came_too_fast_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = listener()
    found.miss_stall()
    assert found.ledger.dropped() == 1
    assert (found.ledger.lines(), caplog.records) == ((), [])


# -- requests that are busy --------------------------------------------------------------------------


def busy_time(path: str = "/feed", seconds: float = 1.5) -> BusyTime:
    record = RequestRecord({"type": "http", "method": "GET", "path": path}, 100.0)
    busy = BusyTime(record, 100.0, 1.0)
    busy.add(seconds)
    return busy


def test_a_routes_first_busy_request_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    events: list[BusyReport] = []
    found = listener(on_busy=events.append)
    for busy in (busy_time(), busy_time(), busy_time("/other")):
        found.hear_busy(busy, 104.0)
    assert [(event.request, event.loop_time, event.window) for event in events] == [
        ("GET /feed", 1.5, 4.0),
        ("GET /feed", 1.5, 4.0),
        ("GET /other", 1.5, 4.0),
    ]
    assert [record.getMessage() for record in caplog.records] == [str(events[0]), str(events[2])]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert caplog.records[0].__dict__["asyncguard_report"] is events[0]
    # They are no stalls.
    assert found.ledger.lines() == ()


def test_a_broken_hook_for_busy_requests(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: BusyReport) -> None:
        raise LookupError

    found = listener(on_busy=broken)
    found.hear_busy(busy_time(), 104.0)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "on_busy" in caplog.records[0].getMessage()


# -- a stall that goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize(("on_hang", "level"), [("log", logging.ERROR), ("abort", logging.CRITICAL)])
def test_a_hang_is_logged(on_hang: str, level: int, caplog: pytest.LogCaptureFixture) -> None:
    found = listener(on_hang=on_hang)
    assert found.aborts == (on_hang == "abort")
    found.hear_hang(Hang(10.0, None, ()))
    (record,) = caplog.records
    assert record.levelno == level
    event = record.__dict__["asyncguard_report"]
    assert isinstance(event, HangReport)
    assert record.getMessage() == str(event)


@pytest.mark.parametrize("log", [True, False])
def test_a_hook_for_hangs(log: bool, caplog: pytest.LogCaptureFixture) -> None:
    events: list[HangReport] = []
    found = listener(on_hang=events.append, log=log)
    assert not found.aborts
    found.hear_hang(Hang(10.0, None, ()))
    assert events == [HangReport(10.0, None, ())]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", str(events[0]))
    ] * log


def test_a_broken_hook_for_hangs(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: HangReport) -> None:
        raise LookupError

    listener(on_hang=broken).hear_hang(Hang(10.0, None, ()))
    failed = [record for record in caplog.records if "on_hang" in record.getMessage()]
    assert len(failed) == 1
    assert len(caplog.records) == 2


# -- once a minute -----------------------------------------------------------------------------------


def test_the_minutes_summary(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = listener()
    tell(found, report(1), report(1, duration=2.0), report(2), report(1, starting=True))
    tell(found, report(1, starting=True, duration=0.5), report(1, duration=3.0))
    for _ in range(2):
        found.hear_busy(busy_time(), 104.0)
    caplog.clear()
    found.sum_up()
    one = SourceLine("app.py", 1, "f")
    summaries = [
        Summary(one, False, 2, 5.0, 3.0, 0),
        BusySummary("GET /feed", 1, 1.5),
        Summary(one, True, 1, 0.5, 0.5, 0),
    ]
    assert [record.getMessage() for record in caplog.records] == [str(summary) for summary in summaries]
    assert [record.__dict__["asyncguard_report"] for record in caplog.records] == summaries
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    caplog.clear()
    found.sum_up()
    assert caplog.records == []


def test_a_minute_in_which_everything_blocked(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    """The most costly are told one by one, the others counted."""
    found = listener()
    for line in range(23):
        tell(found, report(line), report(line, duration=float(line + 1)))
    caplog.clear()
    found.sum_up()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 21
    assert messages[0].startswith("app.py:22 in f blocked the loop once more, for 23.00 s")
    assert messages[-1] == "3 other lines and routes held the loop again"
    caplog.clear()
    found.sum_up()
    assert caplog.records == []
