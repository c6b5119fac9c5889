"""The watchdog looks when the loop has been held for half of the threshold, and forgets what was none."""

from __future__ import annotations

import gc
import math
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest

from asyncguard._request import RequestRecord
from asyncguard.blocking import _watchdog
from asyncguard.blocking._load import LoopLoad
from asyncguard.blocking._lookups import CollectorHeld, RawStack
from asyncguard.blocking._stall import Others, OtherThread
from asyncguard.blocking._vitals import Reading
from asyncguard.blocking._watchdog import Watchdog, Watched

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

THRESHOLD = 0.02


class Probe:
    """A loop that is held since when a test says so."""

    def __init__(self) -> None:
        self.outside = 0
        self.since: float | None = None
        self.rests = False
        self.rested = threading.Semaphore(0)
        self.marks: list[tuple[float, float | None]] = []

    def held_since(self) -> float | None:
        return self.since

    def runner(self) -> Any:
        return None

    def hold_began(self, turn: float) -> float:
        return turn

    def resumed(self) -> Iterable[RequestRecord]:
        return ()

    def rest(self) -> bool:
        self.rested.release()
        return self.rests

    def mark(self, now: float, cpu: float | None) -> None:
        self.marks.append((now, cpu))

    def attach(self) -> None: ...
    def aftermath_began(self) -> None: ...
    def threshold_changed(self) -> None: ...
    def end_rest(self) -> None: ...
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
        self.hang_after = math.inf
        self.resting = False
        self.in_flight = {RequestRecord({"type": "http"}, 0.0)}
        self.load = LoopLoad(1000.0)
        self.hangs: list[tuple[float, RequestRecord | None]] = []
        self._woke = threading.Semaphore(0)
        self.dog = Watchdog(cast(Watched, self))

    def note_hang(self, seconds: float, record: RequestRecord | None) -> None:
        self.hangs.append((seconds, record))

    def is_alive(self) -> bool:
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
    samples, _, _ = kennel.dog.seen(0.0, clock.now, kennel.dog.read())
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
    samples, _, _ = kennel.dog.seen(kennel.probe.since, clock.now, kennel.dog.read())
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
    _, _, spent = kennel.dog.seen(start, clock.now, kennel.dog.read())
    assert spent.at == 10


def test_it_ends_with_what_it_watches(clock: TurnedClock) -> None:
    kennel = Kennel()
    before = set(threading.enumerate())
    kennel.dog.start("watchdog")
    started = set(threading.enumerate()) - before
    resting = {"watchdog-resting"} if sys.platform == "linux" else set()
    assert {thread.name for thread in started} == {"watchdog"} | resting
    assert all(thread.daemon for thread in started)
    kennel.probe.since = clock.now
    clock.turn(THRESHOLD)
    kennel.wait()
    assert looks(kennel, clock) >= 1
    kennel.live = False
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()
    # The watch may stay in a table as long as its loop lives: it must not keep what it saw.
    assert looks(kennel, clock) == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_look(
    kennel: Kennel, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    """Up to Python 3.11 a collection there may crash the process; how it was before is how it is after."""
    during: list[bool] = []

    def look(*arguments: object) -> RawStack:
        during.append(gc.isenabled())
        return RawStack((), None, 0, None)

    monkeypatch.setattr(_watchdog, "read_stack", look)
    (gc.enable if enabled else gc.disable)()
    try:
        kennel.probe.since = clock.now
        clock.turn(THRESHOLD)
        kennel.wait()
        kennel.probe.since = None
        kennel.wait()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert during
    assert set(during) == {enabled and sys.version_info >= (3, 12)}


def test_forked_in_the_middle_of_a_look(kennel: Kennel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has no watchdog that would let the garbage collector go on."""
    monkeypatch.setattr(CollectorHeld, "NEEDED", True)
    try:
        kennel.dog._collector.__enter__()
        assert not gc.isenabled()
        kennel.dog.abandon()
        assert gc.isenabled()
    finally:
        gc.enable()


def test_what_it_overslept_counts_once(
    kennel: Kennel, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it wakes while the loop's thread takes the reading that shows it to be late."""
    take = kennel.dog._vitals.read
    me = threading.current_thread()

    def take_slowly(overslept: float) -> Reading:
        reading = take(overslept)
        if threading.current_thread() is me:
            kennel.wait()
        return reading

    kennel.wait()
    kennel.probe.since = start = clock.now
    kennel.wait()
    monkeypatch.setattr(kennel.dog._vitals, "read", take_slowly)
    clock.turn(1.0)
    reading = kennel.dog.read()
    _, _, spent = kennel.dog.seen(start, clock.now, reading)
    # But for its nap, which was in time, and for waking up.
    assert 0.9 < spent.overslept < 1.0
    kennel.dog.begin_anew(reading)
    kennel.probe.since = start = clock.now
    clock.turn(THRESHOLD / 10)
    _, _, spent = kennel.dog.seen(start, clock.now, kennel.dog.read())
    assert spent.overslept == 0.0


def test_what_it_loses_while_awake_counts_as_overslept(
    kennel: Kennel, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may be stopped at any moment."""
    take = kennel.dog._vitals.read
    me = threading.current_thread()
    stops = [1.0]

    def be_stopped(overslept: float) -> Reading:
        reading = take(overslept)
        if stops and threading.current_thread() is not me:
            clock.turn(stops.pop())
        return reading

    kennel.wait()
    before = kennel.dog.read().overslept
    monkeypatch.setattr(kennel.dog._vitals, "read", be_stopped)
    kennel.wait()
    assert 0.9 < kennel.dog.read().overslept - before < 1.0


def test_an_answer_that_came_too_late_is_no_beginning(
    kennel: Kennel, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was stopped after nothing had held the loop; by then, something did."""
    start = clock.now

    def be_stopped() -> float | None:
        if kennel.probe.since is None:
            kennel.probe.since = start
            clock.turn(1.0)
            return None
        return kennel.probe.since

    kennel.wait()
    monkeypatch.setattr(kennel.probe, "held_since", be_stopped)
    kennel.wait()
    _, _, spent = kennel.dog.seen(start, clock.now, kennel.dog.read())
    assert spent.at >= 1.0
    assert 0.9 < spent.overslept < 1.0


def test_a_reading_that_took_too_long_is_no_beginning(
    kennel: Kennel, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was stopped in the middle of it: what it says of the resting thread is of after that."""
    take = kennel.dog._vitals.read
    me = threading.current_thread()
    start = clock.now

    def be_stopped(overslept: float) -> Reading:
        reading = take(overslept)
        if threading.current_thread() is not me and kennel.probe.since is None and waited:
            kennel.probe.since = start
            clock.turn(1.0)
        return reading._replace(resting_turns=int(clock.now - start) * 2)

    waited = False
    monkeypatch.setattr(kennel.dog._vitals, "read", be_stopped)
    kennel.wait()
    waited = True
    kennel.wait()
    _, _, spent = kennel.dog.seen(start, clock.now, kennel.dog.read())
    assert spent.resting_turns == 2


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


# -- one wake-up after the other, without a thread -----------------------------------------------------


@pytest.fixture
def tame(clock: TurnedClock) -> Iterator[Kennel]:
    """A kennel whose watchdog has no thread: a test wakes it up."""
    kennel = Kennel()
    yield kennel
    kennel.dog.abandon()


def wake_up(kennel: Kennel, clock: TurnedClock, after: float = 0.0, *, late: float = 0.0) -> float:
    """Have it wake up after a nap, or so much later than it should; returns how long it wants to nap next."""
    kennel.dog._expect(clock.now, clock.now + after)
    clock.turn(after + late)
    return kennel.dog._wake_up()


def test_without_a_request_for_a_while_it_takes_its_time(tame: Kennel, clock: TurnedClock) -> None:
    """The server's own timers run on; but each look still comes before a hold is a stall."""
    requests = set(tame.in_flight)

    def nap() -> float:
        tame.load.busy += 0.001
        return wake_up(tame, clock, 0.6) / THRESHOLD

    tame.in_flight.clear()
    assert nap() <= 0.5
    assert 0.5 < nap() < 1
    tame.in_flight |= requests
    assert nap() <= 0.5
    tame.in_flight.clear()
    assert nap() <= 0.5
    assert 0.5 < nap() < 1
    tame.probe.since = clock.now
    assert wake_up(tame, clock, 0.3 * THRESHOLD) <= 0.25 * THRESHOLD  # until half of it, and no longer


class Vitals:
    """Readings that a test makes up."""

    def __init__(self, clock: TurnedClock) -> None:
        self.clock = clock
        self.used: float | None = 0.0
        self.turns = 0
        self.watchdog_turns = 0
        self.takes = 0.0

    def read(self, overslept: float) -> Reading:
        self.clock.turn(self.takes)
        return Reading(self.clock.now, self.used, 0.0, self.turns, 0.0, 0.0, self.watchdog_turns, overslept)

    def cpu(self) -> float | None:
        return self.used

    def close(self) -> None: ...


@pytest.fixture
def vitals(tame: Kennel, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vitals]:
    vitals = Vitals(clock)
    with monkeypatch.context() as patched:
        patched.setattr(tame.dog, "_vitals", vitals)
        yield vitals


class Threads:
    """Other threads that compute when a test says so."""

    def __init__(self) -> None:
        self.busy: Others = ()
        self.apart_from: set[int] = set()
        self.anew = 0

    def begin_anew(self) -> None:
        self.anew += 1

    def computing(self) -> Others:
        return self.busy


@pytest.fixture
def threads(tame: Kennel, monkeypatch: pytest.MonkeyPatch) -> Threads:
    threads = Threads()
    monkeypatch.setattr(tame.dog, "_others", threads)
    return threads


def others_seen(kennel: Kennel, clock: TurnedClock) -> list[Others]:
    _, others, _ = kennel.dog.seen(0.0, clock.now, kennel.dog._vitals.read(0.0))
    return others


def test_it_naps_for_half_of_the_threshold_at_most(tame: Kennel, clock: TurnedClock) -> None:
    assert wake_up(tame, clock) == THRESHOLD / 2
    tame.probe.since = clock.now
    clock.turn(THRESHOLD / 8)
    # It wakes when half of the threshold is over.
    assert wake_up(tame, clock) == pytest.approx(THRESHOLD * 3 / 8)
    assert wake_up(tame, clock, THRESHOLD / 4) == THRESHOLD / 8
    # In a hold it looks the more rarely the longer it lasts.
    assert wake_up(tame, clock, THRESHOLD / 8) == THRESHOLD / 4
    assert wake_up(tame, clock, 4.0) == pytest.approx(0.5, rel=0.01)
    assert wake_up(tame, clock, 100.0) == 1.0


def test_after_a_second_without_an_iteration_it_rests(tame: Kennel, clock: TurnedClock) -> None:
    tame.probe.rests = True
    tame.load.busy = 0.001
    for _ in range(3):
        assert wake_up(tame, clock, 0.3) == THRESHOLD / 2
    assert wake_up(tame, clock, 0.8) == 1.0
    # An iteration since: it stays awake for another second.
    tame.load.busy = 0.002
    assert wake_up(tame, clock, 1.0) == THRESHOLD / 2
    assert wake_up(tame, clock, 1.0) == 1.0


def test_where_nobody_would_wake_it_it_does_not_rest(tame: Kennel, clock: TurnedClock) -> None:
    wake_up(tame, clock)
    assert wake_up(tame, clock, 2.0) == THRESHOLD / 2
    assert tame.probe.rested.acquire(blocking=False)


def test_in_a_hold_it_does_not_rest(tame: Kennel, clock: TurnedClock) -> None:
    tame.probe.rests = True
    tame.probe.since = clock.now
    assert wake_up(tame, clock, 2.0) == pytest.approx(0.25)
    assert not tame.probe.rested.acquire(blocking=False)


def test_the_load_is_marked_at_each_look(tame: Kennel, vitals: Vitals, clock: TurnedClock) -> None:
    vitals.used = 7.0
    wake_up(tame, clock)
    tame.probe.since = clock.now
    wake_up(tame, clock)
    wake_up(tame, clock, THRESHOLD)
    # In the middle of a hold, what it costs is not read.
    assert tame.probe.marks == [(1000, 7.0), (1000, 7.0), (1000 + THRESHOLD, None)]


def test_a_hang_is_told_of_at_each_look(tame: Kennel, clock: TurnedClock) -> None:
    record = tame.turn = RequestRecord({"type": "http", "method": "GET", "path": "/"}, 0.0)
    tame.hang_after = 10.0
    tame.probe.since = clock.now
    for _ in range(9):
        wake_up(tame, clock, 1.0)
    assert tame.hangs == []
    for _ in range(2):
        wake_up(tame, clock, 1.0)
    assert tame.hangs == [(10.0, record), (11.0, record)]


def test_a_hang_of_nobodys(tame: Kennel, clock: TurnedClock) -> None:
    """With the threshold longer than that, nothing has been looked at yet."""
    tame.threshold, tame.hang_after = 1000.0, 10.0
    tame.probe.since = clock.now
    wake_up(tame, clock, 10.0)
    assert tame.hangs == [(10.0, None)]


def test_a_process_that_was_stopped_does_not_hang(tame: Kennel, clock: TurnedClock) -> None:
    """The watchdog overslept as well; only what it was awake for counts."""
    tame.hang_after = 10.0
    wake_up(tame, clock)
    tame.probe.since = clock.now
    wake_up(tame, clock)
    wake_up(tame, clock, late=3600.0)
    assert tame.hangs == []
    wake_up(tame, clock, 9.0)
    assert tame.hangs == []
    wake_up(tame, clock, 1.01)
    assert [round(seconds) for seconds, _ in tame.hangs] == [3610]
    # The next hold is another one.
    tame.probe.since = clock.now
    wake_up(tame, clock, 10.0)
    assert [round(seconds) for seconds, _ in tame.hangs] == [3610, 10]


def test_how_late_it_is(tame: Kennel, vitals: Vitals, clock: TurnedClock) -> None:
    wake_up(tame, clock)
    assert tame.dog.late(clock.now) == 0.0
    clock.turn(0.105)  # it is past its time, and still asleep
    assert tame.dog.late(clock.now) == pytest.approx(0.1)
    assert tame.dog.read().overslept == pytest.approx(0.1)
    tame.probe.since = clock.now - 0.1
    tame.dog._wake_up()
    # In a hold that is kept, once it is awake.
    assert tame.dog.late(clock.now) == pytest.approx(0.1)
    wake_up(tame, clock, 0.1, late=0.205)
    assert tame.dog.late(clock.now) == pytest.approx(0.3)
    _, _, spent = tame.dog.seen(0.0, clock.now, tame.dog.read())
    assert spent.overslept == pytest.approx(0.3)
    # Until the stall was taken down.
    tame.dog.begin_anew(tame.dog.read())
    assert tame.dog.late(clock.now) == 0.0


def test_on_time_it_is_not_late(tame: Kennel, vitals: Vitals, clock: TurnedClock) -> None:
    tame.probe.since = clock.now
    wake_up(tame, clock)
    wake_up(tame, clock, 0.5, late=0.005)  # waking up takes its time
    assert tame.dog.late(clock.now) == 0.0


def test_kept_from_the_gil(tame: Kennel, vitals: Vitals, clock: TurnedClock) -> None:
    """Both threads kept waking, once per switch interval each, and neither got it."""
    interval = sys.getswitchinterval()
    wake_up(tame, clock)
    clock.turn(100 * interval + 0.005)
    vitals.turns, vitals.watchdog_turns = 80, 100
    assert tame.dog.kept_from_gil(tame.dog.read()) == pytest.approx(80 * interval)
    # A watchdog that slept soundly was stopped, with all of the process.
    vitals.watchdog_turns = 1
    assert tame.dog.kept_from_gil(tame.dog.read()) == 0.0


def test_a_watchdog_on_time_was_not_kept_from_the_gil(
    tame: Kennel, vitals: Vitals, clock: TurnedClock
) -> None:
    wake_up(tame, clock)
    vitals.turns, vitals.watchdog_turns = 80, 100
    assert tame.dog.kept_from_gil(tame.dog.read()) == 0.0


def test_the_next_stall_does_not_pass_within_the_nap_of_a_long_one(tame: Kennel, clock: TurnedClock) -> None:
    tame.dog._expect(clock.now, clock.now + 1.0)
    tame.dog.begin_anew(tame.dog.read())
    assert not tame.dog._bell.locked()
    assert tame.dog._bell.acquire(blocking=False)
    tame.dog._expect(clock.now, clock.now + THRESHOLD / 2)
    tame.dog.begin_anew(tame.dog.read())
    assert tame.dog._bell.locked()


BUSY: Others = (OtherThread("worker", (), 1.0),)


def test_others_are_looked_at_while_the_loops_thread_does_not_compute(
    tame: Kennel, vitals: Vitals, threads: Threads, clock: TurnedClock
) -> None:
    wake_up(tame, clock)
    threads.busy = BUSY
    tame.probe.since = clock.now
    wake_up(tame, clock, THRESHOLD)
    assert others_seen(tame, clock) == [BUSY]
    tame.dog.read()
    assert others_seen(tame, clock) == [BUSY, BUSY]
    # It computes itself: who else did does not matter.
    vitals.used = THRESHOLD / 2
    wake_up(tame, clock)
    assert others_seen(tame, clock) == [BUSY, BUSY]
    # Nobody else did.
    vitals.used, threads.busy = 0.0, ()
    wake_up(tame, clock)
    assert others_seen(tame, clock) == [BUSY, BUSY]
    tame.dog.begin_anew(vitals.read(0.0))
    assert others_seen(tame, clock) == []


def test_a_late_watchdog_looks_at_others_though_nothing_holds_the_loop(
    tame: Kennel, vitals: Vitals, threads: Threads, clock: TurnedClock
) -> None:
    """The loop has not got the GIL back from its poll yet, and is about to find out."""
    wake_up(tame, clock)
    anew = threads.anew
    threads.busy = BUSY
    wake_up(tame, clock, late=THRESHOLD)
    assert others_seen(tame, clock) == [BUSY]
    assert threads.anew == anew
    # All is well again at the next look.
    wake_up(tame, clock)
    assert others_seen(tame, clock) == []


def test_where_the_system_does_not_tell_nobody_is_looked_at(
    tame: Kennel, vitals: Vitals, threads: Threads, clock: TurnedClock
) -> None:
    vitals.used, threads.busy = None, BUSY
    wake_up(tame, clock)
    tame.probe.since = clock.now
    wake_up(tame, clock, THRESHOLD)
    assert others_seen(tame, clock) == []


def test_a_reading_that_was_held_up_is_no_beginning(
    tame: Kennel, vitals: Vitals, threads: Threads, clock: TurnedClock
) -> None:
    wake_up(tame, clock)
    anew = threads.anew
    vitals.takes = 2 * THRESHOLD
    wake_up(tame, clock)
    assert threads.anew == anew
    # Each number that it reads lets the GIL go, and the loop's thread may be quick to take it.
    vitals.takes = 0.75 * THRESHOLD
    wake_up(tame, clock)
    assert threads.anew == anew + 1
