"""Which clock of a request runs, and when it will have run out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncguard.timeouts._clocks import Clocks, Due

BEGAN = 1000.0


def clocks(**changes: Any) -> Clocks:
    return Clocks(**({"response": 30.0, "idle": 60.0, "body": 20.0, "began": BEGAN} | changes))


def started(at: float = BEGAN, **changes: Any) -> Clocks:
    """Those of a response whose beginning the server has taken by then."""
    made = clocks(**changes)
    made.started = True
    made.hand_over()
    made.handed_over(at)
    return made


# -- the response clock ------------------------------------------------------------------------------


def test_until_the_response_begins_the_response_clock_runs() -> None:
    assert clocks().due() == Due(BEGAN + 30, "response", 30.0)


def test_a_clock_without_a_limit_never_runs_out() -> None:
    off = clocks(response=math.inf, idle=math.inf, body=math.inf)
    assert off.due() == Due(math.inf, "response", math.inf)
    assert off.left(BEGAN + 1e9) == math.inf
    off.await_body(BEGAN)
    assert off.due() == Due(math.inf, "body", math.inf)
    off.receive_body(0, BEGAN + 1e6)
    off.await_body(BEGAN + 1e6)
    assert off.due() == Due(math.inf, "body", math.inf)
    off.receive_body(0, BEGAN + 2e6)
    off.started = True
    assert off.handed_over(BEGAN + 3e6) == math.inf
    assert off.due() == Due(math.inf, "idle", math.inf)
    off.await_body(BEGAN + 3e6)
    assert off.due() == Due(math.inf, "idle", math.inf)


@pytest.mark.parametrize("limit", [1.0, 90.0, math.inf])
def test_another_limit_counts_from_the_beginning_too(limit: float) -> None:
    retuned = clocks()
    retuned.response = limit
    assert retuned.due() == Due(BEGAN + limit, "response", limit)
    assert retuned.left(BEGAN + 1) == limit - 1


@pytest.mark.parametrize(("passed", "left"), [(0, 30), (12, 18), (30, 0), (31, 0)])
def test_what_is_left(passed: float, left: float) -> None:
    assert clocks().left(BEGAN + passed) == left


@pytest.mark.parametrize("over", ["started", "complete"])
def test_nothing_counts_down_once_the_response_has_begun(over: str) -> None:
    made = clocks()
    made.caller = 1
    setattr(made, over, True)
    assert made.left(BEGAN + 100) == math.inf


# -- the body clock ----------------------------------------------------------------------------------


def test_while_the_body_is_awaited_the_body_clock_runs() -> None:
    made = clocks()
    assert made.await_body(BEGAN + 3) == BEGAN + 23
    assert made.due() == Due(BEGAN + 23, "body", 20.0)


def test_the_response_clock_stands_while_the_body_is_awaited() -> None:
    made = clocks()
    made.await_body(BEGAN + 3)
    assert [made.left(BEGAN + passed) for passed in (3, 10, 22)] == [27, 27, 27]
    made.receive_body(0, BEGAN + 10)
    assert made.due() == Due(BEGAN + 37, "response", 30.0)
    assert made.left(BEGAN + 10) == 27
    assert made.left(BEGAN + 12) == 25


def test_every_wait_for_the_body_puts_the_response_off() -> None:
    made = clocks()
    for at in (0, 10, 20):
        made.await_body(BEGAN + at)
        made.receive_body(10_000, BEGAN + at + 4)
    assert made.due() == Due(BEGAN + 42, "response", 30.0)


def test_silence_uses_patience_up_over_several_waits() -> None:
    made = clocks()
    made.await_body(BEGAN)
    made.receive_body(0, BEGAN + 15)
    assert made.await_body(BEGAN + 16) == BEGAN + 21
    assert made.due() == Due(BEGAN + 21, "body", 20.0)


def test_a_trickle_runs_out_of_patience() -> None:
    """A byte every five seconds: never silent for long, and refused all the same."""
    made, now = clocks(), BEGAN
    for _ in range(100):
        made.await_body(now)
        if made.due().at <= now + 5:
            break
        now += 5
        made.receive_body(1, now)
    assert now <= BEGAN + 20
    assert made.due().clock == "body"


def test_who_sends_500_bytes_a_second_is_never_out_of_patience() -> None:
    made, now = clocks(), BEGAN
    for _ in range(100):
        made.await_body(now)
        assert made.due() == Due(now + 20, "body", 20.0)
        now += 5
        made.receive_body(2500, now)


def test_bytes_restore_patience() -> None:
    made = clocks()
    made.await_body(BEGAN)
    made.receive_body(0, BEGAN + 18)
    made.await_body(BEGAN + 18)
    made.receive_body(2000, BEGAN + 19)
    made.await_body(BEGAN + 19)
    assert made.due() == Due(BEGAN + 19 + 5, "body", 20.0)


def test_no_more_patience_than_there_was_at_first() -> None:
    made = clocks()
    made.await_body(BEGAN)
    made.receive_body(1_000_000, BEGAN + 1)
    made.await_body(BEGAN + 1)
    assert made.due() == Due(BEGAN + 21, "body", 20.0)


def test_the_body_clock_runs_until_the_last_of_two_who_wait_has_something() -> None:
    made = clocks()
    made.await_body(BEGAN + 1)
    made.await_body(BEGAN + 6)
    assert made.due() == Due(BEGAN + 21, "body", 20.0)
    made.receive_body(0, BEGAN + 8)
    assert made.due() == Due(BEGAN + 21, "body", 20.0)  # one still waits, and silence has lasted
    made.receive_body(0, BEGAN + 11)
    assert made.due() == Due(BEGAN + 40, "response", 30.0)
    assert made.left(BEGAN + 11) == 29


def test_two_who_wait_at_once_are_waiting_once() -> None:
    """What is waited for is the same body: its time is not counted twice."""
    made, alone = clocks(), clocks()
    for waiting in (made, alone):
        waiting.await_body(BEGAN)
    made.await_body(BEGAN)
    made.receive_body(500, BEGAN + 4)
    for waiting in (made, alone):
        waiting.receive_body(500, BEGAN + 10)
    assert made.due() == alone.due() == Due(BEGAN + 40, "response", 30.0)


def test_a_piece_for_one_of_two_restores_patience_for_the_other() -> None:
    made = clocks()
    made.await_body(BEGAN)
    made.await_body(BEGAN)
    made.receive_body(1000, BEGAN + 10)
    assert made.due() == Due(BEGAN + 10 + 12, "body", 20.0)


# -- the idle clock ----------------------------------------------------------------------------------


def test_from_the_beginning_of_the_response_the_idle_clock_runs() -> None:
    assert started(BEGAN + 7).due() == Due(BEGAN + 67, "idle", 60.0)


def test_the_idle_clock_stands_while_the_server_takes_what_was_sent() -> None:
    made = started()
    made.hand_over()
    assert made.due() == Due(math.inf, "idle", 60.0)
    assert made.handed_over(BEGAN + 500) == BEGAN + 560
    assert made.due() == Due(BEGAN + 560, "idle", 60.0)


def test_the_idle_clock_stands_until_the_server_has_taken_the_beginning() -> None:
    made = clocks()
    made.started = True
    assert made.due() == Due(math.inf, "idle", 60.0)


def test_a_body_awaited_after_the_response_has_begun_ends_nothing_that_is_still_sending() -> None:
    """Who waits for the body may be a listener for the client's leaving, and not who makes the response."""
    made = started(BEGAN + 1)
    made.await_body(BEGAN + 2)
    assert made.due() == Due(BEGAN + 61, "idle", 60.0)
    made.receive_body(5000, BEGAN + 12)
    assert made.due() == Due(BEGAN + 61, "idle", 60.0)


def test_a_response_that_waits_for_the_body_may_be_silent_for_as_long_as_the_body_may() -> None:
    """It echoes what comes in."""
    made = started(BEGAN + 1, idle=5.0)
    made.await_body(BEGAN + 2)
    assert made.due() == Due(BEGAN + 22, "idle", 5.0)
    made.receive_body(5000, BEGAN + 12)
    assert made.due() == Due(BEGAN + 6, "idle", 5.0)
    made.handed_over(BEGAN + 12)
    assert made.due() == Due(BEGAN + 17, "idle", 5.0)


def test_a_piece_of_the_body_does_not_start_the_idle_clock_while_the_server_takes_one() -> None:
    """One task sends, another receives."""
    made = started()
    made.await_body(BEGAN)
    made.hand_over()
    made.receive_body(10, BEGAN + 5)
    assert made.due() == Due(math.inf, "idle", 60.0)


def test_once_the_response_is_complete_no_clock_runs() -> None:
    for made in (clocks(), started()):
        made.complete = True
        assert made.due().at == math.inf
        made.await_body(BEGAN)
        assert made.due().at == math.inf


# -- the caller --------------------------------------------------------------------------------------


def test_a_caller_in_a_hurry_shortens_the_response_clock() -> None:
    made = clocks()
    made.caller = 5
    assert made.due() == Due(BEGAN + 5, "response", 5.0)
    assert made.left(BEGAN + 1) == 4


def test_a_patient_caller_does_not_lengthen_it() -> None:
    made = clocks()
    made.caller = 500
    assert made.due() == Due(BEGAN + 30, "response", 30.0)
    assert made.left(BEGAN + 1) == 29


def test_a_caller_who_waits_no_longer_is_answered_at_once() -> None:
    made = clocks()
    made.caller = 0
    assert made.due() == Due(BEGAN, "response", 0.0)
    assert made.left(BEGAN) == 0


def test_for_the_caller_the_time_of_the_body_counts() -> None:
    made = clocks()
    made.caller = 10
    made.await_body(BEGAN)
    assert made.due() == Due(BEGAN + 10, "response", 10.0)
    assert made.left(BEGAN + 4) == 6
    made.receive_body(10, BEGAN + 4)
    assert made.due() == Due(BEGAN + 10, "response", 10.0)
    assert made.left(BEGAN + 4) == 6


def test_a_body_that_is_given_up_before_the_caller_gives_up() -> None:
    made = clocks()
    made.caller = 25
    made.await_body(BEGAN)
    assert made.due() == Due(BEGAN + 20, "body", 20.0)


def test_a_response_that_has_begun_is_not_ended_for_the_caller() -> None:
    made = clocks()
    made.caller = 5
    made.started = True
    made.handed_over(BEGAN + 4)
    assert made.due() == Due(BEGAN + 64, "idle", 60.0)
    made.await_body(BEGAN + 4)
    assert made.due() == Due(BEGAN + 64, "idle", 60.0)


# -- in any state ------------------------------------------------------------------------------------

# Quarters of seconds, and bytes that are worth such: sums of them are exact.
spans = st.integers(0, 400).map(lambda number: number / 4)
limits = st.one_of(st.just(math.inf), spans.filter(bool))
steps = st.lists(
    st.tuples(
        st.sampled_from(["await_body", "receive_body", "start", "hand_over", "handed_over"]),
        spans,
        st.integers(0, 40).map(lambda number: number * 125),
    ),
    max_size=8,
)


@st.composite
def states(draw: st.DrawFn) -> tuple[Clocks, float, int]:
    """The clocks of a request to which anything has happened, the time, and how many await the body."""
    made = Clocks(draw(limits), draw(limits), draw(limits), BEGAN)
    made.caller = draw(limits)
    now, waiting = BEGAN, 0
    for kind, passed, size in draw(steps):
        now += passed
        if kind == "await_body":
            made.await_body(now)
            waiting += 1
        elif kind == "receive_body" and waiting:
            made.receive_body(size, now)
            waiting -= 1
        elif kind == "start":
            made.started = True
        elif kind == "hand_over" and made.started:
            made.hand_over()
        elif kind == "handed_over" and made.started:
            made.handed_over(now)
    return made, now, waiting


State = tuple[Clocks, float, int]


@given(states(), spans)
def test_what_is_left_agrees_with_what_is_due_unless_the_body_is_awaited(state: State, passed: float) -> None:
    made, now, waiting = state
    due = made.due()
    if not waiting and not made.started:
        assert due.clock == "response"
        assert made.left(now + passed) == max(0.0, due.at - now - passed)


@given(states(), spans)
def test_while_the_body_is_awaited_no_more_is_left_than_the_caller_waits(state: State, passed: float) -> None:
    made, now, _ = state
    made.await_body(now)
    if not made.started:
        assert made.left(now + passed) <= made.response
        assert made.left(now + passed) <= max(0.0, BEGAN + made.caller - now - passed)


@given(states())
def test_the_limit_that_is_told_is_that_of_the_clock(state: State) -> None:
    made, _, waiting = state
    due = made.due()
    if made.started:
        assert (due.clock, due.limit) == ("idle", made.idle)
    elif due.clock == "body":
        assert waiting
        assert due.limit == made.body
    else:
        assert due.limit == made.caller or (due.limit == made.response and not waiting)


@given(states(), spans)
def test_time_in_a_debugger_has_not_passed(state: State, seconds: float) -> None:
    made, now, _ = state
    due, left = made.due(), made.left(now)
    made.postpone(seconds)
    assert made.due() == (due.at + seconds, due.clock, due.limit)
    assert made.left(now + seconds) == left


@given(states(), spans, spans)
def test_time_in_a_debugger_is_not_the_clients_when_the_body_comes(
    state: State, seconds: float, passed: float
) -> None:
    """As if everything had come as much later."""
    made, now, _ = state
    made.await_body(now)
    undisturbed = copy.copy(made)
    made.postpone(seconds)
    made.receive_body(500, now + seconds + passed)
    undisturbed.receive_body(500, now + passed)
    due = undisturbed.due()
    assert made.due() == (due.at + seconds, due.clock, due.limit)
    assert made.left(now + seconds + passed) == undisturbed.left(now + passed)


@given(states(), spans)
def test_no_wait_is_longer_than_the_limit_of_its_clock(state: State, passed: float) -> None:
    made, now, _ = state
    until = made.await_body(now + passed)
    assert until <= now + passed + made.body
    if not made.started:
        assert made.due().at <= until
    silent_until = made.handed_over(now + passed)
    assert silent_until == now + passed + made.idle
    made.started = True
    assert made.due().at >= silent_until
    assert made.due().at <= max(silent_until, until)
