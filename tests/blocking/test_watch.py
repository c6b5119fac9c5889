"""The watch over a loop: stalls timed to the second on a turned clock, and who suffered of them.

The threshold is so long that the watchdog, which sleeps in real time, hardly ever wakes: what is tested here
is what happens on the loop's own thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import uvloop

from asyncguard._request import RequestRecord
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._stall import Stall
from asyncguard.blocking._steps import drive
from asyncguard.blocking._watch import LoopWatch

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio

THRESHOLD = 1000.0


class Ear:
    """A listener: what it heard is in `stalls`."""

    def __init__(self) -> None:
        self.stalls: list[Stall] = []

    def hear(self, stall: Stall) -> None:
        self.stalls.append(stall)


@asynccontextmanager
async def watching(*others: tuple[Ear, float]) -> AsyncIterator[tuple[LoopWatch, list[Stall]]]:
    """A watch whose stalls are in the list when the block is over."""
    ear = Ear()
    watch = LoopWatch(running_loop(), THRESHOLD)
    watch.listen(ear.hear, THRESHOLD)
    for other, limit in others:
        watch.listen(other.hear, limit)
    # From a fresh iteration on: the one before began before the watch.
    await anyio.lowlevel.checkpoint()
    yield watch, ear.stalls
    for other, _ in (*others, (ear, 0.0)):
        assert watch.unlisten(other.hear).wait(30)
    assert not watch.active


def record(path: str) -> RequestRecord:
    return RequestRecord({"type": "http", "method": "GET", "path": path}, 0.0)


async def request(watch: LoopWatch, path: str, work: Callable[[], Awaitable[Any]]) -> None:
    async def app() -> None:
        await work()

    await drive(app(), record(path), watch)


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
    (turn,) = stall.long_turns
    assert (turn.record.label, turn.until - turn.since) == ("GET /culprit", 2 * THRESHOLD)
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
    assert [len(stall.long_turns) for stall in stalls] == [1, 1]
    assert watch._long_turns == []


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


async def test_a_stall_right_after_another_hands_the_first_over(clock: TurnedClock) -> None:
    """As when a beat of uvloop's is late for more than the long turn before it."""
    async with watching() as (watch, stalls):
        watch.stalled(1000.0, 3000.0)
        watch.stalled(3000.0, 6000.0)
    assert [stall.duration for stall in stalls] == [2000.0, 3000.0]


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

    patient = Ear()
    async with watching((patient, 4 * THRESHOLD)) as (watch, stalls):
        assert watch.threshold == THRESHOLD
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert [stall.duration for stall in stalls] == [2 * THRESHOLD, 5 * THRESHOLD]
    assert [stall.duration for stall in patient.stalls] == [5 * THRESHOLD]


async def test_the_threshold_follows_the_listeners(clock: TurnedClock) -> None:
    impatient = Ear()
    async with watching() as (watch, _):
        watch.listen(impatient.hear, THRESHOLD / 2)
        assert watch.threshold == THRESHOLD / 2
        assert watch.heard_by(impatient.hear)
        watch.unlisten(impatient.hear)
        assert watch.threshold == THRESHOLD
        assert watch.active
        assert not watch.heard_by(impatient.hear)
        watch.unlisten(impatient.hear)  # once more does no harm
        assert watch.active


async def test_a_listener_that_is_gone_is_forgotten(clock: TurnedClock) -> None:
    async def block() -> None:
        clock.turn(2 * THRESHOLD)

    impatient = Ear()
    async with watching() as (watch, stalls):
        watch.listen(impatient.hear, THRESHOLD / 2)
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
    watch.listen(ear.hear, THRESHOLD)
    await anyio.lowlevel.checkpoint()
    await request(watch, "/culprit", block)
    await anyio.sleep(0.01)
    assert watch.unlisten(ear.hear).wait(30)
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
    watch.listen(ear.hear, THRESHOLD)
    await anyio.lowlevel.checkpoint()

    async def block() -> None:
        clock.turn(held * THRESHOLD)
        assert watch.unlisten(ear.hear).wait(30)
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
        (watchdog,) = watch_threads() - before
        assert watchdog.name == f"asyncguard-watchdog-{threading.current_thread().name}"
        assert watchdog.daemon
        await request(watch, "/culprit", block)
        await anyio.sleep(0.01)
    assert stalls
    for thread in watch_threads() - before:
        thread.join(30)
    assert watch_threads() <= before
