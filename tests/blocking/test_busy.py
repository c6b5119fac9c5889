"""Requests that hold the loop in small pieces: what is added up, over which window, and at which line."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest

from asyncguard._request import RequestRecord
from asyncguard.blocking import _busy
from asyncguard.blocking._busy import BusyTime, report_busy
from asyncguard.blocking._hang import Hang
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._stall import Stall
from asyncguard.blocking._watch import LoopWatch
from tests.driving import driven

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio

PIECE = 0.0625
"""A power of two: sums of it are exact."""


def record(coroutine: Coroutine[Any, Any, Any] | None = None) -> RequestRecord:
    found = RequestRecord({"type": "http", "method": "GET", "path": "/feed"}, 100.0)
    found.coroutine = coroutine
    return found


# -- the sum of one request --------------------------------------------------------------------------


def test_turns_are_added_up() -> None:
    busy = BusyTime(record(), 100.0, 1.0)
    assert busy.ends == 110.0
    for held in (0.25, 0.5, 0.25):
        busy.add(held)
    assert (busy.seconds, busy.turns, busy.longest) == (1.0, 3, 0.5)


async def first_and_second() -> None:
    await asyncio.sleep(0)  # first
    await by_way_of_another()


async def by_way_of_another() -> None:
    for _ in range(2):
        await asyncio.sleep(0)  # second


def test_the_line_at_which_most_was_given_back(marked: Callable[[str], int]) -> None:
    """The user's innermost one: what it awaits there is a library's."""
    running = first_and_second()
    busy = BusyTime(record(running), 100.0, 1.0)
    assert busy.line(None) is None
    running.send(None)
    busy.add(0.5)
    line = busy.line(None)
    assert line is not None
    assert (line.line, line.function) == (marked("first"), "first_and_second")
    for _ in range(2):
        running.send(None)
        busy.add(0.375)
    line = busy.line(None)
    assert line is not None
    assert (line.line, line.function) == (marked("second"), "by_way_of_another")
    assert busy.line("/no/such/root") is None
    running.close()


def test_a_request_that_awaits_nothing_has_no_line() -> None:
    busy = BusyTime(record(), 100.0, 1.0)
    busy.add(2.0)
    assert busy.line(None) is None


def test_the_places_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given back at others still counts, only not to a line."""
    monkeypatch.setattr(_busy, "_MOST_PLACES", 1)
    running = first_and_second()
    busy = BusyTime(record(running), 100.0, 1.0)
    running.send(None)
    for _ in range(2):
        busy.add(0.25)
    running.send(None)
    busy.add(5.0)
    assert len(busy._places) == 1
    assert list(busy._places.values()) == [0.5]
    assert busy.seconds == 5.5
    running.close()


def test_the_report(marked: Callable[[str], int]) -> None:
    running = first_and_second()
    busy = BusyTime(record(running), 100.0, 1.0)
    running.send(None)
    for held in (0.5, 0.75):
        busy.add(held)
    report = report_busy(busy, 104.0, None)
    assert (report.request, report.loop_time, report.window) == ("GET /feed", 1.25, 4.0)
    assert (report.turns, report.longest) == (2, 0.75)
    assert report.line is not None
    assert report.line.line == marked("first")
    assert report.advice.docs == "cures/#busy-requests"
    assert report_busy(busy, 104.0, None).id == report.id + 1
    running.close()


# -- on the loop -------------------------------------------------------------------------------------


class Ear:
    """A listener that keeps what it hears of busy requests."""

    threshold = 1000.0
    hang_after = math.inf
    aborts = False

    def __init__(self, busy_threshold: float) -> None:
        self.busy_threshold = busy_threshold
        self.heard: list[tuple[str, float, float]] = []

    def hear_stall(self, stall: Stall) -> None: ...
    def hear_hang(self, hang: Hang) -> None: ...
    def miss_stall(self) -> None: ...
    def sum_up(self) -> None: ...

    def hear_busy(self, busy: BusyTime, ended: float) -> None:
        self.heard.append((busy.record.label, busy.seconds, ended - busy.began))


@asynccontextmanager
async def watching(*ears: Ear) -> AsyncIterator[LoopWatch]:
    watch = LoopWatch(running_loop(), 1000.0)
    for ear in ears:
        watch.listen(ear)
    await anyio.lowlevel.checkpoint()
    yield watch
    assert watch.busy == {}
    for ear in ears:
        assert watch.unlisten(ear).wait(30)


async def serve(watch: LoopWatch, work: Callable[[], Coroutine[Any, Any, None]], clock: TurnedClock) -> None:
    """What the middleware does with a request."""
    served = RequestRecord({"type": "http", "method": "GET", "path": "/feed"}, clock.now)
    served.coroutine = work()
    await driven(served.coroutine, served, watch)
    watch.end_busy(served)


async def hold(clock: TurnedClock, pieces: int, held: float = PIECE, idle: float = 0.0) -> None:
    """Turns of `held` seconds each, with pauses of `idle` seconds in which the loop is free."""
    for _ in range(pieces):
        clock.turn(held)
        await anyio.lowlevel.checkpoint()
        if idle:
            clock.now += idle


@pytest.mark.parametrize(("pieces", "heard"), [(16, True), (15, False)])
async def test_pieces_that_are_too_much_together(clock: TurnedClock, pieces: int, heard: bool) -> None:
    ear = Ear(1.0)
    async with watching(ear) as watch:
        await serve(watch, functools.partial(hold, clock, pieces), clock)
    assert ear.heard == [("GET /feed", pieces * PIECE, pieces * PIECE)] * heard


@pytest.mark.parametrize(("held", "heard"), [(0.015, []), (0.0234375, [("GET /feed", 0.0234375, 0.0234375)])])
async def test_a_single_piece_counts_once(
    clock: TurnedClock, held: float, heard: list[tuple[str, float, float]]
) -> None:
    """It may be most of what is too much, where that is less than a stall."""
    ear = Ear(0.0234375)
    async with watching(ear) as watch:
        await serve(watch, functools.partial(hold, clock, 1, held), clock)
    assert ear.heard == heard


async def test_a_stall_is_no_small_piece(clock: TurnedClock) -> None:
    """It is reported as what it is, and not a second time here."""

    async def work() -> None:
        await hold(clock, 1, 5000.0)
        await hold(clock, 15)
        await hold(clock, 1, 2000.0)

    ear = Ear(1.0)
    async with watching(ear) as watch:
        await serve(watch, work, clock)
    assert ear.heard == []


async def test_a_request_is_reported_once(clock: TurnedClock) -> None:
    """As soon as a window shows that it is too much; what lives long would be reported again and again."""

    async def work() -> None:
        for _ in range(3):
            await hold(clock, 32)
            clock.now += 20.0
            await hold(clock, 1)

    ear = Ear(1.0)
    async with watching(ear) as watch:
        await serve(watch, work, clock)
    assert ear.heard == [("GET /feed", 2.0, 10.0)]


async def test_a_long_life_is_no_fault(clock: TurnedClock) -> None:
    """Less than a tenth of the loop, however long: each window is looked at by itself."""

    async def work() -> None:
        for _ in range(10):
            await hold(clock, 12)
            clock.now += 20.0
            await hold(clock, 1)

    ear = Ear(1.0)
    async with watching(ear) as watch:
        await serve(watch, work, clock)
    assert ear.heard == []


async def test_each_listener_has_its_limit(clock: TurnedClock) -> None:
    ears = Ear(0.5), Ear(2.0), Ear(math.inf)
    async with watching(*ears) as watch:
        assert watch.busy_after == 0.25
        await serve(watch, functools.partial(hold, clock, 16), clock)
    assert [len(ear.heard) for ear in ears] == [1, 0, 0]


async def test_where_nobody_asks_nothing_is_added_up(clock: TurnedClock) -> None:
    ear = Ear(math.inf)
    async with watching(ear) as watch:
        assert watch.busy_after == math.inf

        async def work() -> None:
            await hold(clock, 100)
            assert watch.busy == {}

        await serve(watch, work, clock)
    assert ear.heard == []


async def test_whoever_asks_leaves_while_a_request_runs(clock: TurnedClock) -> None:
    """Those that are left never wanted to hear of it."""
    leaving, left = Ear(1.0), Ear(math.inf)
    async with watching(leaving, left) as watch:

        async def work() -> None:
            watch.unlisten(leaving)
            await hold(clock, 40)

        await serve(watch, work, clock)
    assert (leaving.heard, left.heard) == ([], [])
