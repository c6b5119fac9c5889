"""Workers that are replaced, that fail and that do not start, without a process. See `stage`."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import pytest

from asyncguard.errors import WorkerCrashed
from asyncguard.offloading import _dispatcher
from asyncguard.offloading._process import WorkerProcess
from asyncguard.offloading._wire import Kind
from tests.offloading.stage import Stage, error_of, outcome_of, value_of

Staged = Callable[..., Stage]


# -- workers that are replaced -----------------------------------------------------------------------


def test_after_max_calls_a_worker_is_replaced(staged: Staged) -> None:
    stage = staged(max_calls=2)
    (worker,) = stage.ready()
    jobs = [stage.submit() for _ in range(3)]
    worker.answer()
    assert not worker.has_been_hung_up_on
    worker.answer()
    assert worker.has_been_hung_up_on
    assert worker.signals == []  # it tidies up as it likes
    worker.end(0)
    stage.workers[1].get_ready().answer()
    assert all(outcome_of(job).frame for job in jobs)
    assert (stage.tally.recycled, stage.tally.crashes, stage.tally.kills) == (1, 0, 0)
    assert worker.calls == [job.call for job in jobs[:2]]


def test_a_recycled_worker_that_does_not_end_is_ended(staged: Staged) -> None:
    stage = staged(max_calls=1)
    (worker,) = stage.ready()
    stage.submit()
    worker.answer()
    stage.loop.turn(5)
    assert worker.signals == [signal.SIGKILL]
    assert stage.counts() == (0, 0, 0, 0)


def test_above_max_rss_a_worker_is_replaced(staged: Staged) -> None:
    stage = staged(max_rss=1)
    stage.dispatcher.open()
    (worker,) = stage.workers
    worker.pid = os.getpid()  # this process has some memory
    stage.submit()
    worker.get_ready()
    # However little it may have: no call would ever run.
    assert (stage.tally.recycled, worker.has_been_hung_up_on) == (0, False)
    worker.answer()
    assert (stage.tally.recycled, worker.has_been_hung_up_on) == (1, True)


def test_a_worker_whose_memory_is_not_known_is_kept(staged: Staged) -> None:
    stage = staged(max_rss=1)
    (worker,) = stage.ready()
    stage.submit()
    worker.answer()
    assert (stage.tally.recycled, stage.counts()) == (0, (1, 1, 0, 0))


# -- workers that fail -------------------------------------------------------------------------------


def test_a_crash_fails_one_call(staged: Staged) -> None:
    stage = staged(workers=2)
    first, second = stage.ready()[::-1]
    crashed, other, waiting = (stage.submit() for _ in range(3))
    first.write_stack("unread")  # of a call before, which was cancelled while it was asked what it does
    first.write_crash("crash")
    first.end(-signal.SIGSEGV)
    error = outcome_of(crashed).error
    assert isinstance(error, WorkerCrashed)
    assert error.exit_code == -signal.SIGSEGV
    assert error.stack.splitlines() == [
        "Stack (most recent call first):",
        '  File "app.py", line 1 in crash',
    ]
    assert "the worker that ran app.function was ended by SIGSEGV" in str(error)
    second.answer()
    second.answer()
    assert outcome_of(other).frame is not None
    assert outcome_of(waiting).frame is not None
    assert stage.tally.crashes == 1


def test_a_stack_that_nobody_has_read_is_not_that_of_a_crash(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit()
    worker.write_stack("sleepy")
    worker.end(3)
    error = outcome_of(job).error
    assert isinstance(error, WorkerCrashed)
    assert error.stack == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (3, "ended with exit code 3"),
        (-signal.SIGKILL, "was ended by SIGKILL; if nobody did that, the system was out of memory"),
        (-99, "was ended by signal 99"),
    ],
)
def test_how_it_ended_is_said(staged: Staged, code: int, said: str) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit()
    worker.end(code)
    assert error_of(job) == f"WorkerCrashed: the worker that ran app.function {said}"


def test_a_worker_that_hangs_up_and_lives_is_ended(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit()
    worker.hang_up()
    assert not outcome_of(job).done()  # its exit code may be on its way
    stage.loop.turn(0.3)
    assert worker.signals == [signal.SIGKILL]
    worker.exit(-signal.SIGKILL)
    assert isinstance(outcome_of(job).error, WorkerCrashed)


def test_a_worker_whose_end_is_never_told(staged: Staged) -> None:
    """The process that would tell it has ended as well."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit()
    worker.hang_up()
    stage.loop.turn(2)
    assert error_of(job) == "WorkerCrashed: the worker that ran app.function ended"
    following = stage.submit()
    stage.workers[1].get_ready().answer()
    assert outcome_of(following).frame is not None


def test_an_idle_worker_that_ends_is_replaced_when_it_is_needed(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    stage.submit()
    worker.answer()
    worker.end(1)
    assert (len(stage.workers), stage.counts()) == (1, (0, 0, 0, 0))
    job = stage.submit()
    stage.workers[1].get_ready().answer()
    assert outcome_of(job).frame is not None


def test_a_call_is_not_lost_on_an_idle_worker_that_has_ended_unnoticed(staged: Staged) -> None:
    stage = staged(workers=2)
    first, second = stage.ready()
    second._wire.close()  # the loop has not looked yet
    job = stage.submit()
    assert first.calls == [job.call]
    first.answer()
    assert (outcome_of(job).frame is not None, stage.counts()[1:]) == (True, (1, 0, 0))


def test_a_call_that_a_dead_worker_did_not_take_keeps_its_place(staged: Staged) -> None:
    stage = staged(workers=1)
    (worker,) = stage.ready()
    answered, first, second = (stage.submit() for _ in range(3))
    call = worker.calls[-1]
    poll, stage.loop.poll = stage.loop.poll, lambda: None  # type: ignore[method-assign]
    worker.answer(call)
    stage.loop.poll = poll  # type: ignore[method-assign]
    worker.end(0)
    assert outcome_of(answered).frame is not None
    stage.workers[1].get_ready()
    stage.workers[1].answer()
    stage.workers[1].answer()
    assert stage.workers[1].calls == [first.call, second.call]


def test_an_answer_to_another_call(staged: Staged, caplog: pytest.LogCaptureFixture) -> None:
    """There is no telling what else it gets wrong."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit()
    worker.answer(job.call + 1)
    assert "answered a call that it was not given" in caplog.text
    assert worker.has_been_hung_up_on
    stage.loop.turn(2)
    assert set(worker.signals) == {signal.SIGKILL}
    assert isinstance(outcome_of(job).error, WorkerCrashed)
    assert stage.tally.calls == 0


def test_an_answer_without_a_call(staged: Staged, caplog: pytest.LogCaptureFixture) -> None:
    stage = staged()
    (worker,) = stage.ready()
    worker.answer(1)
    assert "answered a call that it was not given" in caplog.text
    assert (worker.has_been_hung_up_on, stage.dispatcher.idle) == (True, 0)


def test_what_makes_no_sense(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job = stage.submit()
    worker.garble()
    assert worker.has_been_hung_up_on
    worker.end(0)
    assert isinstance(outcome_of(job).error, WorkerCrashed)


def test_what_is_no_answer_is_handed_on(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    worker.send(Kind.LOG, 0, "before")
    job = stage.submit()
    worker.send(Kind.PROGRESS, job.call, 0.5)
    assert [(found, frame.kind) for found, frame in stage.messages] == [
        (None, Kind.LOG),
        (job, Kind.PROGRESS),
    ]
    assert not outcome_of(job).done()
    worker.answer()
    assert outcome_of(job).frame is not None


# -- workers that do not start -----------------------------------------------------------------------


def test_a_worker_that_cannot_be_started(staged: Staged, caplog: pytest.LogCaptureFixture) -> None:
    stage = staged()
    job = stage.submit()
    stage.dispatcher.on_not_started(stage.workers[0].token, "no memory")
    assert "could not be started: no memory" in caplog.text
    stage.workers[1].get_ready().answer()
    assert outcome_of(job).frame is not None


def test_bad_starts_are_no_matter_while_others_work(staged: Staged) -> None:
    stage = staged(workers=2)
    busy = stage.submit()
    (worker,) = stage.workers
    worker.get_ready()
    waiting = stage.submit()
    for _ in range(3):
        stage.workers[-1].start()
        stage.workers[-1].end(1)
    assert len(stage.workers) == 4
    assert not outcome_of(waiting).done()
    worker.answer()
    worker.answer()
    assert outcome_of(busy).frame is not None
    assert outcome_of(waiting).frame is not None


def test_another_worker_is_started_for_each_that_waits_after_a_pause(staged: Staged) -> None:
    stage = staged(workers=2)
    stage.submit()
    for _ in range(3):
        stage.workers[-1].start()
        stage.workers[-1].end(1)
    jobs = [stage.submit(), stage.submit()]
    stage.loop.turn(1.1)
    stage.workers[-1].get_ready()
    stage.workers[-1].get_ready()
    for worker in stage.workers[-2:]:
        worker.answer()
    assert [outcome_of(job).frame is not None for job in jobs] == [True, True]


def test_no_descriptors_are_left_for_a_worker(staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(workers=2)
    stage.submit()
    worker = stage.workers[0].get_ready()

    def refuse(*args: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(_dispatcher, "WorkerProcess", refuse)
    waiting = stage.submit()  # the worker that there is will take it
    assert not outcome_of(waiting).done()
    worker.answer()
    worker.end(-signal.SIGKILL)
    assert "was not begun" not in (said := error_of(waiting)), said
    hopeless = stage.submit()
    stage.loop.turn(1.1)
    assert "a new worker could not be started: [Errno 24] Too many open files" in error_of(hopeless)
    monkeypatch.setattr(_dispatcher, "WorkerProcess", WorkerProcess)
    following = stage.submit()
    stage.loop.turn(1.1)
    stage.workers[-1].get_ready().answer()
    assert outcome_of(following).frame is not None


def test_a_worker_that_dies_before_its_first_call_is_told_of(
    staged: Staged, caplog: pytest.LogCaptureFixture
) -> None:
    stage = staged()
    stage.dispatcher.open()
    (worker,) = stage.workers
    worker.start()
    worker.write_crash("boot")
    with caplog.at_level(logging.WARNING):
        worker.end(-signal.SIGSEGV)
    assert "an offload worker was ended by SIGSEGV before its first call" in caplog.text
    assert "in boot" in caplog.text


def test_after_three_bad_starts_those_who_wait_are_told(staged: Staged) -> None:
    stage = staged()
    jobs = [stage.submit(), stage.submit()]
    for number in range(3):
        assert len(stage.workers) == number + 1
        assert not outcome_of(jobs[0]).done()
        stage.workers[-1].start()
        stage.workers[-1].end(1)
    for job in jobs:
        said = "app.function was not begun: a new worker ended with exit code 1 before it was ready"
        assert error_of(job) == f"WorkerCrashed: {said}"
    assert stage.counts() == (0, 0, 0, 0)


def test_after_bad_starts_it_tries_again_when_a_moment_has_passed(staged: Staged) -> None:
    stage = staged()
    stage.submit()
    for _ in range(3):
        stage.workers[-1].start()
        stage.workers[-1].end(1)
    job = stage.submit()
    assert len(stage.workers) == 3
    stage.loop.turn(1.1)
    assert len(stage.workers) == 4
    stage.workers[-1].get_ready().answer()
    assert outcome_of(job).frame is not None
    stage.workers[-1].end(1)  # from now on it counts anew
    following = stage.submit()
    stage.workers[-1].start()
    stage.workers[-1].end(1)
    assert not outcome_of(following).done()
    assert len(stage.workers) == 6


def test_a_closed_pool_does_not_try_again(staged: Staged) -> None:
    stage = staged()
    stage.submit()
    for _ in range(3):
        stage.workers[-1].start()
        stage.workers[-1].end(1)
    stage.dispatcher.close()
    assert stage.loop.timers == []


def test_bad_starts_that_are_not_in_a_row_do_not_count(staged: Staged) -> None:
    stage = staged()
    job = stage.submit()
    for _ in range(5):
        stage.workers[-1].start()
        stage.workers[-1].end(1)
        stage.workers[-1].get_ready().answer()
        assert outcome_of(job).frame is not None
        stage.workers[-1].end(0)
        job = stage.submit()
    assert not outcome_of(job).done()


def test_a_worker_that_is_ready_before_its_start_is_told(staged: Staged) -> None:
    """Two sockets, which are read in any order."""
    stage = staged()
    job = stage.submit()
    (worker,) = stage.workers
    worker.send(Kind.READY)
    assert worker.calls == [job.call]
    worker.start()
    worker.answer(value=1)
    assert value_of(job) == 1


def test_a_worker_that_has_ended_before_its_start_is_told(staged: Staged) -> None:
    stage = staged()
    stage.dispatcher.open()
    (worker,) = stage.workers
    worker.hang_up()
    worker.start()
    worker.exit(1)
    assert stage.counts() == (0, 0, 0, 0)


@pytest.mark.parametrize("has_pidfd", [False, True])
def test_a_worker_that_nobody_wants_any_more_when_its_start_is_told(staged: Staged, has_pidfd: bool) -> None:
    stage = staged()
    stage.dispatcher.open()
    (worker,) = stage.workers
    stage.dispatcher.close()
    if has_pidfd:
        worker.start()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(worker.pidfd)
    else:
        stage.dispatcher.on_started(worker.token, worker.pid, None)
    assert worker.has_been_hung_up_on


def test_killed_before_its_start_is_told(staged: Staged) -> None:
    """Nobody knows yet whom to send the signal."""
    stage = staged()
    job = stage.submit(on_cancel="kill")
    (worker,) = stage.workers
    worker.send(Kind.READY)
    stage.cancel(job)
    worker.start()
    assert worker.signals == [signal.SIGKILL]
