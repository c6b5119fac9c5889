"""What the system says of the threads of a watched loop."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from asyncguard.blocking._vitals import LoopVitals, Reading, kept_waking

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

linux = pytest.mark.skipif(sys.platform != "linux", reason="schedstat is Linux's")


@pytest.fixture
def here() -> Iterator[LoopVitals]:
    vitals = LoopVitals()
    yield vitals
    vitals.close()


def in_a_thread(work: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_cpu_time_is_that_of_the_thread_it_was_made_on(here: LoopVitals) -> None:
    before = time.thread_time()
    reading: Reading = in_a_thread(lambda: here.read(0.0))
    assert reading.cpu is not None
    assert before <= reading.cpu <= time.thread_time()


def test_computing_shows(here: LoopVitals) -> None:
    before = here.read(0.0)
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    spent = here.read(0.0).since(before)
    assert spent.cpu is not None
    assert spent.cpu >= 0.02
    assert spent.process_cpu >= 0.02


@linux
def test_queueing_and_turns_are_schedstats_numbers(here: LoopVitals) -> None:
    def now() -> tuple[float, int]:
        with open(f"/proc/self/task/{threading.get_native_id()}/schedstat") as file:
            _, queued, turns = file.read().split()
        return int(queued) / 1e9, int(turns)

    before, reading, after = now(), here.read(0.0), now()
    assert before[0] <= reading.queued <= after[0]
    assert before[1] <= reading.turns <= after[1]


@linux
def test_the_watchdogs_turns(here: LoopVitals) -> None:
    assert here.read(0.0).watchdog_turns == 0
    naps = 20

    def watchdog() -> None:
        here.watchdog_is_here()
        for _ in range(naps):
            time.sleep(0.001)
        assert here.read(0.0).watchdog_turns >= naps

    in_a_thread(watchdog)


@linux
def test_a_resting_thread_has_hardly_a_turn(here: LoopVitals) -> None:
    """Those that it needed to get there do not count; it returns when all is closed."""
    assert here.read(0.0).resting_turns == 0
    thread = threading.Thread(target=here.rest)
    thread.start()
    deadline = time.monotonic() + 30
    while here._resting_stat is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for _ in range(20):
        time.sleep(0.001)
    assert here.read(0.0).resting_turns <= 2
    assert thread.is_alive()
    here.close()
    thread.join(30)
    assert not thread.is_alive()
    assert here.read(0.0).resting_turns == 0


@linux
def test_the_turns_of_a_resting_thread_are_counted_from_its_rest_on(
    here: LoopVitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [b"1 2 40"]
    monkeypatch.setattr(os, "pread", lambda *_: contents[0])
    here._open.release()
    here.rest()
    assert here.read(0.0).resting_turns == 0
    contents[0] = b"1 2 43"
    assert here.read(0.0).resting_turns == 3


def test_the_difference_of_two_readings(clock: TurnedClock) -> None:
    before = Reading(1.0, 2.0, 3.0, 4, 5.0, 6.0, 7, 8.0, 9)
    after = Reading(2.0, 4.0, 6.0, 8, 10.0, 12.0, 14, 16.0, 18)
    assert after.since(before) == before
    assert after.since(before._replace(cpu=None)).cpu is None
    assert after._replace(cpu=None).since(before).cpu is None


def test_the_moment_and_what_the_watchdog_tells(here: LoopVitals, clock: TurnedClock) -> None:
    clock.turn(5)
    reading = here.read(0.25)
    assert (reading.at, reading.overslept) == (1005, 0.25)


def test_collections_on_this_thread_are_timed(here: LoopVitals, clock: TurnedClock) -> None:
    def slow(phase: str, info: dict[str, int]) -> None:
        clock.turn(1)

    gc.collect()
    before = here.read(0.0).collecting
    gc.callbacks.append(slow)  # after the one of `here`
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(slow)
    # From the call at the start of the collection to that at its end: one second of `slow`.
    assert here.read(0.0).collecting - before == 1


def test_collections_on_other_threads_are_not(here: LoopVitals, clock: TurnedClock) -> None:
    def slow(phase: str, info: dict[str, int]) -> None:
        clock.turn(1)

    before = here.read(0.0).collecting
    gc.callbacks.append(slow)
    try:
        in_a_thread(gc.collect)
    finally:
        gc.callbacks.remove(slow)
    assert here.read(0.0).collecting == before


def test_made_in_the_middle_of_a_collection(here: LoopVitals) -> None:
    before = here.read(0.0).collecting
    here._on_collection("stop", {})
    assert here.read(0.0).collecting == before


def test_closed_it_leaves_nothing_behind() -> None:
    callbacks = list(gc.callbacks)
    vitals = LoopVitals()
    assert len(gc.callbacks) == len(callbacks) + 1
    in_a_thread(vitals.watchdog_is_here)
    descriptors = [d for d in (vitals._loop_stat, vitals._watchdog_stat) if d is not None]
    vitals.close()
    vitals.close()
    assert gc.callbacks == callbacks
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    reading = vitals.read(0.0)
    assert (reading.cpu, reading.queued, reading.turns, reading.watchdog_turns) == (None, 0.0, 0, 0)


def test_a_thread_that_has_ended_tells_nothing() -> None:
    vitals: LoopVitals = in_a_thread(LoopVitals)
    deadline = time.monotonic() + 30
    while vitals.read(0.0).cpu is not None:  # the system may take a moment longer than Python
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert vitals.read(0.0).turns == 0
    vitals.close()


@linux
def test_a_system_without_schedstat(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise FileNotFoundError

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        vitals = LoopVitals()
        vitals.watchdog_is_here()
    reading = vitals.read(0.0)
    assert (reading.queued, reading.turns, reading.watchdog_turns) == (0.0, 0, 0)
    assert reading.cpu is not None
    vitals.close()


@linux
@pytest.mark.parametrize("content", [b"", b"12", b"one two three", b"1 2 3 4"])
def test_a_schedstat_of_another_form(
    here: LoopVitals, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: content)
    reading = here.read(0.0)
    assert (reading.queued, reading.turns) == (0.0, 0)


def test_who_waits_for_the_gil_keeps_waking() -> None:
    interval = sys.getswitchinterval()
    assert kept_waking(100, 100 * interval)
    assert kept_waking(25, 100 * interval)
    assert not kept_waking(24, 100 * interval)
    assert not kept_waking(0, 1.0)
    assert not kept_waking(5, 0.0)
    assert not kept_waking(0, -1.0)
