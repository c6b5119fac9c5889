"""What a pool counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncguard.offloading._tally import BOUNDS, Tally

seconds = st.floats(0, 1000)


def test_in_the_beginning_there_is_nothing() -> None:
    tally = Tally()
    assert tally.waits == tally.runs == [0] * (len(BOUNDS) + 1)
    assert (tally.waited, tally.ran_for) == (0, 0)
    counts = ("calls", "refused", "timeouts", "cancelled", "crashes", "kills", "respawns", "recycled")
    assert [getattr(tally, name) for name in counts] == [0] * len(counts)


def test_before_any_call_has_ended_one_is_taken_to_run_for_a_second() -> None:
    assert Tally().mean_run == 1.0


def test_for_how_long_a_call_runs() -> None:
    tally = Tally()
    tally.ran(100, 2)
    tally.ran(0, 4)
    assert tally.mean_run == 3
    assert (tally.waited, tally.ran_for) == (100, 6)


@pytest.mark.parametrize(("index", "bound"), [*enumerate(BOUNDS)])
def test_a_bound_belongs_to_the_class_below_it(index: int, bound: float) -> None:
    tally = Tally()
    tally.ran(bound, bound * 1.001)
    assert [number for number, count in enumerate(tally.waits) if count] == [index]
    assert [number for number, count in enumerate(tally.runs) if count] == [index + 1]


@given(st.lists(st.tuples(seconds, seconds)))
def test_each_call_is_in_one_class_of_each_kind(calls: list[tuple[float, float]]) -> None:
    tally = Tally()
    for wait, run in calls:
        tally.ran(wait, run)
    assert tally.calls == len(calls) == sum(tally.waits) == sum(tally.runs)
    for counts, durations in (
        (tally.waits, [wait for wait, _ in calls]),
        (tally.runs, [run for _, run in calls]),
    ):
        for index, bound in enumerate(BOUNDS):
            assert sum(counts[: index + 1]) == sum(duration <= bound for duration in durations)
    assert tally.waited == pytest.approx(sum(wait for wait, _ in calls))
    assert tally.ran_for == pytest.approx(sum(run for _, run in calls))
