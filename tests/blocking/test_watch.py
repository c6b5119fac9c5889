"""The watch over a loop: stalls timed to the second on a turned clock, and who suffered of them.

The threshold is so long that the watchdog, which sleeps in real time, hardly ever wakes: what is tested here
is what happens on the loop's own thread.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import uvloop

from asyncguard._request import RequestRecord, current_request
from asyncguard.blocking import _watch
from asyncguard.blocking._busy import BusyTime
from asyncguard.blocking._hang import Hang
from asyncguard.blocking._load import LoopLoad
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._stall import Aftermath, Stall
from asyncguard.blocking._watch import LoopWatch
from asyncguard.blocking._watchdog import Watchdog
from tests.driving import driven

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio

THRESHOLD = 1000.0


class Ear:
    """A listener: what it heard is in its lists."""

    def __init__(
        self,
        threshold: float = THRESHOLD,
        *,
        busy_threshold: float = math.inf,
        hang_after: float = math.inf,
        aborts: bool = False,
    ) -> None:
        self.threshold = threshold
        self.busy_threshold = busy_threshold
        self.hang_after = hang_after
        self.aborts = aborts
        self.stalls: list[Stall] = []
        self.busy: list[tuple[BusyTime, float]] = []
        self.hangs: list[Hang] = []
        self.log: list[str] = []

    def hear_stall(self, stall: Stall) -> None:
        self.stalls.append(stall)
        self.log.append("stall")

    def hear_busy(self, busy: BusyTime, ended: float) -> None:
        self.busy.append((busy, ended))
        self.log.append("busy")

    def hear_hang(self, hang: Hang) -> None:
        self.hangs.append(hang)
        self.log.append("hang")

    def miss_stall(self) -> None:
        self.log.append("missed")

    def sum_up(self) -> None:
        self.log.append("sum up")


@asynccontextmanager
async def watching(*others: Ear) -> AsyncIterator[tuple[LoopWatch, list[Stall]]]:
    """A watch whose stalls are in the list when the block is over."""
    ear = Ear()
    watch = LoopWatch(running_loop(), THRESHOLD)
    for each in (ear, *others):
        watch.listen(each)
    # From a fresh iteration on: the one before began before the watch.
    await anyio.lowlevel.checkpoint()
    yield watch, ear.stalls
    for each in (*others, ear):
        assert watch.unlisten(each).wait(30)
    assert not watch.active


def record(path: str) -> RequestRecord:
    return RequestRecord({"type": "http", "method": "GET", "path": path}, 0.0)


async def request(watch: LoopWatch, path: str, work: Callable[[], Awaitable[Any]]) -> None:
    async def app() -> None:
        await work()

    await driven(app(), record(path), watch)


def labels(stall: Stall, culprit: str = "GET /culprit") -> set[str]:
    return {wait.record.label for wait in stall.aftermath.waits} - {culprit}


async def test_a_turn_of_a_request(clock: TurnedClock) -> None:
    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        clock.turn(2 * THRESHOLD)
        await anyio.lowlevel.checkpoint()

    async with watching() as (watch, stalls):
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    (stall,) = stalls
    assert stall.duration == 2 * THRESHOLD
    assert stall.turn is not None
    assert (stall.turn.record.label, stall.turn.until - stall.turn.since) == ("GET /culprit", 2 * THRESHOLD)
    assert stall.end == clock.now
    assert stall.thread == threading.current_thread().name
    assert not stall.starting


async def test_two_stalls_are_two(clock: TurnedClock) -> None:
    async def block() -> None:
        for factor in (2, 3):
            clock.turn(factor * THRESHOLD)
            await anyio.sleep(0.01)

    async with watching() as (watch, stalls):
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert [stall.duration for stall in stalls] == [2 * THRESHOLD, 3 * THRESHOLD]
    assert stalls[0].aftermath is not stalls[1].aftermath


async def test_two_stalls_in_a_row_are_two(clock: TurnedClock) -> None:
    """The second begins while the aftermath of the first is still being noted."""

    async def block() -> None:
        for factor in (2, 3):
            clock.turn(factor * THRESHOLD)
            await anyio.lowlevel.checkpoint()

    async with watching() as (watch, stalls):
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert [stall.duration for stall in stalls] == [2 * THRESHOLD, 3 * THRESHOLD]


async def test_stalls_soon_after_each_other_share_an_aftermath(clock: TurnedClock) -> None:
    """Each takes down the round in which it ended: who waited for it resumes within so many from there."""
    ear = Ear(0.125)
    async with watching(ear) as (watch, _):
        watch.stalled(clock.now - 2000.0, clock.now)
        shared = watch.aftermath
        assert shared is not None
        assert (shared.round, shared.last) == (0, Aftermath.ROUNDS + 1)
        for _ in range(5):
            watch.settle()
        watch.stalled(clock.now, clock.now + 0.125)
        assert watch.aftermath is shared
        assert (shared.round, shared.last) == (5, 5 + Aftermath.ROUNDS + 1)
        for _ in range(Aftermath.ROUNDS):
            watch.settle()
        assert watch.aftermath is shared
        watch.settle()
        assert watch.aftermath is None
    assert [(stall.duration, stall.round) for stall in ear.stalls] == [(2000.0, 0), (0.125, 5)]
    assert all(stall.aftermath is shared for stall in ear.stalls)


async def test_a_stall_that_is_long_after_another_has_an_aftermath_of_its_own(clock: TurnedClock) -> None:
    """The one before must be reported by then, and is so at the latest when the second has ended."""
    async with watching() as (watch, stalls):
        watch.stalled(1000.0, 3000.0)
        watch.settle()
        watch.stalled(3000.0, 6000.0)
        assert watch.aftermath is not None
        assert watch.aftermath.round == 0
        assert watch._reporter.flush().wait(30)
        assert [stall.duration for stall in stalls] == [2000.0]
    assert [(stall.duration, stall.round) for stall in stalls] == [(2000.0, 0), (3000.0, 0)]
    assert stalls[0].aftermath is not stalls[1].aftermath


async def test_the_oldest_of_several_stalls_says_when_they_are_reported(clock: TurnedClock) -> None:
    ear = Ear(0.125)
    async with watching(ear) as (watch, _):
        watch.stalled(clock.now - 1.0, clock.now)
        clock.turn(0.15)
        watch.stalled(clock.now - 0.125, clock.now)
        clock.turn(0.04)
        watch.settle()
        assert watch.aftermath is not None
        clock.turn(0.02)
        watch.settle()
        assert watch.aftermath is None
        assert watch._reporter.flush().wait(30)
        assert [stall.duration for stall in ear.stalls] == [1.0, 0.125]


async def test_the_watchdog_reports_a_stall_that_the_loop_does_not_come_to(clock: TurnedClock) -> None:
    """Since the next one lasts: it may never end."""
    async with watching() as (watch, stalls):
        watch.stalled(clock.now - 2 * THRESHOLD, clock.now)
        clock.turn(0.125)
        assert watch.is_alive()
        assert watch.aftermath is not None
        clock.turn(0.125)
        assert watch.is_alive()
        assert watch.aftermath is None
        assert watch._reporter.flush().wait(30)
        assert len(stalls) == 1
        assert watch.is_alive()  # with nothing left to report
    assert len(stalls) == 1


async def test_what_the_watchdog_reports_while_a_stall_is_taken_down(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before becomes overdue at that very moment: the second must not be lost with it."""
    ear = Ear(0.125)
    async with watching(ear) as (watch, _):

        def meanwhile(loop: object) -> list[tuple[RequestRecord, float]]:
            clock.turn(0.1)
            assert watch.is_alive()
            return []

        watch.stalled(clock.now - 1.0, clock.now)
        clock.turn(0.15)
        with monkeypatch.context() as patched:
            patched.setattr(_watch, "due_timers", meanwhile)
            watch.stalled(clock.now - 0.125, clock.now)
    assert caplog.records == []
    assert [stall.duration for stall in ear.stalls] == [1.0, 0.125]


async def test_two_long_turns_in_one_iteration_are_two(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the loop did not poll between them: their requests and lines are others."""
    monkeypatch.setattr(_watch, "_REPORTED_WITHIN", 10 * THRESHOLD)

    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls):
        async with anyio.create_task_group() as group:
            group.start_soon(request, watch, "/one", block)
            group.start_soon(request, watch, "/two", block)
        await anyio.sleep(0.01)
    assert [stall.duration for stall in stalls] == [2 * THRESHOLD, 2 * THRESHOLD]
    assert {stall.turn.record.label for stall in stalls if stall.turn} == {"GET /one", "GET /two"}
    assert stalls[0].aftermath is stalls[1].aftermath
    assert [stall.round for stall in stalls] == [0, 0]
    assert stalls[0].end == stalls[1].start


async def test_what_held_the_loop_before_a_long_turn(clock: TurnedClock) -> None:
    """Long enough to be a stall itself, it is a part of it, where the loop tells; shorter, it is none."""
    for factor in (2, 0.5):
        reached = anyio.Event()

        async def neighbour(reached: anyio.Event = reached, factor: float = factor) -> None:
            await anyio.lowlevel.checkpoint()
            clock.turn(factor * THRESHOLD)
            reached.set()

        async def block(reached: anyio.Event = reached) -> None:
            while not reached.is_set():
                await anyio.lowlevel.checkpoint()
            clock.turn(2 * THRESHOLD)

        exact = not isinstance(running_loop(), uvloop.Loop)
        async with watching() as (watch, stalls):
            async with anyio.create_task_group() as group:
                group.start_soon(neighbour)
                group.start_soon(request, watch, "/culprit", block)
            await anyio.sleep(0.01)
        turns = [stall for stall in stalls if stall.turn]
        # trio runs the ready tasks of a pass in random order: then the two are in passes of their own.
        shared = exact and factor > 1 and len(stalls) == 1
        assert [stall.duration for stall in turns] == [(4 if shared else 2) * THRESHOLD]
        assert len(stalls) == (2 if exact and factor > 1 and not shared else 1)


async def test_the_aftermath_is_over_after_a_fifth_of_a_second(clock: TurnedClock) -> None:
    """Whoever may still come: a stall must not wait to be reported for as long as neighbours are slow."""

    async def block() -> None:
        clock.turn(2 * THRESHOLD)
        await anyio.lowlevel.checkpoint()
        clock.turn(0.15)
        await anyio.lowlevel.checkpoint()
        assert watch.aftermath is not None
        clock.turn(0.1)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        assert watch.aftermath is None

    async with watching() as (watch, stalls):
        await request(watch, "/culprit", block)
    assert len(stalls) == 1


async def behind(watch: LoopWatch, path: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """A request whose coroutine only waits for a task that does the work, as behind BaseHTTPMiddleware."""
    its = record(path)
    token = current_request.set(its)
    watch.in_flight.add(its)

    async def app() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(work)

    try:
        await driven(app(), its, watch)
    finally:
        watch.in_flight.discard(its)
        current_request.reset(token)


async def test_a_request_whose_tasks_get_ready_during_the_stall_is_a_victim(clock: TurnedClock) -> None:
    news, done = anyio.Event(), anyio.Event()

    async def work() -> None:
        await news.wait()
        await done.wait()

    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        news.set()
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls), anyio.create_task_group() as group:
        group.start_soon(behind, watch, "/behind", work)
        group.start_soon(behind, watch, "/waits", done.wait)
        await anyio.wait_all_tasks_blocked()
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
        done.set()
    (stall,) = stalls
    assert labels(stall) == {"GET /behind"}


async def test_a_request_whose_tasks_were_ready_before_the_stall_is_a_victim(
    clock: TurnedClock, anyio_backend_name: str
) -> None:
    """They run right after it, in the same iteration."""
    if anyio_backend_name == "trio":
        pytest.skip("trio runs the ready tasks of a pass in random order")
    go, done = anyio.Event(), anyio.Event()

    async def work() -> None:
        await go.wait()
        await done.wait()

    async def block() -> None:
        await go.wait()
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls), anyio.create_task_group() as group:
        group.start_soon(request, watch, "/culprit", block)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(behind, watch, "/behind", work)
        await anyio.wait_all_tasks_blocked()
        go.set()
        await anyio.sleep(0.01)
        done.set()
    (stall,) = stalls
    assert labels(stall) == {"GET /behind"}


async def test_since_when_a_timer_had_been_due(clock: TurnedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several timers and stalls, the first counts."""
    early, late = record("/early"), record("/late")
    due: list[tuple[RequestRecord, float]] = []
    monkeypatch.setattr(_watch, "due_timers", lambda loop: due)
    ear = Ear(0.125)
    async with watching(ear) as (watch, _):
        due += [(early, 100.0), (early, 300.0), (late, 50.0)]
        watch.stalled(1000.0, 3000.0)
        due[:] = [(late, 7.0), (early, 1.0)]
        watch.stalled(3000.0, 3000.125)
    first, second = ear.stalls
    assert first.aftermath is second.aftermath
    assert first.aftermath.due == {early: 2700.0, late: 2950.0}


async def test_below_the_threshold_nothing_is_taken_down(clock: TurnedClock) -> None:
    # uvloop's beats come in real time: to them, many turns of the clock look like one.
    turns = 1 if isinstance(running_loop(), uvloop.Loop) else 20

    async def block() -> None:
        for _ in range(turns):
            clock.turn(0.9 * THRESHOLD)
            await anyio.sleep(0.001)

    async with watching() as (watch, stalls):
        await request(watch, "/busy", block)
        await anyio.sleep(0.01)
    assert stalls == []


async def test_victims_and_bystanders(clock: TurnedClock) -> None:
    """Who is ready when the stall begins, or becomes so during it, waits for it; who awaits more does not."""
    far = anyio.Event()
    turns = 0

    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        clock.turn(2 * THRESHOLD)
        await anyio.lowlevel.checkpoint()

    async def ready() -> None:
        nonlocal turns
        while not far.is_set():
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with watching() as (watch, stalls), anyio.create_task_group() as group:
        group.start_soon(request, watch, "/bystander", far.wait)
        group.start_soon(request, watch, "/ready", ready)
        await anyio.lowlevel.checkpoint()
        await request(watch, "/culprit", block)
        after = turns
        while turns < after + 30:
            await anyio.lowlevel.checkpoint()
        far.set()
    (stall,) = stalls
    assert labels(stall) == {"GET /ready"}
    waits = [wait for wait in stall.aftermath.waits if wait.record.label == "GET /ready"]
    assert waits[0].resumed - max(waits[0].waiting_since, stall.start) == 2 * THRESHOLD
    # The look at who runs is over after a few iterations, not after thirty.
    assert len(waits) <= 15


async def test_one_whose_timer_ended_during_the_stall_is_a_victim(clock: TurnedClock) -> None:
    async def nap() -> None:
        await anyio.sleep(0.05)

    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        clock.turn(2 * THRESHOLD)
        release = threading.Event()
        release.wait(0.2)  # real time has to pass for the timer

    async with watching() as (watch, stalls), anyio.create_task_group() as group:
        group.start_soon(request, watch, "/napping", nap)
        await anyio.lowlevel.checkpoint()
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert labels(stalls[0]) == {"GET /napping"}


async def test_one_that_arrives_during_the_stall_is_a_victim(clock: TurnedClock) -> None:
    """What the stalled loop's next poll brings: here a message of a thread."""
    message, sent = anyio.Event(), threading.Event()
    loop = running_loop()

    def send() -> None:
        soon = (
            loop.call_soon_threadsafe if isinstance(loop, asyncio.AbstractEventLoop) else loop.run_sync_soon
        )
        soon(message.set)
        sent.set()

    async def answer() -> None: ...

    async def server() -> None:
        await message.wait()
        await request(watch, "/arrived", answer)

    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        threading.Thread(target=send).start()
        sent.wait()
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls), anyio.create_task_group() as group:
        group.start_soon(server)
        await anyio.lowlevel.checkpoint()
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert labels(stalls[0]) == {"GET /arrived"}
    (wait,) = [wait for wait in stalls[0].aftermath.waits if wait.record.label == "GET /arrived"]
    assert wait.resumed - max(wait.waiting_since, stalls[0].start) == 2 * THRESHOLD


async def test_one_that_arrives_after_the_stall_is_none(clock: TurnedClock) -> None:
    async def answer() -> None: ...

    async def block() -> None:
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls):
        await request(watch, "/culprit", block)
        await anyio.sleep(0.05)
        await request(watch, "/later", answer)
        await anyio.sleep(0.01)
    assert labels(stalls[0]) == set()


async def test_each_listener_has_its_threshold(clock: TurnedClock) -> None:
    async def block() -> None:
        for factor in (0.5, 2, 5):
            clock.turn(factor * THRESHOLD)
            await anyio.sleep(0.01)

    patient = Ear(4 * THRESHOLD)
    async with watching(patient) as (watch, stalls):
        assert watch.threshold == THRESHOLD
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert [stall.duration for stall in stalls] == [2 * THRESHOLD, 5 * THRESHOLD]
    assert [stall.duration for stall in patient.stalls] == [5 * THRESHOLD]


async def test_the_threshold_follows_the_listeners(clock: TurnedClock) -> None:
    impatient = Ear(THRESHOLD / 2)
    async with watching() as (watch, _):
        watch.listen(impatient)
        assert watch.threshold == THRESHOLD / 2
        assert watch.heard_by(impatient)
        watch.unlisten(impatient)
        assert watch.threshold == THRESHOLD
        assert watch.active
        assert not watch.heard_by(impatient)
        watch.unlisten(impatient)  # once more does no harm
        assert watch.active


async def test_a_listener_that_is_gone_is_forgotten(clock: TurnedClock) -> None:
    async def block() -> None:
        clock.turn(2 * THRESHOLD)

    impatient = Ear(THRESHOLD / 2)
    async with watching() as (watch, stalls):
        watch.listen(impatient)
        del impatient
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
        assert watch.threshold == THRESHOLD
    assert len(stalls) == 1


async def test_what_fails_in_the_watch_reaches_nobody(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs inside of the loop's own machinery and of requests: neither may suffer, and one is told."""

    async def block() -> None:
        for _ in range(3):
            clock.turn(2 * THRESHOLD)
            await anyio.sleep(0.001)

    def refuse(*arguments: object) -> None:
        raise OSError("too many open files")

    async with watching() as (watch, stalls):
        with monkeypatch.context() as patched:
            patched.setattr(watch._watchdog, "read", refuse)
            await request(watch, "/culprit", block)
            await anyio.sleep(0.01)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert stalls == []


async def test_without_a_thread_stalls_are_timed_all_the_same(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def block() -> None:
        clock.turn(2 * THRESHOLD)

    ear = Ear()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        watch = LoopWatch(running_loop(), THRESHOLD)
    assert "no thread to be had" in caplog.text
    watch.listen(ear)
    await anyio.lowlevel.checkpoint()
    await request(watch, "/culprit", block)
    await anyio.sleep(0.01)
    assert watch.unlisten(ear).wait(30)
    assert [stall.duration for stall in ear.stalls] == [2 * THRESHOLD]


async def test_a_stall_of_the_start_up(clock: TurnedClock) -> None:
    async def block() -> None:
        clock.turn(2 * THRESHOLD)
        watch.starting_until = clock.now
        await anyio.sleep(0.01)
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls):
        watch.starting_until = float("inf")
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert [stall.starting for stall in stalls] == [True, False]


@pytest.mark.parametrize(("held", "found"), [(2.0, 1), (0.5, 0)])
async def test_stopped_in_the_middle_of_a_stall(clock: TurnedClock, held: float, found: int) -> None:
    """What is going on when the watch stops is taken down, up to then."""
    ear = Ear()
    watch = LoopWatch(running_loop(), THRESHOLD)
    watch.listen(ear)
    await anyio.lowlevel.checkpoint()

    async def block() -> None:
        clock.turn(held * THRESHOLD)
        assert watch.unlisten(ear).wait(30)
        clock.turn(held * THRESHOLD)

    await request(watch, "/culprit", block)
    assert [stall.duration for stall in ear.stalls] == [held * THRESHOLD] * found
    assert not watch.active


def watch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncguard-")}


async def test_threads_end_with_the_last_listener(clock: TurnedClock) -> None:
    before = watch_threads()

    async def block() -> None:
        clock.turn(2 * THRESHOLD)

    async with watching() as (watch, stalls):
        started = watch_threads() - before
        watchdog = f"asyncguard-watchdog-{threading.current_thread().name}"
        resting = {f"{watchdog}-resting"} if sys.platform == "linux" else set()
        assert {thread.name for thread in started} == {watchdog} | resting
        assert all(thread.daemon for thread in started)
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert stalls
    for thread in watch_threads() - before:
        thread.join(30)
    assert watch_threads() <= before


# -- requests that hold the loop in small pieces -----------------------------------------------------


async def pieces(watch: LoopWatch, clock: TurnedClock, *held: float, path: str = "/busy") -> RequestRecord:
    """A request, guarded as by the middleware, that has turns of so many seconds."""
    record = RequestRecord({"type": "http", "method": "GET", "path": path}, clock.now)

    async def app() -> None:
        for seconds in held:
            clock.turn(seconds)
            await anyio.lowlevel.checkpoint()

    try:
        await driven(app(), record, watch)
    finally:
        watch.end_busy(record)
    return record


async def test_many_small_pieces_are_too_much_together(clock: TurnedClock) -> None:
    ear = Ear(busy_threshold=100.0)
    async with watching(ear) as (watch, _):
        assert watch.busy_after == 50.0
        began = clock.now
        await pieces(watch, clock, *[25.0] * 8)
        assert watch.busy == {}
    ((busy, ended),) = ear.busy
    assert (busy.record.label, busy.began, ended) == ("GET /busy", began, began + 200)
    assert busy.longest == 25.0
    assert busy.seconds == 200.0


async def test_pieces_of_any_size_are_added_up_exactly(clock: TurnedClock) -> None:
    """The piece that reaches half of the threshold does not count twice."""
    ear = Ear(busy_threshold=100.0)
    async with watching(ear) as (watch, _):
        await pieces(watch, clock, 40.0, 40.0, 15.0)  # 95: not too much
    assert ear.busy == []


async def test_pieces_that_are_not_too_much(clock: TurnedClock) -> None:
    ear = Ear(busy_threshold=100.0)
    async with watching(ear) as (watch, _):
        await pieces(watch, clock, 25.0)
        await pieces(watch, clock, *[25.0] * 3)
        assert watch.busy == {}
    assert ear.busy == []


async def test_a_stall_is_no_piece(clock: TurnedClock) -> None:
    ear = Ear(busy_threshold=100.0)
    async with watching(ear) as (watch, stalls):
        await pieces(watch, clock, 25.0, 2 * THRESHOLD, 25.0, 25.0)
    assert len(stalls) == 1
    assert ear.busy == []


async def test_a_long_life_is_told_of_once_a_window_is_over(clock: TurnedClock) -> None:
    """Added up over ten times the threshold; and once a request, since it may live for hours."""
    ear = Ear(busy_threshold=100.0)
    async with watching(ear) as (watch, _):
        began = clock.now
        await pieces(watch, clock, *[25.0] * 200)
    ((busy, ended),) = ear.busy
    assert ended == began + 1000
    assert 900 <= busy.seconds <= 1000


async def test_a_window_that_was_quiet_is_followed_by_a_new_one(clock: TurnedClock) -> None:
    """Less than a tenth of each window: a websocket may do so for as long as it lives."""
    ear = Ear(busy_threshold=100.0)
    record = RequestRecord({"type": "websocket", "path": "/feed"}, clock.now)

    async def app() -> None:
        for _ in range(40):
            clock.turn(9.0)
            await anyio.lowlevel.checkpoint()
            idle.append(clock.now)

    idle: list[float] = []
    async with watching(ear) as (watch, _):
        coroutine = app()

        async def later() -> None:
            """Between two turns, a hundred seconds pass."""
            while len(idle) < 40:
                clock.turn(100.0)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(later)
            await driven(coroutine, record, watch)
        assert ear.busy == []
        assert len(watch.busy) == 1
        (busy,) = watch.busy.values()
        assert busy.began > record.started + 1000
        watch.end_busy(record)
        assert watch.busy == {}
    assert ear.busy == []


async def test_each_listener_has_its_busy_threshold(clock: TurnedClock) -> None:
    ears = [Ear(busy_threshold=100.0), Ear(busy_threshold=300.0)]
    async with watching(*ears) as (watch, _):
        await pieces(watch, clock, *[25.0] * 6)
        assert watch.unlisten(ears[0]).wait(30)
        assert watch.busy_after == 150.0
    assert [len(ear.busy) for ear in ears] == [1, 0]


async def test_who_does_not_want_to_hear_of_pieces_does_not(clock: TurnedClock) -> None:
    async with watching() as (watch, _):
        assert watch.busy_after == math.inf
        await pieces(watch, clock, *[900.0] * 10)
        assert watch.busy == {}


# -- a stall that goes on ----------------------------------------------------------------------------


async def test_a_hang_is_told_once_to_each_who_wants_to_hear_of_it(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own watchdog sees the clock turn as well.
    monkeypatch.setattr(Watchdog, "_watch_for_hang", lambda *_: None)
    ears = [Ear(hang_after=10.0), Ear(hang_after=30.0), Ear()]
    culprit = record("/hangs")
    async with watching(*ears) as (watch, _):
        assert watch.hang_after == 10.0
        for seconds in (5.0, 5.0, 10.0, 10.0):
            clock.turn(seconds)
            watch.note_hang(clock.now - 1000.0, culprit)
        watch.stalled(1000.0, clock.now)
        clock.turn(12.0)
        watch.note_hang(12.0, None)
    assert [[(hang.seconds, hang.record) for hang in ear.hangs] for ear in ears] == [
        [(10.0, culprit), (12.0, None)],
        [(30.0, culprit)],
        [],
    ]


@pytest.mark.parametrize(
    ("aborts", "debugged", "aborted"), [(True, False, 1), (False, False, 0), (True, True, 0)]
)
async def test_the_last_resort(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, aborts: bool, debugged: bool, aborted: int
) -> None:
    ear = Ear(hang_after=10.0, aborts=aborts)
    reports: list[bool] = []
    monkeypatch.setattr(_watch, "abort", lambda reported: reports.append(reported.wait(30)))
    monkeypatch.setattr(_watch, "is_debugged", lambda hang: debugged)
    async with watching(ear) as (watch, _):
        watch.note_hang(9.0, None)
        assert reports == []
        watch.note_hang(10.0, None)
        watch.note_hang(11.0, None)
    assert reports == [True] * aborted
    assert len(ear.hangs) == 1


async def test_a_hang_is_not_told_again_while_its_stall_is_taken_down(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog may wake just then: to its probe, the loop is still held."""
    ear = Ear(hang_after=10.0)

    async def block() -> None:
        while not clock.now < watch._watchdog._due < math.inf:  # until it naps, on its own thread
            await anyio.sleep(0.001)
        watch._watchdog._expect(clock.now, math.inf)  # it is not late
        clock.turn(2 * THRESHOLD)
        watch._watchdog._wake_up()
        assert len(watch._told_of_hang) == 1
        with monkeypatch.context() as patched:
            patched.setattr(watch.probe, "aftermath_began", watch._watchdog._wake_up)
            watch.note_long_turn(held, held.turn_since, clock.now)

    async with watching(ear) as (watch, _):
        held = record("/culprit")
        await driven(block(), held, watch)
        await anyio.sleep(0.01)
    assert len(ear.hangs) == 1


# -- kept from the GIL -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("late", "kept", "told"),
    [
        (2 * THRESHOLD, 3 * THRESHOLD, 3 * THRESHOLD),
        (2 * THRESHOLD, 9 * THRESHOLD, 5 * THRESHOLD),  # not for longer than the poll took
        (2 * THRESHOLD, 0.9 * THRESHOLD, None),
        (0.9 * THRESHOLD, 3 * THRESHOLD, None),
    ],
)
async def test_a_long_poll(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, late: float, kept: float, told: float | None
) -> None:
    async with watching() as (watch, stalls):
        busy, delay = watch.load.busy, watch.load.delay
        with monkeypatch.context() as patched:
            patched.setattr(watch._watchdog, "late", lambda now: late)
            patched.setattr(watch._watchdog, "kept_from_gil", lambda reading: kept)
            watch.note_long_poll(1000.0, 1000.0 + 5 * THRESHOLD)
        busy, delay = watch.load.busy - busy, watch.load.delay - delay
    assert [(stall.end, stall.duration, stall.turn) for stall in stalls] == (
        [] if told is None else [(1000.0 + 5 * THRESHOLD, told, None)]
    )
    assert (busy, delay) == (told or 0.0, (told or 0.0) ** 2 / 2)


# -- how busy ----------------------------------------------------------------------------------------


async def test_utilisation_and_lag_count_the_hold_that_goes_on(clock: TurnedClock) -> None:
    async with watching() as (watch, _):
        watch.load = LoopLoad(clock.now)
        watch.turn = record("/")
        watch.turn.turn_since = clock.now
        clock.turn(8.0)
        assert watch.utilisation.last_10s == 1.0
        assert watch.lag.last_10s == 4.0
        watch.turn = None


async def test_stalls_without_cpu_time_are_added_up(clock: TurnedClock) -> None:
    async with watching() as (watch, _):
        before = watch.load.waited
        watch.stalled(1000.0, 3000.0)
        # But for the little that this test computes.
        assert watch.load.waited - before == pytest.approx(2000.0, abs=10.0)


async def test_what_happens_after_a_rest_wakes_the_watchdog(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[str] = []
    async with watching() as (watch, _):
        with monkeypatch.context() as patched:
            patched.setattr(watch._watchdog, "wake", lambda: woken.append("woken"))
            marks = len(watch.load._marks)
            watch.wake(clock.now)
            watch.wake(clock.now)
        assert len(watch.load._marks) == marks + 2
    assert woken == ["woken"] * 2


# -- comings and goings ------------------------------------------------------------------------------


async def test_who_leaves_is_told_of_what_was_and_sums_up(clock: TurnedClock) -> None:
    """Though the aftermath is still open; who stays is told when it is over, and once."""
    leaving = Ear()
    async with watching(leaving) as (watch, stalls):
        watch.stalled(1000.0, 3000.0)
        assert watch.unlisten(leaving).wait(30)
        assert leaving.log == ["stall", "sum up"]
        assert stalls == []
    assert leaving.log == ["stall", "sum up"]
    assert len(stalls) == 1


async def test_the_last_one_sums_up_too(clock: TurnedClock) -> None:
    ear = Ear()
    watch = LoopWatch(running_loop(), THRESHOLD)
    watch.listen(ear)
    watch.stalled(1000.0, 3000.0)
    assert watch.unlisten(ear).wait(30)
    assert ear.log == ["stall", "sum up"]


async def test_without_a_stall_there_is_nothing_to_sum_up(clock: TurnedClock) -> None:
    """And no thread for it."""
    ear = Ear()
    watch = LoopWatch(running_loop(), THRESHOLD)
    watch.listen(ear)
    assert watch.unlisten(ear).wait(30)
    assert ear.log == []


async def test_each_minute_all_sum_up(clock: TurnedClock) -> None:
    ear = Ear()
    async with watching(ear) as (watch, _):
        watch._sum_up()
        assert ear.log == ["sum up"]


async def test_who_is_not_told_of_a_stall_since_there_are_too_many_knows_that(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear, patient = Ear(), Ear(10 * THRESHOLD)
    async with watching(ear, patient) as (watch, stalls):
        with monkeypatch.context() as patched:
            patched.setattr(watch._reporter, "put", lambda call: False)
            watch.stalled(1000.0, 3000.0)
            watch.close_aftermath()
        assert ear.log == ["missed"]
        assert patient.log == []
    assert stalls == []


async def test_the_watch_does_not_keep_its_listeners_alive(clock: TurnedClock) -> None:
    ear = Ear(THRESHOLD / 4, busy_threshold=1.0, hang_after=2.0)
    gone = weakref.ref(ear)
    async with watching() as (watch, _):
        watch.listen(ear)
        assert watch.hang_after == 2.0
        del ear
        assert gone() is None
        watch.stalled(1000.0, 3000.0)
        # The first stall after that shows that nobody wants to hear of so little any more.
        assert (watch.threshold, watch.busy_after, watch.hang_after) == (THRESHOLD, math.inf, math.inf)


async def test_ended_at_exit(clock: TurnedClock) -> None:
    """The second of two stalls of one line is in the summary only."""
    ear = Ear()
    watch = LoopWatch(running_loop(), THRESHOLD)
    watch.listen(ear)
    watch.in_flight.add(record("/"))
    watch.busy[record("/busy")] = BusyTime(record("/busy"), 0.0, 1.0)
    watch.stalled(1000.0, 3000.0)
    watch.stalled(3000.0, 6000.0)
    probe = watch.probe
    assert watch.end_at_exit().wait(30)
    assert not watch.active
    assert (watch.in_flight, watch.busy) == (set(), {})
    assert ear.log == ["stall", "stall", "sum up"]
    assert watch.loop() is None
    watch.end_from_outside()  # once more does no harm
    probe.detach()


async def test_abandoned_in_a_forked_child(clock: TurnedClock) -> None:
    ear = Ear(busy_threshold=100.0)
    watch = LoopWatch(running_loop(), THRESHOLD)
    watch.listen(ear)
    watch.in_flight.add(record("/"))
    watch.busy[record("/busy")] = BusyTime(record("/busy"), 0.0, 1.0)
    watch.stalled(1000.0, 3000.0)
    watch.abandon()
    assert (watch.active, watch.loop(), watch.aftermath) == (False, None, None)
    assert (watch.in_flight, watch.busy) == (set(), {})
    assert not watch.heard_by(ear)
    watch.close_aftermath()
    watch._watchdog.stop()  # it is there, since this is no forked child
    watch._reporter.finish()
    assert ear.log == []


async def test_the_kind_of_the_loop(clock: TurnedClock, anyio_backend: tuple[str, dict[str, bool]]) -> None:
    async with watching() as (watch, stalls):
        watch.stalled(1000.0, 3000.0)
    kinds = {"trio": "trio"} if anyio_backend[0] == "trio" else {}
    uv = anyio_backend[1].get("use_uvloop")
    assert stalls[0].loop == kinds.get("trio", "uvloop.Loop" if uv else "asyncio.UnixSelectorEventLoop")


# -- asyncio's loops, which stop and close -----------------------------------------------------------


@pytest.mark.parametrize("closed", [False, True])
def test_a_loop_that_stops_right_after_a_stall(
    clock: TurnedClock, anyio_backend: tuple[str, dict[str, bool]], closed: bool
) -> None:
    """There is no iteration to settle it: the watchdog hands it over."""
    if anyio_backend[0] == "trio":
        pytest.skip("trio's runs do not pause, and tell when they end")

    async def main() -> LoopWatch:
        watch = LoopWatch(running_loop(), THRESHOLD)
        watch.listen(ear)
        watch.stalled(1000.0, 3000.0)
        assert watch.is_alive()
        return watch

    ear = Ear()
    uv = anyio_backend[1]["use_uvloop"]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uv else None) as runner:
        watch = runner.run(main())
        if not closed:
            assert watch.is_alive()
            assert watch._reporter.flush().wait(30)
            assert ear.log == ["stall"]
            assert watch.probe.held_since() is None
    assert not watch.is_alive()
    assert watch._reporter.flush().wait(30)
    assert ear.log == ["stall", "sum up"]


def test_the_watch_ends_while_a_stall_is_handed_over(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the watchdog, since the loop has stopped, at the moment in which that loop is closed."""

    async def main() -> LoopWatch:
        watch = LoopWatch(running_loop(), THRESHOLD)
        watch.listen(ear)
        watch.stalled(1000.0, 3000.0)
        return watch

    start = threading.Thread.start
    started: list[threading.Thread] = []

    def slow_start(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("asyncguard-reporter"):
            ender = threading.Thread(target=watch.end_from_outside)
            start(ender)
            ender.join(0.2)  # it may have to wait until the stall is handed over
            started.extend((thread, ender))

    ear = Ear()
    loop = asyncio.new_event_loop()
    try:
        monkeypatch.setattr(threading.Thread, "start", slow_start)
        watch = loop.run_until_complete(main())
        watch.is_alive()
        reporter, ender = started
        ender.join(30)
        assert watch._reporter.flush().wait(30)
        assert ear.log == ["stall", "sum up"]
        reporter.join(1)
        assert not reporter.is_alive()
    finally:
        loop.close()
        watch._reporter._queue.put(None)


async def test_who_is_not_in_flight_is_no_victim(clock: TurnedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task left behind by a request that has ended waits for nobody."""
    there, gone = record("/there"), record("/gone")
    async with watching() as (watch, stalls):
        watch.settle()  # with no aftermath open
        watch.in_flight.add(there)
        with monkeypatch.context() as patched:
            patched.setattr(watch.probe, "resumed", lambda: [gone, there])
            clock.turn(2 * THRESHOLD)
            watch.stalled(clock.now - 2 * THRESHOLD, clock.now)
            watch.settle()
        watch.in_flight.clear()
    assert labels(stalls[0]) == {"GET /there"}
