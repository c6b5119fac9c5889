"""What each line has cost, what is still to be told of it, and how long the stalls were."""

from __future__ import annotations

import bisect
import dataclasses
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncguard.blocking._ledger import BusySummary, Ledger, Summary
from asyncguard.events import Advice, BlockReport, BusyReport, SourceLine, Victim
from tests.reports import REPORT

TWO = (Victim("GET /v", 1.0), Victim("GET /w", 1.0))


def place(line: int) -> SourceLine:
    return SourceLine("app.py", line, "f")


def report(line: int | None = 1, duration: float = 1.0, **changes: Any) -> BlockReport:
    found = None if line is None else place(line)
    return dataclasses.replace(
        REPORT, **({"line": found, "duration": duration, "request": "GET /"} | changes)
    )


def busy(request: str = "GET /feed", loop_time: float = 1.0) -> BusyReport:
    return BusyReport(1, 0.0, request, loop_time, 5.0, 30, 0.05, None, Advice("Rest", "cures/#rest"))


def entered(*reports: BlockReport) -> Ledger:
    ledger = Ledger()
    for each in reports:
        ledger.enter(each)
    return ledger


# -- lines -------------------------------------------------------------------------------------------


def test_each_line_is_counted() -> None:
    ledger = entered(
        report(1, 1.0, request="GET /a", call="small"),
        report(2, 7.0),
        report(1, 3.0, request="GET /b", call="big", victims=TWO, advice=Advice("Big", "cures/#big")),
        report(1, 2.0, request="GET /a", call="middle", victims=TWO),
        report(None, 20.0, request=None),
    )
    nowhere, two, one = ledger.lines()
    assert (nowhere.line, nowhere.requests, nowhere.total) == (None, (), 20.0)
    assert (two.count, two.total, two.worst) == (1, 7.0, 7.0)
    assert one.line == place(1)
    assert (one.count, one.total, one.worst, one.victims) == (3, 6.0, 3.0, 4)
    assert one.requests == ("GET /a", "GET /b")
    assert (one.call, one.advice) == ("big", Advice("Big", "cures/#big"))


def test_the_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that blocked last are kept, and the first requests of each."""
    monkeypatch.setattr(Ledger, "MOST_LINES", 3)
    ledger = entered(*(report(line, request=f"GET /{line}") for line in (1, 2, 3, 1, 4, 5)))
    assert sorted(entry.line.line for entry in ledger.lines() if entry.line) == [1, 4, 5]
    for number in range(100):
        ledger.enter(report(1, request=f"GET /more/{number}"))
    (one,) = [entry for entry in ledger.lines() if entry.line and entry.line.line == 1]
    assert len(one.requests) == 10
    assert one.requests[0] == "GET /1"
    for number in range(5):
        ledger.enter_busy(busy(f"GET /{number}"))
    assert not ledger.enter_busy(busy("GET /2"))
    assert ledger.enter_busy(busy("GET /0"))


def test_the_start_up_costs_nothing() -> None:
    ledger = entered(report(1, starting=True), report(1, 0.25))
    assert [(entry.count, entry.total) for entry in ledger.lines()] == [(1, 0.25)]
    assert (sum(ledger.stalls().counts), ledger.stalls().total) == (1, 0.25)


# -- what is to be told ------------------------------------------------------------------------------


def test_a_lines_first_stall_is_told_apart() -> None:
    ledger = Ledger()
    reports = [
        report(1),
        report(1, request="GET /other"),
        report(2),
        report(None),
        report(None),
        report(1, starting=True),
        report(1, starting=True),
    ]
    assert [ledger.enter(each) for each in reports] == [True, False, True, True, False, True, False]
    ledger.untold()
    assert not ledger.enter(report(1))


def test_what_came_after_the_first_is_summed_up_once() -> None:
    ledger = entered(
        report(1, 1.0, victims=TWO),  # told at once
        report(1, 2.0, victims=TWO),
        report(1, 3.0),
        report(2, 50.0),
        report(3, 1.0),
        report(3, 9.0, victims=TWO[:1]),
        report(1, 1.0, starting=True),
        report(1, 0.5, starting=True),
    )
    assert ledger.untold() == [
        Summary(place(3), False, 1, 9.0, 9.0, 1),
        Summary(place(1), False, 2, 5.0, 3.0, 2),
        Summary(place(1), True, 1, 0.5, 0.5, 0),
    ]
    assert ledger.untold() == []
    ledger.enter(report(1, 4.0))
    assert ledger.untold() == [Summary(place(1), False, 1, 4.0, 4.0, 0)]
    # The costs so far are not touched by that.
    assert [entry.count for entry in ledger.lines() if entry.line == place(1)] == [4]


def test_busy_requests_are_summed_up_by_their_route() -> None:
    ledger = entered(report(1), report(1, 3.0))
    firsts = [
        ledger.enter_busy(each) for each in (busy(), busy(loop_time=2.0), busy(loop_time=4.0), busy("WS /x"))
    ]
    assert firsts == [True, False, False, True]
    assert ledger.untold() == [
        BusySummary("GET /feed", 2, 6.0),
        Summary(place(1), False, 1, 3.0, 3.0, 0),
    ]
    assert ledger.untold() == []
    assert not ledger.enter_busy(busy(loop_time=1.5))
    assert ledger.untold() == [BusySummary("GET /feed", 1, 1.5)]
    # They are no stalls.
    assert sum(ledger.stalls().counts) == 2
    assert len(ledger.lines()) == 1


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (
            Summary(place(1), False, 1, 0.25, 0.25, 0),
            "app.py:1 in f blocked the loop once more, for 0.25 s in all",
        ),
        (
            Summary(place(1), False, 3, 1.5, 0.5, 1),
            f"{place(1)} blocked the loop 3 more times, for 1.50 s in all, 500 ms at worst; 1 request waited",
        ),
        (
            Summary(None, False, 1, 0.25, 0.25, 7),
            "Code that could not be seen blocked the loop once more, for 0.25 s in all; 7 requests waited",
        ),
        (
            BusySummary("GET /feed", 1, 1.5),
            "GET /feed held the loop in small pieces once more, for 1.50 s in all",
        ),
        (
            BusySummary("GET /feed", 2, 3.0),
            "GET /feed held the loop in small pieces 2 more times, for 3.00 s in all",
        ),
    ],
)
def test_the_sentence_of_a_summary(summary: object, expected: str) -> None:
    assert str(summary) == expected


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 64), st.booleans(), st.booleans()), max_size=40))
def test_every_stall_is_told_once(stalls: list[tuple[int, int, bool, bool]]) -> None:
    """Whenever the minutes end: a first at once, all others in a summary, none twice."""
    ledger, told = Ledger(), 0.0
    for line, eighths, starting, minute in stalls:
        duration = eighths / 8
        if ledger.enter(report(line, duration, starting=starting)):
            told += duration
        if minute:
            told += sum(summary.total for summary in ledger.untold())
    told += sum(summary.total for summary in ledger.untold())
    assert told == sum(eighths for _, eighths, _, _ in stalls) / 8


# -- the histogram -----------------------------------------------------------------------------------


def test_a_ledger_that_nothing_was_entered_into() -> None:
    ledger = Ledger()
    histogram = ledger.stalls()
    assert set(histogram.counts) == {0}
    assert histogram.total == 0
    assert (ledger.lines(), ledger.untold()) == ((), [])
    assert set(ledger.excused().values()) == {0}


@given(st.lists(st.floats(0.001, 100), max_size=20))
def test_every_stall_is_in_one_class(durations: list[float]) -> None:
    histogram = entered(*(report(1, duration) for duration in durations)).stalls()
    assert len(histogram.counts) == len(histogram.bounds) + 1
    assert list(histogram.bounds) == sorted(histogram.bounds)
    for index, count in enumerate(histogram.counts):
        inside = [each for each in durations if bisect.bisect_left(histogram.bounds, each) == index]
        assert count == len(inside)
    assert histogram.total == pytest.approx(sum(durations))


def test_a_bound_belongs_to_the_class_below_it() -> None:
    bounds = Ledger().stalls().bounds
    assert entered(*(report(1, bound) for bound in bounds)).stalls().counts == (*(1 for _ in bounds), 0)
    assert entered(report(1, bounds[-1] + 0.001)).stalls().counts[-1] == 1


# -- who was not to blame ----------------------------------------------------------------------------


def test_the_excused_are_counted_by_their_reason() -> None:
    ledger = Ledger()
    for reason in ("starved", "gil", "gil"):
        ledger.enter_excused(reason)
    assert ledger.excused() == {"starved": 1, "suspended": 0, "gil": 2, "unexplained": 0}
    ledger.excused()["starved"] = 5  # a copy
    assert ledger.excused()["starved"] == 1


def test_a_loop_that_drops_a_stall_does_not_wait_for_the_reporter() -> None:
    ledger = entered(report(1))
    with ledger._lock:
        ledger.enter_dropped()
        ledger.enter_dropped()
        assert ledger.dropped() == 2


def test_locks_that_nobody_will_give_back() -> None:
    ledger = entered(report(1))
    for lock in (ledger._lock, ledger._dropping):
        holder = threading.Thread(target=lock.acquire)
        holder.start()
        holder.join()
    ledger.renew_locks()
    assert len(ledger.lines()) == 1
    assert ledger.dropped() == 0
