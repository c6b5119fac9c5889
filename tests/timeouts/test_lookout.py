"""One timer looks after all requests that have the same limit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from asyncguard import _clock
from asyncguard.timeouts._lookout import Lookout
from asyncguard.timeouts._loops import running_loop

if TYPE_CHECKING:
    from tests.conftest import TurnedClock


class Timers:
    """What a lookout asks of its loop; a timer fires when the clock is turned that far."""

    def __init__(self, clock: TurnedClock) -> None:
        self.set: list[float] = []
        """Each delay that was asked for."""
        self._clock = clock
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        self.set.append(delay)
        assert len(self.set) < 100, "it sets its timer again and again"
        self._timers.append((self._clock.now + delay, call))
        assert len(self._timers) == 1, "there is one timer at most"

    @property
    def waiting(self) -> int:
        return len(self._timers)

    def fire(self) -> None:
        """Whether it is time or not."""
        self._timers.pop()[1]()

    def turn(self, seconds: float) -> None:
        end = self._clock.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self._clock.now = max(self._clock.now, self._timers[0][0])
            self.fire()
        self._clock.now = end


@pytest.fixture
def timers(clock: TurnedClock) -> Timers:
    return Timers(clock)


def make_lookout(timers: Timers, seconds: float) -> Lookout:
    loop: Any = timers
    return Lookout(loop, seconds)


class Request:
    """Takes down that it was looked after."""

    def __init__(self, name: str, looked: list[str], then: Callable[[], object] = lambda: None) -> None:
        self._name = name
        self._looked = looked
        self._then = then

    def look(self) -> None:
        self._looked.append(self._name)
        if len(self._looked) > 100:
            pytest.fail("it is looked after for ever")
        self._then()


def test_a_request_is_looked_after_once_when_its_seconds_have_passed(
    timers: Timers, clock: TurnedClock
) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    assert lookout.add(Request("it", looked), _clock.monotonic()) == clock.now + 5
    timers.turn(4.75)
    assert looked == []
    timers.turn(0.25)
    assert looked == ["it"]
    timers.turn(100)
    assert looked == ["it"]


def test_one_timer_for_all_in_the_order_in_which_they_came(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    for number in range(4):
        lookout.add(Request(str(number), looked), _clock.monotonic())
        timers.turn(1)
    assert timers.set == [5.0]
    for number in range(1, 5):
        timers.turn(1)
        assert looked == [str(n) for n in range(number)]
    # After the first the timer is set for what is left to the next, and after the last no more.
    assert timers.set == [5.0, 1.0, 1.0, 1.0]
    assert not timers.waiting


def test_those_that_came_at_once_are_looked_after_at_once(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    for name in "abc":
        lookout.add(Request(name, looked), _clock.monotonic())
    timers.turn(5)
    assert looked == ["a", "b", "c"]
    assert timers.set == [5.0]


def test_a_timer_that_comes_late_looks_after_all_that_are_due(timers: Timers, clock: TurnedClock) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    for name in "abc":
        lookout.add(Request(name, looked), _clock.monotonic())
        clock.turn(2)
    clock.turn(1)  # 7 seconds after the first: something has held the loop
    timers.turn(0)
    assert looked == ["a", "b"]
    timers.turn(2)
    assert looked == ["a", "b", "c"]


def test_a_timer_that_comes_early_waits_for_the_rest(timers: Timers, clock: TurnedClock) -> None:
    """As uvloop's do, which count whole milliseconds."""
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    lookout.add(Request("it", looked), _clock.monotonic())
    clock.turn(4.75)
    timers.fire()
    assert looked == []
    assert timers.set == [5.0, 0.25]
    timers.turn(0.25)
    assert looked == ["it"]


def test_who_is_removed_is_not_looked_after(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    first, second, third = (Request(name, looked) for name in ("first", "second", "third"))
    for request in (first, second, third):
        lookout.add(request, _clock.monotonic())
    lookout.remove(second)
    timers.turn(5)
    assert looked == ["first", "third"]
    for request in (first, second):
        lookout.remove(request)  # it is known no more, and no harm is done
    timers.turn(100)
    assert looked == ["first", "third"]


def test_without_requests_the_timer_ends_and_the_next_one_sets_another(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    first = Request("first", looked)
    lookout.add(first, _clock.monotonic())
    timers.turn(3)
    lookout.remove(first)
    timers.turn(3)
    assert not timers.waiting
    lookout.add(Request("second", looked), _clock.monotonic())
    assert timers.set == [5.0, 5.0]
    timers.turn(5)
    assert looked == ["second"]


def test_who_comes_while_the_timer_of_one_that_is_gone_runs_is_waited_for_in_full(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    first = Request("first", looked)
    lookout.add(first, _clock.monotonic())
    lookout.remove(first)
    timers.turn(3)
    lookout.add(Request("second", looked), _clock.monotonic())
    timers.turn(4.75)
    assert looked == []
    timers.turn(0.25)
    assert looked == ["second"]
    assert timers.set == [5.0, 3.0]


def test_a_look_that_fails_is_logged_and_the_others_are_looked_after(
    timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise LookupError("no such request")

    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    lookout.add(Request("fails", looked, fail), _clock.monotonic())
    lookout.add(Request("at once", looked), _clock.monotonic())
    timers.turn(1)
    lookout.add(Request("later", looked), _clock.monotonic())
    timers.turn(5)
    assert looked == ["fails", "at once", "later"]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asyncguard.timeouts", logging.ERROR)
    assert record.getMessage() == "asyncguard failed at a deadline"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


def test_a_look_may_remove_and_add_others(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)
    doomed, new = Request("doomed", looked), Request("new", looked)

    def change() -> None:
        lookout.remove(doomed)
        lookout.add(new, _clock.monotonic())

    lookout.add(Request("it", looked, change), _clock.monotonic())
    lookout.add(doomed, _clock.monotonic())
    timers.turn(5)
    assert looked == ["it"]
    assert timers.waiting == 1
    timers.turn(5)
    assert looked == ["it", "new"]


def test_who_comes_again_after_a_look_is_waited_for_again(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, 5.0)

    def again() -> None:
        if len(looked) < 3:
            lookout.add(request, _clock.monotonic())

    request = Request("it", looked, again)
    lookout.add(request, _clock.monotonic())
    timers.turn(100)
    assert looked == ["it"] * 3
    assert timers.set == [5.0] * 3


def test_without_a_limit_no_timer_is_set(timers: Timers) -> None:
    looked: list[str] = []
    lookout = make_lookout(timers, math.inf)
    request = Request("it", looked)
    assert lookout.add(request, _clock.monotonic()) == math.inf
    assert timers.set == []
    timers.turn(1e9)
    assert looked == []
    lookout.remove(request)


# -- on every loop -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_on_every_loop_those_that_stay_are_looked_after_in_order() -> None:
    looked: list[str] = []
    last = anyio.Event()
    lookout = Lookout(running_loop(), 0.01)
    gone = Request("gone", looked)
    for request in (Request("first", looked), gone, Request("last", looked, last.set)):
        lookout.add(request, _clock.monotonic())
    lookout.remove(gone)
    with anyio.fail_after(30):
        await last.wait()
    assert looked == ["first", "last"]


@pytest.mark.anyio
async def test_on_every_loop_nobody_is_looked_after_before_the_clock_says_so(clock: TurnedClock) -> None:
    looked: list[str] = []
    later, due = anyio.Event(), anyio.Event()
    loop = running_loop()
    lookout = Lookout(loop, 0.005)
    lookout.add(Request("it", looked, due.set), _clock.monotonic())
    loop.call_later(0.03, later.set)  # the loop's own time passes, ours does not
    with anyio.fail_after(30):
        await later.wait()
        assert looked == []
        clock.turn(0.005)
        await due.wait()
    assert looked == ["it"]


@pytest.mark.anyio
async def test_on_every_loop_a_second_timer_follows_the_first() -> None:
    lookout = Lookout(running_loop(), 0.002)
    looked: list[str] = []
    for number in range(3):
        due = anyio.Event()
        lookout.add(Request(str(number), looked, due.set), _clock.monotonic())
        with anyio.fail_after(30):
            await due.wait()
    assert looked == ["0", "1", "2"]
