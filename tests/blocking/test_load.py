"""Utilisation and lag over windows: what the sums grew by between now and the window's beginning."""

from __future__ import annotations

import pytest

from asyncguard.blocking._load import LoopLoad
from asyncguard.events import Windows


def hold(load: LoopLoad, seconds: float) -> None:
    load.busy += seconds
    load.delay += seconds * seconds / 2


def test_right_at_the_start_there_is_nothing() -> None:
    load = LoopLoad(1000.0)
    assert load.utilisation(1000.0, 0.0) == Windows(0, 0, 0)
    assert load.lag(1000.0, 0.0) == Windows(0, 0, 0)


def test_windows_are_as_long_as_there_was_time() -> None:
    load = LoopLoad(1000.0)
    hold(load, 0.25)
    assert load.utilisation(1000.5, 0.0) == pytest.approx((0.5, 0.5, 0.5))
    assert load.lag(1000.5, 0.0) == pytest.approx((0.0625, 0.0625, 0.0625))


def test_each_window_has_what_came_in_it() -> None:
    """Busy for 1 s in the first 50, for 2 in the next 9, for 0.5 in the last."""
    load = LoopLoad(1000.0)
    hold(load, 1.0)
    load.mark(1050.0)
    hold(load, 2.0)
    load.mark(1059.0)
    hold(load, 0.5)
    utilisation = load.utilisation(1060.0, 0.0)
    assert utilisation == pytest.approx((0.5, 0.25, 3.5 / 60))
    lag = load.lag(1060.0, 0.0)
    assert lag == pytest.approx((0.125, (2.0 + 0.125) / 10, (0.5 + 2.0 + 0.125) / 60))


def test_what_is_older_than_a_window_is_out_of_it() -> None:
    load = LoopLoad(1000.0)
    hold(load, 1.0)
    load.mark(1001.0)
    load.mark(1101.0)
    assert load.utilisation(1102.0, 0.0) == Windows(0, 0, 0)
    assert load.lag(1102.0, 0.0) == Windows(0, 0, 0)


def test_between_two_marks_the_sums_grow_evenly() -> None:
    load = LoopLoad(1000.0)
    load.busy, load.delay = 2.0, 4.0
    load.mark(1004.0)
    # The window of one second begins at 1003.5: an eighth of both sums is in its first half.
    assert load.utilisation(1004.5, 0.0).last_1s == pytest.approx(0.25)
    assert load.lag(1004.5, 0.0).last_1s == pytest.approx(0.5)


def test_what_still_holds_the_loop_counts() -> None:
    load = LoopLoad(1000.0)
    assert load.utilisation(1010.0, 5.0).last_10s == pytest.approx(0.5)
    assert load.lag(1010.0, 5.0).last_10s == pytest.approx(1.25)


def test_a_loop_that_is_always_busy_is_so_to_one() -> None:
    load = LoopLoad(1000.0)
    load.mark(1009.0)
    hold(load, 5.0)  # told of at its end only
    assert load.utilisation(1010.0, 0.0) == Windows(1.0, 0.5, 0.5)


def test_a_sum_that_was_estimated_too_high_does_not_count_backwards() -> None:
    load = LoopLoad(1000.0)
    load.busy, load.delay = 3.0, 3.0
    load.mark(1005.0)
    load.busy, load.delay = 2.0, 2.0
    assert load.utilisation(1006.0, 0.0).last_1s == 0.0
    assert load.lag(1006.0, 0.0).last_1s == 0.0


def test_marks_are_not_made_more_often_than_needed() -> None:
    load = LoopLoad(1000.0)
    load.mark(1000.25)
    load.busy = 1.0
    load.mark(1000.25)  # too soon
    # The sum seems to have grown evenly from the start on.
    assert load.utilisation(1002.0, 0.0).last_1s == pytest.approx(0.5)
    # At once: the loop begins to run again after a rest, and what it had not done is not spread over it.
    load = LoopLoad(1000.0)
    load.mark(1000.25)
    load.mark(1001.75, at_once=True)
    load.mark(1001.8, at_once=True)
    load.busy = 0.2
    assert load.utilisation(1002.0, 0.0).last_1s == pytest.approx(0.2)
    assert load.utilisation(1001.9, 0.0).last_1s == pytest.approx(0.2)


def test_marks_reach_back_a_minute_and_are_bounded() -> None:
    load = LoopLoad(0.0)
    for half_seconds in range(1, 10_000):
        load.busy += 0.1
        load.mark(half_seconds / 2)
    assert len(load._marks) <= 122
    now = 9_999 / 2
    assert load.utilisation(now, 0.0) == pytest.approx((0.2, 0.2, 0.2), abs=0.001)
