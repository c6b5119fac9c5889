"""The watchdog looks when the loop has been held for half of the threshold, and forgets what was none."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from asyncguard._request import RequestRecord
from asyncguard.blocking._watchdog import Watchdog

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

THRESHOLD = 0.02


class Probe:
    """A loop that is held since when a test says so."""

    def __init__(self) -> None:
        self.outside = 0
        self.since: float | None = None

    def held_since(self) -> float | None:
        return self.since

    def runner(self) -> Any:
        return None

    def attach(self) -> None: ...
    def long_turn(self, since: float, until: float) -> None: ...
    def threshold_changed(self) -> None: ...
    def pause(self) -> None: ...
    def detach(self) -> None: ...
    def forget(self) -> None: ...


class Kennel:
    """A watchdog whose wake-ups a test can wait for."""

    def __init__(self) -> None:
        self.probe = Probe()
        self.turn: RequestRecord | None = None
        self.live = True
        self.threshold = THRESHOLD
        self._woke = threading.Semaphore(0)
        self.dog = Watchdog(
            self.probe,
            threshold=lambda: self.threshold,
            turn=lambda: self.turn,
            alive=self._alive,
        )

    def _alive(self) -> bool:
        self._woke.release()
        return self.live

    def wait(self) -> None:
        """Until it has woken, looked and gone to sleep twice from now on."""
        while self._woke.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._woke.acquire(timeout=30)


@pytest.fixture
def kennel(clock: TurnedClock) -> Iterator[Kennel]:
    before = set(threading.enumerate())
    kennel = Kennel()
    kennel.dog.start("watchdog")
    yield kennel
    kennel.dog.stop()
    kennel.dog.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


def looks(kennel: Kennel, clock: TurnedClock) -> int:
    samples, _ = kennel.dog.seen(0.0, clock.now, kennel.dog.read())
    return len(samples)


def test_it_looks_from_half_of_the_threshold_on(kennel: Kennel, clock: TurnedClock) -> None:
    kennel.wait()
    assert looks(kennel, clock) == 0
    kennel.probe.since = clock.now
    kennel.wait()
    assert looks(kennel, clock) == 0
    clock.turn(0.6 * THRESHOLD)
    record = kennel.turn = RequestRecord({"type": "http", "method": "GET", "path": "/"}, 0.0)
    kennel.wait()
    assert looks(kennel, clock) >= 1
    samples, _ = kennel.dog.seen(kennel.probe.since, clock.now, kennel.dog.read())
    assert {sample.record for sample in samples} == {record}
    assert {sample.at for sample in samples} == {clock.now}
    # The thread that it looks at is the one that made it: this one.
    names = {frame.code.co_name for frame in samples[0].frames}
    assert "test_it_looks_from_half_of_the_threshold_on" in names
    # A look after the stall is none of it.
    assert kennel.dog.seen(kennel.probe.since, clock.now - 0.001, kennel.dog.read())[0] == []


def test_what_was_no_stall_is_forgotten(kennel: Kennel, clock: TurnedClock) -> None:
    kennel.probe.since = clock.now
    clock.turn(0.6 * THRESHOLD)
    kennel.wait()
    assert looks(kennel, clock) >= 1
    clock.turn(0.1 * THRESHOLD)
    kennel.probe.since = clock.now
    kennel.wait()
    assert looks(kennel, clock) == 0
    clock.turn(0.6 * THRESHOLD)
    kennel.wait()
    assert looks(kennel, clock) >= 1
    clock.turn(0.1 * THRESHOLD)
    kennel.probe.since = None
    kennel.wait()
    assert looks(kennel, clock) == 0


def test_looks_are_bounded(kennel: Kennel, clock: TurnedClock) -> None:
    kennel.probe.since = clock.now
    clock.turn(0.6 * THRESHOLD)
    for _ in range(50):
        kennel.wait()
    assert looks(kennel, clock) == 64


def test_a_stall_that_was_taken_down_is_forgotten(kennel: Kennel, clock: TurnedClock) -> None:
    kennel.probe.since = clock.now
    clock.turn(THRESHOLD)
    kennel.wait()
    kennel.probe.since = None
    kennel.dog.begin_anew(kennel.dog.read())
    assert looks(kennel, clock) == 0


def test_what_was_spent_counts_from_the_beginning_of_the_hold(kennel: Kennel, clock: TurnedClock) -> None:
    kennel.wait()
    clock.turn(100)
    kennel.wait()
    kennel.probe.since = start = clock.now
    kennel.wait()
    clock.turn(5)
    kennel.wait()
    clock.turn(5)
    _, spent = kennel.dog.seen(start, clock.now, kennel.dog.read())
    assert spent.at == 10


def test_it_ends_with_what_it_watches(clock: TurnedClock) -> None:
    kennel = Kennel()
    before = set(threading.enumerate())
    kennel.dog.start("watchdog")
    (thread,) = set(threading.enumerate()) - before
    assert (thread.name, thread.daemon) == ("watchdog", True)
    kennel.live = False
    thread.join(30)
    assert not thread.is_alive()


def test_no_thread_to_be_had(clock: TurnedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    callbacks = list(gc.callbacks)
    kennel = Kennel()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        kennel.dog.start("watchdog")
    assert gc.callbacks == callbacks


def test_it_wakes_for_a_shorter_threshold(kennel: Kennel, clock: TurnedClock) -> None:
    """Its nap is as long as the threshold allows; a shorter one ends it."""
    kennel.threshold = 10_000.0
    kennel.wait()
    kennel.threshold = THRESHOLD
    kennel.dog.wake()
    kennel.wait()
    kennel.probe.since = clock.now
    clock.turn(THRESHOLD)
    kennel.wait()
    assert looks(kennel, clock) >= 1


def test_a_look_that_fails_is_logged_once_and_tried_again(
    kennel: Kennel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = threading.Semaphore(0)

    def broken() -> float:
        asked.release()
        raise RuntimeError("no stack to be had")

    kennel.wait()
    monkeypatch.setattr(kennel.probe, "held_since", broken)
    for _ in range(2):
        assert asked.acquire(timeout=30)
        kennel.dog.wake()
    assert asked.acquire(timeout=30)
    monkeypatch.undo()
    kennel.dog.wake()
    kennel.wait()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["asyncguard failed to look at the loop; it goes on trying in silence"]
