"""The events that hooks receive, and the sentence that the log shows."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from asyncguard import events
from asyncguard.events import (
    Advice,
    BlockedLine,
    BlockReport,
    BusyReport,
    HangReport,
    InFlight,
    SourceLine,
    StackSample,
    StallHistogram,
    ThreadStack,
    TimeoutReport,
    Victim,
    Windows,
)
from tests.reports import LINE, REPORT


def report(**changes: Any) -> BlockReport:
    return dataclasses.replace(REPORT, **changes)


def test_the_sentence_says_everything() -> None:
    full = report(
        victims=(Victim("GET /a", 0.598), Victim("GET /b", 0.1)),
        advice=Advice("Use a shared client", "cures/#http"),
    )
    assert str(full) == (
        "GET /report/{user} blocked the loop for 612 ms (waiting in recv_into) "
        "at app/routes.py:42 in report: requests.get(url); 2 requests waited, the longest up to 598 ms. "
        "Use a shared client (cures/#http)"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cause": "cpu"}, "GET /report/{user} blocked the loop for 612 ms (computing in recv_into)"),
        ({"cause": "cpu", "innermost": ""}, "GET /report/{user} blocked the loop for 612 ms (computing)"),
        ({"innermost": ""}, "GET /report/{user} blocked the loop for 612 ms (waiting)"),
        (
            {"request": None},
            "code outside any request blocked the loop for 612 ms (waiting in recv_into)",
        ),
        (
            {"request": None, "starting": True},
            "start-up blocked the loop for 612 ms (waiting in recv_into)",
        ),
        (
            {"request": None, "pieces": 7},
            "7 or more callbacks in a row blocked the loop for 612 ms (waiting in recv_into)",
        ),
        ({"cause": "unknown"}, "GET /report/{user} blocked the loop for 612 ms (busy in recv_into)"),
        ({"cause": "gc", "request": None}, "garbage collection blocked the loop for 612 ms"),
        (
            {"cause": "gil", "request": None, "held_by": "worker"},
            "thread worker kept the loop from the GIL for 612 ms in recv_into",
        ),
        (
            {"cause": "gil", "request": None, "held_by": "worker", "innermost": ""},
            "thread worker kept the loop from the GIL for 612 ms",
        ),
        (
            {"left_behind": True},
            "a task left behind by GET /report/{user} blocked the loop for 612 ms (waiting in recv_into)",
        ),
        ({"pieces": 7}, "GET /report/{user} blocked the loop for 612 ms (waiting in recv_into)"),
    ],
)
def test_who_and_how(changes: dict[str, Any], expected: str) -> None:
    assert report(**changes).headline == expected


def test_a_place_that_was_not_seen_is_called_the_endpoint() -> None:
    assert " for the endpoint app/routes.py:42 in report: requests.get(url)" in str(report(exact=False))


def test_a_stall_without_a_line_ends_with_its_headline() -> None:
    bare = report(line=None)
    assert str(bare) == bare.headline


@pytest.mark.parametrize(
    ("victims", "expected"),
    [
        ((), ""),
        ((Victim("GET /a", 0.0996),), "1 request waited up to 100 ms"),
        ((Victim("GET /a", 2), Victim("GET /a", 1)), "2 requests waited, the longest up to 2000 ms"),
    ],
)
def test_suffering(victims: tuple[Victim, ...], expected: str) -> None:
    assert report(victims=victims).suffering == expected


BUSY = BusyReport(
    id=1,
    noticed=0.0,
    request="GET /feed",
    loop_time=1.256,
    window=4.5,
    turns=30,
    longest=0.0496,
    line=LINE,
    advice=Advice("Rest", "cures/#rest"),
)


def test_the_sentence_of_a_busy_request() -> None:
    assert str(BUSY) == (
        "GET /feed held the loop for 1.26 s of 4.50 s, in pieces of up to 50 ms, "
        "giving it back at app/routes.py:42 in report: requests.get(url). Rest (cures/#rest)"
    )
    assert str(dataclasses.replace(BUSY, line=None)) == (
        "GET /feed held the loop for 1.26 s of 4.50 s, in pieces of up to 50 ms. Rest (cures/#rest)"
    )


HANG = HangReport(
    seconds=10.04,
    request="GET /report/{user}",
    threads=(
        ThreadStack("MainThread", (SourceLine("app/main.py", 7, "serve"), LINE)),
        ThreadStack("pool_0", (SourceLine("queue.py", 3, "get"),)),
        ThreadStack("native", ()),
        ThreadStack("pool_1", (SourceLine("queue.py", 3, "get"),)),
        ThreadStack("pool_2", (SourceLine("queue.py", 3, "get"),)),
    ),
)


def test_the_text_of_a_hang() -> None:
    """Every stack once, the loop's first: a pool's idle threads all stand at the same place."""
    assert str(HANG).splitlines() == [
        "the loop has been blocked for 10.0 s by GET /report/{user}, and still is",
        "  thread MainThread, innermost call last:",
        "    app/main.py:7 in serve",
        "    app/routes.py:42 in report: requests.get(url)",
        "  thread pool_0 and 2 more, innermost call last:",
        "    queue.py:3 in get",
        "  thread native, innermost call last:",
        "    no Python code",
    ]
    nobodys = dataclasses.replace(HANG, request=None, threads=())
    assert str(nobodys) == "the loop has been blocked for 10.0 s by code outside any request, and still is"


TIMEOUT = TimeoutReport(
    id=1,
    noticed=0.0,
    request="GET /report/{user}",
    path="/report/7",
    clock="response",
    limit=30.0,
    elapsed=30.004,
    line=LINE,
    stack=(LINE,),
    loop_time=0.25,
    outcome="stopped",
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "got no answer in 30.0 s; awaiting app/routes.py:42 in report: requests.get(url)"),
        ({"line": None, "stack": ()}, "got no answer in 30.0 s"),
        (
            {"stack": ()},
            "got no answer in 30.0 s; in the endpoint app/routes.py:42 in report: requests.get(url)",
        ),
        ({"line": None, "outcome": "thread"}, "got no answer in 30.0 s; it runs on in its thread"),
        (
            {"line": None, "outcome": "shielded"},
            "got no answer in 30.0 s; it is shielded from cancellation and runs on",
        ),
        (
            {"line": None, "outcome": "running"},
            "got no answer in 30.0 s; it was cancelled, and runs on",
        ),
        (
            {"line": None, "clock": "idle", "limit": 0.25},
            "was cut off: nothing of its response was sent for 0.25 s",
        ),
        ({"line": None, "clock": "body", "limit": 1.0}, "was refused: its body did not come in 1.0 s"),
    ],
)
def test_the_sentence_of_a_request_that_ran_out_of_time(changes: dict[str, Any], expected: str) -> None:
    timeout = dataclasses.replace(TIMEOUT, **changes)
    assert str(timeout) == f"GET /report/{{user}} {expected}"
    assert str(timeout).startswith(timeout.headline)


def test_a_source_line_without_its_text() -> None:
    assert str(SourceLine("<string>", 3, "f")) == "<string>:3 in f"


@pytest.mark.parametrize(
    "event",
    [
        report(),
        LINE,
        Victim("GET /a", 1.0),
        BUSY,
        HANG,
        TIMEOUT,
        StackSample((LINE,), 0.5),
        StallHistogram((0.1,), (1, 2), 3.0),
        ThreadStack("MainThread", (LINE,)),
        Advice("Rest", "cures/#rest"),
        InFlight("GET /a", 1.0, LINE),
        BlockedLine(LINE, "f", ("GET /a",), 1, 1.0, 1.0, 0, None),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_are_values(event: Any) -> None:
    assert pickle.loads(pickle.dumps(event)) == event
    assert hash(event) == hash(dataclasses.replace(event))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, dataclasses.fields(event)[0].name, None)


def test_all_events_are_public() -> None:
    classes = {name for name, value in vars(events).items() if dataclasses.is_dataclass(value)}
    assert classes == set(events.__all__) - {"Cause", "SharedState", "TimeoutClock", "Windows"}
    assert issubclass(Windows, tuple)
