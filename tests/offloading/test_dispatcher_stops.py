"""Calls that are stopped, and what crosses that on its way, without a process. See `stage`."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from typing import Any

import pytest

from asyncguard.errors import OffloadTimeout, WorkerCrashed
from tests.offloading.stage import FakeWorker, Stage, error_of, outcome_of, value_of

Staged = Callable[..., Stage]


# -- calls that are stopped --------------------------------------------------------------------------


def test_out_of_time(staged: Staged) -> None:
    """The caller is told where it was as soon as the worker says so. Then it is interrupted."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit(2)
    stage.loop.turn(2)
    assert worker.signals == [signal.SIGUSR2]
    assert not outcome_of(job).done()
    worker.write_stack("render")
    stage.loop.turn(0.05)
    assert worker.signals == [signal.SIGUSR2, signal.SIGUSR1]
    assert worker.interrupted == job.call
    error = outcome_of(job).error
    assert isinstance(error, OffloadTimeout)
    assert "in render" in error.stack
    assert stage.counts() == (1, 0, 1, 0)  # the function may be cleaning up
    worker.answer()
    assert (stage.counts(), stage.tally.timeouts, stage.tally.kills) == ((1, 1, 0, 0), 1, 0)


def test_a_worker_that_does_not_say_where_it_is_is_not_waited_for(staged: Staged) -> None:
    stage = staged()
    stage.ready()
    job = stage.submit(2)
    stage.loop.turn(2.1)
    error = outcome_of(job).error
    assert isinstance(error, OffloadTimeout)
    assert error.stack == ""


def test_a_late_call_that_ends_before_the_stack_came_is_late(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job, following = stage.submit(2), stage.submit()
    stage.loop.turn(2)
    worker.answer()
    assert isinstance(outcome_of(job).error, OffloadTimeout)
    assert worker.calls[-1] == following.call
    worker.answer()
    assert outcome_of(following).frame is not None


def test_the_stack_of_one_call_is_not_told_of_the_next(staged: Staged) -> None:
    """It was written down after nobody waited for it any more."""
    stage = staged()
    (worker,) = stage.ready()
    stage.submit(1)
    stage.loop.turn(1.1)
    worker.write_stack("first, which has a long name")
    worker.answer()
    job = stage.submit(1)
    stage.loop.turn(1.01)
    assert not outcome_of(job).done()
    worker.write_stack("second")
    stage.loop.turn(0.1)
    error = outcome_of(job).error
    assert isinstance(error, OffloadTimeout)
    assert "in second" in error.stack
    assert "name" not in error.stack


def test_a_stack_that_was_asked_for_twice_is_the_first(staged: Staged) -> None:
    """By the second time the function is being stopped."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit(1)
    stage.loop.turn(1)
    stage.loop.turn(0.003)
    worker.write_stack("the function")
    assert job.process is not None
    job.process.ask_stack_again()
    worker.write_stack("its end")
    stage.loop.turn(0.05)
    error = outcome_of(job).error
    assert isinstance(error, OffloadTimeout)
    assert "in the function" in error.stack
    assert "its end" not in error.stack


def test_grace_then_kill(staged: Staged) -> None:
    stage = staged(grace=3)
    (worker,) = stage.ready()
    stage.cancel(stage.submit())
    assert worker.signals == [signal.SIGUSR1]
    stage.loop.turn(2.9)
    assert worker.signals == [signal.SIGUSR1]
    assert 3 < worker.repeats < 20  # the system may have given the first to another thread
    stage.loop.turn(0.2)
    assert worker.signals == [signal.SIGUSR1, signal.SIGKILL]
    assert (stage.tally.kills, stage.tally.cancelled) == (1, 1)
    following = stage.submit()
    worker.end(-signal.SIGKILL)
    stage.workers[1].get_ready().answer()
    assert outcome_of(following).frame is not None
    assert (stage.tally.crashes, stage.tally.respawns) == (0, 1)


def test_a_function_that_ends_within_the_grace_is_not_killed(staged: Staged) -> None:
    stage = staged(grace=3)
    (worker,) = stage.ready()
    stage.cancel(stage.submit())
    stage.loop.turn(2.9)
    worker.answer()
    repeats = worker.repeats
    stage.submit()
    stage.loop.turn(10)
    assert (worker.signals, worker.repeats) == ([signal.SIGUSR1], repeats)
    assert (stage.tally.kills, stage.counts()) == (0, (1, 0, 1, 0))


@pytest.mark.parametrize("late", [False, True])
def test_killed_at_once(staged: Staged, late: bool) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit(1, on_cancel="kill")
    if late:
        stage.loop.turn(1)
        assert worker.signals == [signal.SIGUSR2]
        worker.write_stack("render")
        stage.loop.turn(0.1)
        assert "in render" in error_of(job)
        assert worker.signals == [signal.SIGUSR2, signal.SIGKILL]
    else:
        stage.cancel(job)
        assert worker.signals == [signal.SIGKILL]
    assert stage.tally.kills == 1


def test_cancelled_while_the_stack_is_awaited_it_is_killed_nevertheless(staged: Staged) -> None:
    """A request and its call run out of time together."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit(1, on_cancel="kill")
    stage.loop.turn(1)
    stage.cancel(job)
    stage.loop.turn(1)
    assert worker.signals == [signal.SIGUSR2, signal.SIGKILL]
    assert stage.tally.kills == 1


@pytest.mark.parametrize("late", [False, True])
def test_abandoned(staged: Staged, late: bool) -> None:
    """It runs on, and keeps its worker busy."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit(1, on_cancel="abandon")
    if late:
        stage.loop.turn(1.1)
        assert "did not end within 1 s" in error_of(job)
    else:
        stage.cancel(job)
    stage.loop.turn(100)
    assert set(worker.signals) <= {signal.SIGUSR2}
    assert stage.counts() == (1, 0, 1, 0)
    worker.answer()
    assert (stage.counts(), stage.tally.kills) == ((1, 1, 0, 0), 0)


def test_cancelled_when_it_has_been_answered(staged: Staged) -> None:
    """Both in one turn of the loop: the worker is somebody else's already."""
    stage = staged()
    (worker,) = stage.ready()
    jobs = [stage.submit(on_cancel=on_cancel) for on_cancel in ("raise", "kill", "abandon", "raise")]
    for job in jobs[:-1]:
        worker.answer()
        stage.dispatcher.withdraw(job)
    assert (worker.signals, worker.calls[-1]) == ([], jobs[-1].call)
    worker.answer(value=1)
    assert value_of(jobs[-1]) == 1


@pytest.mark.parametrize("how", ["cancelled", "late", "out of grace"])
def test_an_answer_that_crosses_the_kill_does_not_earn_another_call(staged: Staged, how: str) -> None:
    """It lies in the socket already; the worker is dead, or will be before it reads."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit(1, on_cancel="raise" if how == "out of grace" else "kill")
    following = stage.submit()
    if how == "cancelled":
        stage.cancel(job)
    elif how == "late":
        stage.loop.turn(1.1)
    else:
        stage.cancel(job)
        stage.loop.turn(1)
    assert worker.signals[-1] == signal.SIGKILL
    worker.answer()
    assert worker.calls == [job.call]
    worker.end(-signal.SIGKILL)
    stage.workers[1].get_ready().answer(value=1)
    assert value_of(following) == 1
    assert (stage.tally.kills, stage.tally.crashes) == (1, 0)


def test_an_answer_that_crosses_the_end_does_not_earn_another_call(staged: Staged) -> None:
    """A child that the function left behind may have the socket still."""
    stage = staged()
    (worker,) = stage.ready()
    job, following = stage.submit(), stage.submit()
    call = worker.calls[-1]
    worker.has_ended = True
    worker.doom()
    poll, stage.loop.poll = stage.loop.poll, lambda: None  # type: ignore[method-assign]
    worker.answer(call, "done")
    stage.loop.poll = poll  # type: ignore[method-assign]
    worker.exit(0)
    assert (value_of(job), worker.calls) == ("done", [job.call])
    stage.workers[1].get_ready().answer(value=1)
    assert value_of(following) == 1


# -- in any order ------------------------------------------------------------------------------------

EVENTS = ("answer", "hangup", "exit", "deadline", "cancel")


def happen(event: str, stage: Stage, worker: FakeWorker, job: Any) -> None:
    match event:
        case "answer":
            if not worker.has_ended:
                worker.answer(job.call, "done")
        case "hangup":
            worker.hang_up()
        case "exit":
            worker.exit(7)
        case "deadline":
            stage.loop.turn(max(0.0, job.began + job.seconds - stage.loop.clock()))
        case "cancel" if not outcome_of(job).done():
            stage.cancel(job)


def what_becomes(events: tuple[str, ...]) -> tuple[str, bool]:
    """What a call comes to, and whether it was late at any time."""
    is_late = has_hung_up = False
    for event in events:
        match event:
            case "cancel":
                return "cancelled", is_late  # even one that is late: until its stack has come, it is not told
            case "hangup":
                has_hung_up = True  # how it ended is still to come, and is waited for
            case "exit":
                return ("late" if is_late else "crashed"), is_late
            case "answer" if not has_hung_up:
                return ("late" if is_late else "answered"), is_late
            case "deadline":
                if has_hung_up:
                    return "crashed", False  # for longer than its exit code is waited for
                is_late = True
    raise AssertionError(events)


@pytest.mark.parametrize("on_cancel", ["raise", "kill", "abandon"])
@pytest.mark.parametrize("events", [*itertools.permutations(EVENTS)], ids="-".join)
def test_each_order_of_events(staged: Staged, events: tuple[str, ...], on_cancel: str) -> None:
    """The call has the one outcome that fits, the next one is given to one worker that lives, once."""
    stage = staged()
    (worker,) = stage.ready()
    job, following = stage.submit(5, on_cancel=on_cancel), stage.submit()
    for event in events:
        happen(event, stage, worker, job)
        if worker.doomed_at is not None:
            assert len(worker.calls) == worker.doomed_at
        stage.loop.turn(0.001)
    stage.loop.turn(10)

    expected, was_late = what_becomes(events)
    outcome = outcome_of(job)
    if outcome.is_cancelled:
        found = "cancelled"
    elif outcome.frame is not None:
        found = "answered"
    else:
        found = "late" if isinstance(outcome.error, OffloadTimeout) else "crashed"
        assert isinstance(outcome.error, OffloadTimeout | WorkerCrashed)
    assert found == expected
    tally = stage.tally
    assert (tally.timeouts, tally.cancelled) == (was_late, found == "cancelled")

    died_with_it = isinstance(outcome_of(following).error, WorkerCrashed)
    assert tally.crashes == (found == "crashed") + died_with_it
    assert died_with_it == (following.call in worker.calls)
    if not died_with_it:
        (other,) = stage.workers[1:]
        other.get_ready().answer(value=1)
        assert other.calls == [following.call]
        assert value_of(following) == 1
    assert stage.counts()[2:] == (0, 0)
