"""Which other threads computed, and what they are doing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from asyncguard.blocking import _threads
from asyncguard.blocking._lookups import LivingThread
from asyncguard.blocking._threads import OtherThreads


class System:
    """Threads whose CPU clocks a test turns, by their identifier; the system has the same numbers."""

    def __init__(self) -> None:
        self.cpu: dict[int, float | None] = {}

    def living_threads(self) -> dict[int, LivingThread]:
        return {ident: LivingThread(f"thread-{ident}", ident) for ident in self.cpu}

    def thread_cpu(self, native: int | None) -> float | None:
        return self.cpu[native or 0]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    system = System()
    monkeypatch.setattr(_threads, "living_threads", system.living_threads)
    monkeypatch.setattr(_threads, "thread_cpu", system.thread_cpu)
    return system


def test_who_computed_since_the_last_time(system: System) -> None:
    system.cpu = {1: 10.0, 2: 20.0, 3: 30.0}
    others = OtherThreads(set())
    others.begin_anew()
    assert others.computing() == ()
    system.cpu = {1: 10.5, 2: 20.0, 3: 32.0}
    assert [(other.name, other.cpu) for other in others.computing()] == [("thread-3", 2.0), ("thread-1", 0.5)]
    # A look does not begin anew.
    assert len(others.computing()) == 2
    others.begin_anew()
    assert others.computing() == ()


def test_what_is_hardly_anything_is_nothing(system: System) -> None:
    system.cpu = {1: 10.0, 2: 20.0}
    others = OtherThreads(set())
    others.begin_anew()
    system.cpu = {1: 10.0005, 2: 20.0015}
    assert [other.name for other in others.computing()] == ["thread-2"]


def test_a_thread_that_is_new_has_used_all_it_has(system: System) -> None:
    others = OtherThreads(set())
    others.begin_anew()
    system.cpu = {7: 0.25}
    assert [(other.name, other.cpu) for other in others.computing()] == [("thread-7", 0.25)]


def test_the_loops_thread_and_the_watchdogs_are_none_of_them(system: System) -> None:
    others = OtherThreads({1})
    others.apart_from.add(2)
    system.cpu = {1: 10.0, 2: 20.0, 3: 1.0}
    assert [other.name for other in others.computing()] == ["thread-3"]


def test_a_thread_whose_clock_cannot_be_read_is_left_out(system: System) -> None:
    system.cpu = {1: None, 2: 1.0}
    others = OtherThreads(set())
    assert [other.name for other in others.computing()] == ["thread-2"]
    system.cpu[2] = None
    assert others.computing() == ()


def test_the_busiest_four(system: System) -> None:
    system.cpu = {ident: float(ident) for ident in range(1, 11)}
    others = OtherThreads(set())
    assert [other.cpu for other in others.computing()] == [10.0, 9.0, 8.0, 7.0]


def test_a_thread_that_has_just_ended_has_no_frames(system: System) -> None:
    ident = max(sys._current_frames()) + 1
    system.cpu = {ident: 1.0}
    ((_, frames, _),) = OtherThreads(set()).computing()
    assert frames == ()


@contextmanager
def computing_thread() -> Iterator[threading.Thread]:
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute, name="computing")
    thread.start()
    yield thread
    over.set()
    thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="the number of a thread's clock is Linux's")
def test_a_real_thread() -> None:
    others = OtherThreads({threading.get_ident()})
    others.begin_anew()
    deadline = time.monotonic() + 30
    found = None
    with computing_thread():
        while found is None:
            assert time.monotonic() < deadline
            found = next((other for other in others.computing() if other.name == "computing"), None)
    assert found.cpu >= 0.001
    assert "compute" in {frame.code.co_name for frame in found.frames}
