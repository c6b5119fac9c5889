"""Which call goes to which worker and when, without a process: the clock and the workers are the test's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from asyncguard.errors import OffloadError, OffloadQueueFull, OffloadTimeout
from asyncguard.offloading._wire import Kind
from tests.conftest import TurnedClock
from tests.offloading.stage import Stage, error_of, outcome_of, value_of

Staged = Callable[..., Stage]


# -- the queue ---------------------------------------------------------------------------------------


def test_a_call_and_its_answer(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    assert stage.counts() == (1, 1, 0, 0)
    job = stage.submit()
    assert (worker.calls, stage.counts()) == ([job.call], (1, 0, 1, 0))
    worker.answer(value="done")
    assert (value_of(job), stage.counts()) == ("done", (1, 1, 0, 0))
    assert stage.tally.calls == 1


def test_workers_are_started_as_they_are_needed(staged: Staged) -> None:
    stage = staged(workers=3)
    assert stage.workers == []
    first, second = stage.submit(), stage.submit()
    assert len(stage.workers) == 2
    stage.workers[0].get_ready()
    assert stage.workers[0].calls == [first.call]
    stage.workers[0].answer()
    assert stage.workers[0].calls == [first.call, second.call]  # it was sooner than the other was ready
    stage.workers[1].get_ready()
    assert (stage.workers[1].calls, stage.counts()) == ([], (2, 1, 1, 0))


def test_no_more_workers_than_allowed(staged: Staged) -> None:
    stage = staged(workers=2)
    for _ in range(5):
        stage.submit()
    assert (len(stage.workers), stage.counts()) == (2, (2, 0, 0, 5))


def test_what_nobody_waits_for_any_more_is_not_begun(staged: Staged) -> None:
    """Though the dispatcher has not heard of it yet."""
    stage = staged()
    (worker,) = stage.ready()
    running, cancelled, following = (stage.submit() for _ in range(3))
    outcome_of(cancelled).is_cancelled = True
    worker.answer()
    assert outcome_of(running).frame is not None
    assert worker.calls == [running.call, following.call]
    stage.dispatcher.withdraw(cancelled)
    assert stage.counts() == (1, 0, 1, 0)
    assert stage.tally.cancelled == 1


def test_what_is_late_is_not_begun(staged: Staged, clock: TurnedClock) -> None:
    """Though its timer has not rung yet."""
    stage = staged()
    (worker,) = stage.ready()
    running, late, following = stage.submit(), stage.submit(1), stage.submit()
    clock.turn(1.5)
    worker.answer()
    assert outcome_of(running).frame is not None
    assert worker.calls == [running.call, following.call]
    stage.loop.turn(1.1)
    assert error_of(late).startswith(
        "OffloadTimeout: app.function was not begun: no worker was free within 1 s"
    )
    assert stage.counts() == (1, 0, 1, 0)


def test_what_is_late_already_is_not_begun(staged: Staged, clock: TurnedClock) -> None:
    stage = staged()
    (worker,) = stage.ready()
    job = stage.job(1)
    clock.turn(2)
    with pytest.raises(OffloadTimeout, match="its arguments took longer than 1 s to pack"):
        stage.dispatcher.submit(job)
    assert (worker.calls, stage.tally.timeouts) == ([], 1)


def test_a_worker_that_is_being_killed_has_a_place_for_another_call(staged: Staged) -> None:
    stage = staged(workers=1, max_queue=1)
    stage.ready()
    job = stage.submit(on_cancel="kill")
    stage.dispatcher.withdraw(job)
    stage.submit()  # for the worker to come
    stage.submit()  # in the queue
    with pytest.raises(OffloadQueueFull):
        stage.submit()


def test_a_full_queue(staged: Staged, clock: TurnedClock) -> None:
    stage = staged(workers=2, max_queue=3)
    workers = stage.ready()
    for _ in workers:
        stage.submit()
    clock.turn(4)
    for worker in workers:
        worker.answer()  # a call takes four seconds
    jobs = [stage.submit() for _ in range(5)]
    assert stage.counts() == (2, 0, 2, 3)
    late = stage.job()
    with pytest.raises(
        OffloadQueueFull, match=r"app.function .*all workers .2. are busy, and the queue is full .3."
    ) as caught:
        stage.dispatcher.submit(late)
    assert caught.value.retry_after == pytest.approx(4 * 3 / 2)
    assert (stage.tally.refused, stage.counts()) == (1, (2, 0, 2, 3))
    workers[0].answer()
    last = stage.submit()  # there is room again
    for _ in range(6):
        for worker in workers:
            if stage.dispatcher.running:
                worker.answer()
    assert all(outcome_of(job).frame for job in [*jobs, last])
    assert not outcome_of(late).done()
    assert late.call not in workers[0].calls + workers[1].calls


def test_before_any_call_has_ended_a_second_is_guessed(staged: Staged) -> None:
    stage = staged(max_queue=2)
    stage.ready()
    for _ in range(3):
        stage.submit()
    with pytest.raises(OffloadQueueFull) as caught:
        stage.submit()
    assert caught.value.retry_after == 2.0


def test_a_call_that_a_starting_worker_will_take_does_not_count_as_waiting(staged: Staged) -> None:
    stage = staged(workers=2, max_queue=0)
    stage.dispatcher.open()
    jobs = [stage.submit(), stage.submit()]
    with pytest.raises(OffloadQueueFull):
        stage.submit()
    for worker in stage.workers:
        worker.get_ready()
    for worker in stage.workers:
        worker.answer()
    assert all(outcome_of(job).frame for job in jobs)


@pytest.mark.parametrize("how", ["cold", "crashed", "recycled"])
def test_without_a_queue_a_call_still_has_a_worker_started(staged: Staged, how: str) -> None:
    stage = staged(max_queue=0, max_calls=1 if how == "recycled" else None)
    if how != "cold":
        (worker,) = stage.ready()
        stage.submit()
        if how == "recycled":
            worker.answer()
        worker.end(0)
        assert stage.counts() == (0, 0, 0, 0)
    job = stage.submit()
    with pytest.raises(OffloadQueueFull):
        stage.submit()
    stage.workers[-1].get_ready().answer()
    assert outcome_of(job).frame is not None


def test_those_of_one_priority_come_in_their_order(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    jobs = [stage.submit() for _ in range(6)]
    for _ in jobs:
        worker.answer()
    assert worker.calls == [job.call for job in jobs]


def test_the_greatest_priority_comes_first(staged: Staged) -> None:
    stage = staged(max_queue=100)
    (worker,) = stage.ready()
    stage.submit()
    priorities = [0, -1, 5, 0, 5, -1, 7, 0]
    jobs = [stage.submit(priority=priority) for priority in priorities]
    for _ in range(len(jobs) + 1):
        worker.answer()
    expected = sorted(jobs, key=lambda job: (-job.options.priority, job.call))
    assert worker.calls[1:] == [job.call for job in expected]


def test_a_call_of_great_priority_does_not_interrupt(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    stage.submit()
    stage.submit(priority=100)
    assert (len(worker.calls), worker.signals) == (1, [])


def test_the_worker_that_became_idle_last_is_taken(staged: Staged) -> None:
    """Its caches are warm; those that are not needed stay asleep."""
    stage = staged(workers=3)
    workers = stage.ready()
    for _ in workers:
        stage.submit()
    for index in (1, 0, 2):
        workers[index].answer()
    before = [len(worker.calls) for worker in workers]
    for expected in (2, 0, 1):
        stage.submit()
        before[expected] += 1
        assert [len(worker.calls) for worker in workers] == before


def test_one_worker_does_all_if_it_can(staged: Staged) -> None:
    stage = staged(workers=3)
    workers = stage.ready()
    for _ in range(10):
        stage.submit()
        next(worker for worker in workers if len(worker.calls) > 0).answer()
    assert sorted(len(worker.calls) for worker in workers) == [0, 0, 10]


def test_a_worker_is_given_one_call_at_a_time(staged: Staged) -> None:
    """So that a short one does not stand behind a long one while another worker is free."""
    stage = staged(workers=2, max_queue=100)
    long, other = stage.ready()[::-1]
    stage.submit()
    assert (len(long.calls), len(other.calls)) == (1, 0)
    jobs = [stage.submit() for _ in range(20)]
    for _ in jobs:
        other.answer()
    assert (len(long.calls), len(other.calls)) == (1, 20)
    assert all(outcome_of(job).frame for job in jobs)


def test_large_calls_are_sent_piece_by_piece(staged: Staged) -> None:
    """More than the socket takes at once."""
    stage = staged()
    (worker,) = stage.ready()
    job = stage.job()
    (piece,) = job.pieces
    job.pieces[:] = [bytes(piece) * 50_000]
    stage.dispatcher.submit(job)
    assert 0 < len(worker.calls) < 50_000
    for _ in range(1000):
        stage.loop.poll()
        if len(worker.calls) == 50_000:
            break
    assert worker.calls == [job.call] * 50_000


# -- time in the queue -------------------------------------------------------------------------------


def test_a_call_out_of_time_in_the_queue_never_runs(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    first, late, last = stage.submit(), stage.submit(2), stage.submit()
    stage.loop.turn(1.9)
    assert not outcome_of(late).done()
    stage.loop.turn(0.2)
    assert error_of(late) == "OffloadTimeout: app.function was not begun: no worker was free within 2 s"
    assert stage.counts() == (1, 0, 1, 1)
    worker.answer()
    worker.answer()
    assert worker.calls == [first.call, last.call]
    assert (stage.tally.timeouts, stage.tally.calls) == (1, 2)


def test_the_time_before_it_was_submitted_counts(staged: Staged, clock: TurnedClock) -> None:
    """It took a moment to pickle its arguments."""
    stage = staged()
    stage.ready()
    stage.submit()
    job = stage.job(seconds=2)
    clock.turn(1.5)
    stage.dispatcher.submit(job)
    stage.loop.turn(0.6)
    assert isinstance(outcome_of(job).error, OffloadTimeout)


def test_a_call_that_was_begun_in_time_has_what_is_left(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    stage.submit()
    job = stage.submit(2)
    stage.loop.turn(1.5)
    worker.answer()
    assert worker.calls[-1] == job.call
    stage.loop.turn(0.6)
    assert error_of(job).startswith("OffloadTimeout: app.function did not end within 2 s")


def test_a_call_cancelled_in_the_queue_never_runs(staged: Staged) -> None:
    stage = staged()
    (worker,) = stage.ready()
    jobs = [
        stage.submit(seconds, priority=priority)
        for seconds, priority in ((None, 0), (None, 0), (5, 1), (5, 1))
    ]
    stage.cancel(jobs[1])
    stage.cancel(jobs[2])
    assert (stage.counts(), stage.tally.cancelled) == ((1, 0, 1, 1), 2)
    for _ in range(2):
        worker.answer()
    assert worker.calls == [jobs[0].call, jobs[3].call]
    assert stage.counts() == (1, 1, 0, 0)


def test_what_never_runs_keeps_nothing_open(staged: Staged) -> None:
    stage = staged()
    stage.ready()
    stage.submit()
    for seconds in (1, None):
        read, write = os.pipe()
        job = stage.job(seconds, [read, write])
        stage.dispatcher.submit(job)
        if seconds is None:
            stage.cancel(job)
        else:
            stage.loop.turn(1.1)
        for descriptor in (read, write):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


# -- the end -----------------------------------------------------------------------------------------


def test_closing_while_busy(staged: Staged) -> None:
    stage = staged(workers=3, grace=2)
    deaf, obedient, deafer = stage.ready()[::-1]
    jobs = [stage.submit(), stage.submit(60), stage.submit()]
    waiting = [stage.submit(), stage.submit(60, priority=3)]
    emptied: list[bool] = []
    stage.dispatcher.refuse("its pool was closed")
    stage.dispatcher.on_empty(lambda: emptied.append(True))
    for job in waiting:
        assert error_of(job) == "OffloadError: app.function was not begun: its pool was closed"
    with pytest.raises(OffloadError, match="its pool was closed"):
        stage.submit()
    assert [worker.signals for worker in stage.workers] == [[signal.SIGUSR1]] * 3
    obedient.answer()
    assert outcome_of(jobs[1]).frame is not None
    assert obedient.has_been_hung_up_on
    obedient.end(0)
    stage.loop.turn(2.1)
    for worker, job in ((deaf, jobs[0]), (deafer, jobs[2])):
        assert worker.signals == [signal.SIGUSR1, signal.SIGKILL]
        assert emptied == []
        worker.end(-signal.SIGKILL)
        assert error_of(job) == "OffloadError: app.function was stopped: its pool was closed"
    assert emptied == [True]
    assert (stage.tally.kills, stage.tally.crashes, len(stage.workers)) == (2, 0, 3)


def test_closing_idle_workers_hangs_up(staged: Staged) -> None:
    stage = staged(workers=2)
    workers = stage.ready()
    emptied: list[bool] = []
    stage.dispatcher.refuse("its pool was closed")
    stage.dispatcher.refuse("once is enough")
    stage.dispatcher.on_empty(lambda: emptied.append(True))
    assert all(worker.has_been_hung_up_on for worker in workers)
    for worker in workers:
        assert emptied == []
        worker.end(0)
        assert worker.signals == []
    assert emptied == [True]


def test_closing_without_any_worker(staged: Staged) -> None:
    stage = staged()
    emptied: list[bool] = []
    stage.dispatcher.refuse("its pool was closed")
    stage.dispatcher.on_empty(lambda: emptied.append(True))
    assert emptied == [True]


def test_closing_while_workers_start(staged: Staged) -> None:
    stage = staged(workers=3)
    job = stage.submit()
    stage.dispatcher.open()
    unborn, born, ready = stage.workers
    born.start()
    ready.start()
    stage.dispatcher.refuse("its pool was closed")
    assert error_of(job) == "OffloadError: app.function was not begun: its pool was closed"
    unborn.start()
    for worker in stage.workers:
        worker.send(Kind.READY)
        worker.end(0)
    assert (stage.counts(), len(stage.workers)) == ((0, 0, 0, 0), 3)


def test_closing_at_once_kills(staged: Staged) -> None:
    stage = staged(workers=2)
    busy, _ = stage.ready()[::-1]
    job = stage.submit()
    stage.dispatcher.close()
    assert error_of(job) == "OffloadError: app.function was stopped: its pool was closed"
    assert busy.signals[-1] == signal.SIGKILL
    assert stage.counts() == (0, 0, 0, 0)


def test_closing_at_once_after_a_worker_has_hung_up(staged: Staged) -> None:
    """It was going to be killed a moment later; by then its id may be another's."""
    stage = staged()
    (worker,) = stage.ready()
    stage.submit()
    worker.hang_up()
    stage.dispatcher.close()
    stage.loop.turn(1)
    assert (worker.signals.count(signal.SIGKILL), stage.strays) == (1, [])


def test_a_call_cancelled_while_the_pool_closes(staged: Staged) -> None:
    """It is being stopped already, and is not given more time for that."""
    stage = staged(grace=2)
    (worker,) = stage.ready()
    job = stage.submit()
    stage.dispatcher.refuse("its pool was closed")
    stage.loop.turn(1)
    stage.cancel(job)
    stage.loop.turn(1.1)
    assert worker.signals.count(signal.SIGKILL) == 1
    stage.loop.turn(5)
    assert (worker.signals.count(signal.SIGKILL), stage.tally.kills) == (1, 1)
