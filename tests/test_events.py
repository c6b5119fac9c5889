"""The events that hooks receive, and the sentence that the log shows."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from asyncguard import events
from asyncguard.events import Advice, BlockedLine, BlockReport, InFlight, SourceLine, Victim
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


def test_a_source_line_without_its_text() -> None:
    assert str(SourceLine("<string>", 3, "f")) == "<string>:3 in f"


@pytest.mark.parametrize(
    "event",
    [
        report(),
        LINE,
        Victim("GET /a", 1.0),
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
    assert classes == set(events.__all__) - {"Cause"}
