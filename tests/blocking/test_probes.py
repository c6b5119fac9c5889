"""Each probe tells when its loop is held, exactly where it can, and leaves the loop as it was."""

from __future__ import annotations

import asyncio
import gc
import selectors
import sys
import threading
import weakref
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import uvloop

from asyncguard._request import RequestRecord, current_request
from asyncguard.blocking._load import LoopLoad
from asyncguard.blocking._probes import HeartbeatProbe, SelectorProbe, attach_probe, running_loop
from asyncguard.blocking._stall import Aftermath
from asyncguard.blocking._trio import TrioProbe
from asyncguard.blocking._watch import LoopWatch

if TYPE_CHECKING:
    from tests.conftest import TurnedClock


class Watch:
    """What a probe needs of a `LoopWatch`: takes down what it is told."""

    def __init__(self, threshold: float = 10.0) -> None:
        self.threshold = threshold
        self.probe: HeartbeatProbe | None = None
        self.turn: RequestRecord | None = None
        self.in_flight: set[object] = set()
        self.resting = False
        self.load = LoopLoad(1000.0)
        self.ended = False
        self.aftermath: Aftermath | None = None
        self.stalled_until = 0.0
        self.stalls: list[tuple[float, float]] = []
        self.polls: list[tuple[float, float]] = []
        self.woken: list[float] = []
        self.steps: list[object] = []
        self.due: list[tuple[RequestRecord, float]] = []
        self.log: list[str] = []

    def stalled(self, start: float, end: float) -> None:
        self.stalls.append((start, end))
        self.log.append("stalled")
        self.stalled_until = end
        self.aftermath = Aftermath()
        if self.probe is not None:
            self.probe.aftermath_began()

    def end_from_outside(self) -> None:
        self.ended = True

    def note_long_poll(self, start: float, end: float) -> None:
        self.polls.append((start, end))

    def note_step(self, runner: object) -> None:
        self.steps.append(runner)

    def note_due(self, record: RequestRecord, due: float) -> None:
        self.due.append((record, due))

    def wake(self, now: float) -> None:
        self.woken.append(now)

    def settle(self) -> None:
        self.log.append("settle")

    def close_aftermath(self) -> None:
        self.log.append("close")
        self.aftermath = None


class AnyLoop:
    """A loop that selector probes do no more with than to look what is ready."""

    def __init__(self) -> None:
        self._ready: list[object] = []


ANY_LOOP = cast(asyncio.AbstractEventLoop, AnyLoop())


def selector_probe(watch: Watch, selector: Any) -> SelectorProbe:
    probe = SelectorProbe(as_watch(watch), ANY_LOOP, selector)
    assert probe.held_since() is None
    probe.attach()
    return probe


def as_watch(watch: Watch) -> LoopWatch:
    return cast(LoopWatch, watch)


def request(path: str) -> RequestRecord:
    return RequestRecord({"type": "http", "method": "GET", "path": path}, 0.0)


class Selector:
    """A selector whose polls a test plans: what they find, and how long they take."""

    def __init__(self, clock: TurnedClock) -> None:
        self.clock = clock
        self.polls: list[float | None] = []
        self.found: list[list[str]] = []
        self.takes = 0.0

    def select(self, timeout: float | None = None) -> list[str]:
        self.polls.append(timeout)
        self.clock.turn(self.takes)
        return self.found.pop(0) if self.found else []


# -- which probe -------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_each_loop_has_its_probe(anyio_backend: tuple[str, dict[str, bool]]) -> None:
    probe = attach_probe(as_watch(Watch()), running_loop())
    probe.attach()
    try:
        expected: type = TrioProbe
        if anyio_backend[0] == "asyncio":
            expected = HeartbeatProbe if anyio_backend[1]["use_uvloop"] else SelectorProbe
        assert type(probe) is expected
    finally:
        probe.detach()


def test_a_selector_that_cannot_be_wrapped() -> None:
    """The heart beats without it, and neither the first request nor the loop fails."""

    class Selector:
        __slots__ = ("close", "get_key", "get_map", "modify", "register", "select", "unregister")

        def __init__(self) -> None:
            inner = selectors.DefaultSelector()
            for name in self.__slots__:
                setattr(self, name, getattr(inner, name))

    async def main() -> object:
        probe = attach_probe(as_watch(Watch()), asyncio.get_running_loop())
        probe.attach()
        probe.detach()
        return probe

    loop = asyncio.SelectorEventLoop(cast(selectors.BaseSelector, Selector()))
    try:
        assert isinstance(loop.run_until_complete(main()), HeartbeatProbe)
    finally:
        loop.close()


@pytest.mark.anyio
async def test_the_running_loop(anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        assert running_loop() is trio.lowlevel.current_trio_token()
    else:
        assert running_loop() is asyncio.get_running_loop()


def test_no_running_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        running_loop()
    monkeypatch.delitem(sys.modules, "trio")
    with pytest.raises(RuntimeError, match="no event loop runs in this thread"):
        running_loop()


# -- asyncio's own loops -----------------------------------------------------------------------------


def test_an_iteration_is_timed_from_poll_to_poll(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    selector.takes = 1000  # waiting for I/O is no stall
    selector.select(None)
    assert watch.stalls == []
    since = clock.now
    assert probe.held_since() == since
    clock.turn(9.75)
    selector.select(0)
    assert watch.stalls == []
    since = clock.now
    clock.turn(10)
    selector.select(0)
    assert watch.stalls == [(since, since + 10)]


def test_attached_in_the_middle_of_an_iteration(clock: TurnedClock) -> None:
    """Only what comes after the attachment counts."""
    watch, selector = Watch(), Selector(clock)
    clock.turn(100)
    probe = selector_probe(watch, selector)
    assert probe.held_since() == 1100
    clock.turn(11)
    selector.select(0)
    assert watch.stalls == [(1100, 1111)]


def test_while_the_loop_polls_it_is_not_held(clock: TurnedClock) -> None:
    selector = Selector(clock)
    held: list[float | None] = []
    original = selector.select

    def select(timeout: float | None = None) -> list[str]:
        held.append(probe.held_since())
        return original(timeout)

    selector.select = select  # type: ignore[method-assign]
    probe = selector_probe(Watch(), selector)
    selector.select(None)
    assert held == [None]


def test_a_poll_that_raises_ends_as_any_other(clock: TurnedClock) -> None:
    selector = Selector(clock)

    def select(timeout: float | None = None) -> list[str]:
        clock.turn(50)
        raise KeyboardInterrupt

    selector.select = select  # type: ignore[method-assign]
    watch = Watch()
    probe = selector_probe(watch, selector)
    with pytest.raises(KeyboardInterrupt):
        selector.select(None)
    assert probe.held_since() == 1050
    assert watch.stalls == []


def test_after_a_stall_the_poll_looks_first_who_is_ready(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    selector.found = [["connection"], [], []]
    clock.turn(11)
    # The loop would sleep for 5: but somebody waits already, and the aftermath goes on.
    assert selector.select(5) == ["connection"]
    assert selector.polls == [0]
    assert watch.aftermath is not None
    assert probe.held_since() == clock.now
    # Nobody does now: the aftermath is over before the loop sleeps.
    assert selector.select(5) == []
    assert selector.polls == [0, 0, 5]
    assert watch.log == ["stalled", "settle", "settle", "close"]
    # And from then on there is one poll only.
    selector.select(5)
    assert selector.polls == [0, 0, 5, 5]


def test_with_callbacks_ready_there_is_no_need_to_look(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    selector_probe(watch, selector)
    clock.turn(11)
    for _ in range(3):
        selector.select(0)
    assert selector.polls == [0, 0, 0]
    assert watch.log == ["stalled", "settle", "settle", "settle"]


def test_detached_the_selector_is_as_before(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    assert "select" in vars(selector)
    probe.detach()
    assert "select" not in vars(selector)
    assert probe.held_since() is None
    clock.turn(100)
    selector.select(0)
    assert watch.stalls == []


def test_a_wrapper_that_was_there_before_is_there_again(clock: TurnedClock) -> None:
    selector = Selector(clock)
    original = selector.select

    def select(timeout: float | None = None) -> list[str]:
        return original(timeout)

    selector.select = select  # type: ignore[method-assign]
    selector_probe(Watch(), selector).detach()
    assert vars(selector).get("select") is select


def test_a_wrapper_on_top_of_ours_stays(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    ours, calls = selector.select, []

    def select(timeout: float | None = None) -> list[str]:
        calls.append(timeout)
        return ours(timeout)

    selector.select = select  # type: ignore[method-assign]
    clock.turn(11)
    selector.select(1)
    assert watch.stalls == [(1000, 1011)]
    watch.aftermath = None
    probe.detach()
    assert vars(selector)["select"] is select
    selector.found = [["event"]]
    clock.turn(100)
    assert selector.select(2) == ["event"]
    assert calls == [1, 2]
    assert selector.polls[-1] == 2
    assert len(watch.stalls) == 1
    assert probe.held_since() is None
    # A later probe goes on top, and times as well as the first.
    later = Watch()
    selector_probe(later, selector)
    clock.turn(12)
    selector.select(0)
    assert later.stalls == [(clock.now - 12, clock.now)]
    assert len(watch.stalls) == 1


def test_detached_within_a_poll(clock: TurnedClock) -> None:
    """As by a signal handler: the poll that goes on does not bring the probe back to life."""
    selector = Selector(clock)

    def select(timeout: float | None = None) -> list[str]:
        probe.detach()
        return []

    selector.select = select  # type: ignore[method-assign]
    probe = selector_probe(Watch(), selector)
    selector.select(None)
    assert probe.held_since() is None


def test_what_held_the_loop_adds_up(clock: TurnedClock) -> None:
    """Stalls or not. What becomes due during a hold of L seconds waits for L / 2 on average."""
    watch, selector = Watch(), Selector(clock)
    selector_probe(watch, selector)
    selector.takes = 7
    for held in (2, 4, 12):
        clock.turn(held)
        selector.select(None)
    assert watch.load.busy == 2 + 4 + 12
    assert watch.load.delay == (4 + 16 + 144) / 2


@pytest.mark.parametrize(("takes", "told"), [(9.75, []), (10, [(1001, 1011)])])
def test_a_long_poll_is_told(clock: TurnedClock, takes: float, told: list[tuple[float, float]]) -> None:
    """Who waits for the GIL does so at the end of the poll, where nothing else shows it."""
    watch, selector = Watch(), Selector(clock)
    selector_probe(watch, selector)
    clock.turn(1)
    selector.takes = takes
    selector.select(None)
    assert watch.polls == told


def test_a_hold_begins_with_the_iteration_or_after_what_was_told_of_it(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    assert probe.hold_began(1003) == 1000
    watch.stalled_until = 1002
    assert probe.hold_began(1003) == 1002
    probe.pause()
    assert probe.hold_began(1003) == 1003


def test_a_part_of_an_iteration_that_was_told_of_is_not_told_again(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    selector_probe(watch, selector)
    clock.turn(20)
    watch.stalled(1000, 1020)
    clock.turn(9)
    selector.select(0)
    assert watch.stalls == [(1000, 1020)]
    clock.turn(20)
    watch.stalled(clock.now - 20, clock.now)
    clock.turn(10)
    selector.select(0)
    assert watch.stalls == [(1000, 1020), (1029, 1049), (1049, 1059)]


def test_the_iteration_after_a_rest_wakes_the_watchdog(clock: TurnedClock) -> None:
    rested: list[bool] = []
    selector = Selector(clock)
    original = selector.select

    def select(timeout: float | None = None) -> list[str]:
        if timeout is None:
            rested.append(probe.rest())
            clock.turn(5)
        return original(timeout)

    selector.select = select  # type: ignore[method-assign]
    watch = Watch()
    probe = selector_probe(watch, selector)
    selector.select(None)
    assert (rested, watch.woken) == ([True], [1005])
    selector.select(0)
    assert watch.woken == [1005]


def test_a_loop_that_is_held_does_not_rest(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    assert not probe.rest()
    selector.select(0)
    assert watch.woken == []


def test_requests_that_are_ready_have_resumed(clock: TurnedClock) -> None:
    async def step() -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        probe = attach_probe(as_watch(Watch()), loop)
        record = request("/")
        context = copy_context()
        context.run(current_request.set, record)
        task = loop.create_task(step(), context=context)
        assert list(probe.resumed()) == [record]
        await task
        assert list(probe.resumed()) == []

    asyncio.run(main())


def test_the_load_is_marked_by_the_watchdog(clock: TurnedClock) -> None:
    watch, selector = Watch(), Selector(clock)
    probe = selector_probe(watch, selector)
    clock.turn(2)
    selector.select(0)
    probe.mark(1002, None)
    watch.load.busy += 100
    # A second later, so much has come since the mark; and nothing of what was before it.
    assert watch.load.utilisation(1102, 0.0).last_1s == 1.0
    assert watch.load.utilisation(1102, 0.0).last_60s == 1.0


def test_on_a_real_loop(clock: TurnedClock) -> None:
    watch = Watch()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        probe = attach_probe(as_watch(watch), loop)
        probe.attach()
        assert probe.runner() is loop
        await asyncio.sleep(0)
        loop.call_soon(clock.turn, 7)
        loop.call_soon(clock.turn, 8)
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        clock.turn(9)
        await asyncio.sleep(0.001)
        probe.detach()
        assert "select" not in vars(loop._selector)

    asyncio.run(main())
    assert watch.stalls == [(1000, 1015)]


# -- uvloop ------------------------------------------------------------------------------------------


class Timer:
    def __init__(self, delay: float, callback: Callable[[], None]) -> None:
        self.delay = delay
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop whose timers and callbacks a test runs."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.soon: list[Callable[[], None]] = []
        self.factory: Any = None
        self.closed = False

    def call_later(self, delay: float, callback: Callable[[], None], context: Context) -> Timer:
        assert not context  # the heart does not beat on behalf of a request
        self.timers.append(Timer(delay, callback))
        return self.timers[-1]

    def call_soon(self, callback: Callable[[], None], context: Context) -> None:
        assert not context
        self.soon.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], None], context: Context) -> None:
        assert not context
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.soon.append(callback)

    def run_soon(self) -> None:
        ready, self.soon = self.soon, []
        for callback in ready:
            callback()

    def get_task_factory(self) -> Any:
        return self.factory

    def set_task_factory(self, factory: Any) -> None:
        self.factory = factory


def heartbeat(watch: Watch) -> tuple[HeartbeatProbe, Loop]:
    loop = Loop()
    probe = watch.probe = HeartbeatProbe(as_watch(watch), cast(asyncio.AbstractEventLoop, loop))
    assert probe.held_since() is None
    probe.attach()
    loop.run_soon()
    return probe, loop


def test_a_beat_on_time(clock: TurnedClock) -> None:
    watch = Watch()
    watch.in_flight.add("a request")
    probe, loop = heartbeat(watch)
    assert loop.timers[0].delay == 2
    clock.turn(2)
    assert probe.held_since() is None
    loop.timers[0].callback()
    assert watch.stalls == []
    assert len(loop.timers) == 2
    clock.turn(8)  # 6 too late: may have been held for 7 on average, less than the threshold
    assert probe.held_since() == 1004
    loop.timers[1].callback()
    assert watch.stalls == []


def test_a_late_beat_shows_a_stall(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    clock.turn(20)
    assert probe.held_since() == 1002
    loop.timers[0].callback()
    # From half an interval before the beat was due: the hold may have begun at any moment before it.
    assert watch.stalls == [(1001, 1020)]
    # The beats go on.
    assert len(loop.timers) == 2
    assert probe.held_since() is None


def test_a_turn_of_a_request_is_seen_before_the_beat_is_late(clock: TurnedClock) -> None:
    watch = Watch()
    probe, _ = heartbeat(watch)
    clock.turn(1)
    watch.turn = record = request("/")
    record.turn_since = clock.now
    clock.turn(0.5)
    assert probe.held_since() == 1001
    clock.turn(10)
    assert probe.held_since() == 1001
    record.turn_since = 1005
    assert probe.held_since() == 1002


def test_a_long_turn_is_exact_and_the_late_beat_adds_nothing(clock: TurnedClock) -> None:
    watch = Watch()
    _, loop = heartbeat(watch)
    clock.turn(12)
    watch.stalled(1000.25, 1012)
    assert watch.stalls == [(1000.25, 1012)]
    clock.turn(1)
    loop.timers[0].callback()
    assert watch.stalls == [(1000.25, 1012)]


def test_what_was_told_of_holds_the_loop_no_more_though_the_beat_is_late(clock: TurnedClock) -> None:
    watch = Watch()
    probe, _ = heartbeat(watch)
    clock.turn(12)
    since = probe.held_since()
    assert since is not None
    assert since < clock.now
    watch.stalled(since, clock.now)
    assert probe.held_since() == clock.now


def test_a_hold_after_a_long_turn_is_a_stall_of_its_own(clock: TurnedClock) -> None:
    watch = Watch()
    _, loop = heartbeat(watch)
    clock.turn(12)
    watch.stalled(1000.25, 1012)
    clock.turn(15)
    loop.timers[0].callback()
    assert watch.stalls == [(1000.25, 1012), (1012, 1027)]


def test_a_hold_is_known_from_its_turn_on(clock: TurnedClock) -> None:
    probe, _ = heartbeat(Watch())
    clock.turn(5)
    assert probe.hold_began(1003) == 1003


def test_a_late_beat_counts_as_lag(clock: TurnedClock) -> None:
    """A timer 6 s late after an interval of 2: who was due in the interval waited for 6, then ever less."""
    watch = Watch()
    watch.in_flight.add("a request")
    _, loop = heartbeat(watch)
    clock.turn(2.001)  # as coarse as timers are
    loop.timers[0].callback()
    assert watch.load.delay == 0
    clock.turn(8)
    loop.timers[1].callback()
    assert watch.load.delay == 6 * 2 + 6 * 6 / 2


def test_without_requests_the_heart_stands_still(clock: TurnedClock) -> None:
    watch = Watch(threshold=1.0)
    probe, loop = heartbeat(watch)
    beats = 0
    while not watch.resting:
        clock.turn(0.2)
        loop.timers[-1].callback()
        beats += 1
    assert 5 <= beats <= 6
    assert len(loop.timers) == beats
    clock.turn(1000)
    assert probe.held_since() is None
    # Another pace does not start it, a request does.
    probe.threshold_changed()
    assert len(loop.timers) == beats
    probe.end_rest()
    assert not watch.resting
    assert len(loop.timers) == beats + 1
    probe.end_rest()
    assert len(loop.timers) == beats + 1
    assert probe.held_since() is None
    clock.turn(3)
    assert probe.held_since() == clock.now - 2.8
    loop.timers[-1].callback()
    assert [end - start for start, end in watch.stalls] == [pytest.approx(2.9)]


def test_with_requests_in_flight_or_after_a_stall_the_heart_beats_on(clock: TurnedClock) -> None:
    watch = Watch(threshold=1.0)
    watch.in_flight.add("a request")
    _, loop = heartbeat(watch)
    for _ in range(50):
        clock.turn(0.2)
        loop.timers[-1].callback()
    assert not watch.resting
    watch.in_flight.clear()
    clock.turn(2)
    loop.timers[-1].callback()
    assert (len(watch.stalls), watch.resting) == (1, False)
    for _ in range(2):
        clock.turn(0.6)
        loop.timers[-1].callback()
    assert (len(watch.stalls), watch.resting) == (1, True)


def asked_from_a_thread(probe: HeartbeatProbe) -> float | None:
    """What the watchdog sees while this thread, the loop's, runs a callback."""
    seen: list[float | None] = []
    thread = threading.Thread(target=lambda: seen.append(probe.held_since()))
    thread.start()
    thread.join()
    return seen[0]


def resting_heart(clock: TurnedClock, watch: Watch) -> tuple[HeartbeatProbe, Loop]:
    """One that has stood still since 1002."""
    probe, loop = heartbeat(watch)
    clock.turn(2)
    loop.timers[0].callback()
    assert watch.resting
    probe.outside = 0  # the frame that ran the loop, which is gone: another may have its number by now
    return probe, loop


def test_a_look_that_finds_a_resting_loop_in_a_callback_starts_the_heart(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = resting_heart(clock, watch)
    clock.turn(4)
    # It began somewhere between the last look and this one.
    assert asked_from_a_thread(probe) == 1004
    assert not watch.resting
    probe.mark(1006, None)
    probe.mark(1006, None)
    assert len(loop.soon) == 1
    clock.turn(9)
    loop.run_soon()
    assert watch.stalls == [(1004, 1015)]
    assert watch.load.delay == 11 * 11 / 2
    assert len(loop.timers) == 2
    assert probe.held_since() is None


def test_a_short_callback_in_a_rest_is_no_stall(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = resting_heart(clock, watch)
    clock.turn(4)
    asked_from_a_thread(probe)
    probe.mark(1006, None)
    clock.turn(5)
    loop.run_soon()
    assert watch.stalls == []
    assert len(loop.timers) == 2


def test_a_look_that_finds_a_resting_loop_polling_lets_it_rest(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    probe, loop = resting_heart(clock, watch)
    # While uvloop polls, the innermost frame is the one that runs the loop.
    frame = sys._getframe()
    probe.outside = id(frame)
    loops_thread = threading.get_ident()
    monkeypatch.setattr(sys, "_current_frames", lambda: {loops_thread: frame})
    clock.turn(4)
    assert asked_from_a_thread(probe) is None
    assert watch.resting
    probe.mark(clock.now, None)
    assert loop.soon == []
    # What a later look finds began after this one.
    probe.outside = 0
    clock.turn(4)
    assert asked_from_a_thread(probe) == 1008


def test_a_heart_that_was_closed_meanwhile_stays_still(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = resting_heart(clock, watch)
    clock.turn(4)
    asked_from_a_thread(probe)
    loop.closed = True
    probe.mark(1006, None)
    assert loop.soon == []
    probe.detach()
    probe.end_rest()
    assert len(loop.timers) == 1


def test_the_load_is_made_of_cpu_time_and_of_stalls_without_it(clock: TurnedClock) -> None:
    watch = Watch()
    probe, _ = heartbeat(watch)
    probe.mark(1000, 70.0)
    assert watch.load.busy == 0
    watch.load.waited = 3.0
    probe.mark(1010, 72.0)
    assert watch.load.busy == 5.0
    assert watch.load.utilisation(1010, 0.0).last_10s == 0.5
    probe.mark(1020, None)
    assert watch.load.busy == 5.0


def test_the_watchdog_goes_on_while_the_heart_stands_still(clock: TurnedClock) -> None:
    probe, _ = resting_heart(clock, Watch())
    assert not probe.rest()


def test_requests_whose_tasks_moved_have_resumed() -> None:
    async def nap(seconds: float) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(seconds)

    async def main() -> None:
        watch = Watch()
        loop = asyncio.get_running_loop()
        probe = attach_probe(as_watch(watch), loop)
        probe.attach()
        watch.in_flight.add("a request")
        tasks = []
        for path, seconds in (("/moved", 0.001), ("/waiting", 60.0)):
            context = copy_context()
            context.run(current_request.set, request(path))
            tasks.append(loop.create_task(nap(seconds), context=context))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        watch.aftermath = Aftermath()
        probe.aftermath_began()
        await tasks[0]
        assert [record.label for record in probe.resumed()] == ["GET /moved"]
        assert list(probe.resumed()) == []
        tasks[1].cancel()
        probe.detach()
        assert list(probe.resumed()) == []

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_the_aftermath_settles_once_an_iteration(clock: TurnedClock) -> None:
    watch = Watch()
    _, loop = heartbeat(watch)
    clock.turn(12)
    watch.stalled(1000, 1012)
    watch.stalled(1012, 1024)
    assert len(loop.soon) == 1
    for _ in range(3):
        loop.run_soon()
    assert watch.log == ["stalled", "stalled", "settle", "settle", "settle"]
    watch.close_aftermath()
    loop.run_soon()
    assert loop.soon == []
    watch.stalled(1030, 1042)
    assert len(loop.soon) == 1


def test_another_threshold_is_another_pace(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    watch.threshold = 1.0
    probe.threshold_changed()
    assert [timer.cancelled for timer in loop.timers] == [True, False]
    assert loop.timers[-1].delay == 0.2
    # It does not wake a heart that has stopped.
    probe.detach()
    probe.threshold_changed()
    assert len(loop.timers) == 2
    # However patient the listeners are, the heart beats.
    watch.threshold = 1e12
    _, loop = heartbeat(watch)
    assert loop.timers[0].delay <= 60
    # And however impatient, the loop sleeps in between.
    watch.threshold = 0.001
    _, loop = heartbeat(watch)
    assert loop.timers[0].delay == 0.001


def test_a_beat_that_is_late_already_tells_of_that_whatever_the_pace(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    clock.turn(20)
    watch.threshold = 5.0
    probe.threshold_changed()
    assert [timer.cancelled for timer in loop.timers] == [False]
    loop.timers[0].callback()
    assert watch.stalls == [(1001, 1020)]
    assert loop.timers[-1].delay == 1.0


def test_detached_the_heart_stops(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    probe.detach()
    assert loop.timers[0].cancelled
    clock.turn(100)
    assert probe.held_since() is None
    loop.timers[0].callback()  # it may have been due already
    assert (watch.stalls, len(loop.timers)) == ([], 1)
    assert loop.factory is None
    probe.detach()


def test_detached_in_the_aftermath(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    watch.stalled(1000, 1012)
    probe.detach()
    loop.run_soon()
    assert watch.log == ["stalled"]
    assert loop.soon == []


def test_the_probe_does_not_keep_a_closed_loop_alive() -> None:
    watch = Watch()

    async def attach() -> HeartbeatProbe:
        loop = asyncio.get_running_loop()
        probe = attach_probe(as_watch(watch), loop)
        assert isinstance(probe, HeartbeatProbe)
        probe.attach()
        return probe

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        probe = runner.run(attach())
        gone = weakref.ref(runner.get_loop())
    del runner
    probe.forget()
    gc.collect()
    assert gone() is None
    assert probe.runner() is None
    probe._beat()
    probe.aftermath_began()
    probe.end_rest()
    probe._settle()
    assert (watch.stalls, watch.log) == ([], [])


def test_a_loop_that_has_stopped_is_not_held(clock: TurnedClock) -> None:
    """It may run again later: between its runs, the time is nobody's."""
    selector = Selector(clock)
    probe = selector_probe(Watch(), selector)
    probe.pause()
    clock.turn(100)
    assert probe.held_since() is None
    selector.select(0)
    assert probe.held_since() == clock.now

    watch = Watch()
    watch.in_flight.add("a request")
    heart, loop = heartbeat(watch)
    heart.pause()
    clock.turn(100)
    assert heart.held_since() is None
    loop.timers[0].callback()
    assert watch.stalls == []
    clock.turn(100)
    loop.timers[1].callback()
    assert len(watch.stalls) == 1


def test_frames_outside_the_loop_are_told() -> None:
    """uvloop is no Python code: what its callbacks return to is the caller of `run_until_complete`."""

    async def main() -> None:
        probe = attach_probe(as_watch(Watch()), asyncio.get_running_loop())
        probe.attach()
        await asyncio.sleep(0)
        frame = sys._getframe().f_back
        while frame is not None and id(frame) != probe.outside:
            frame = frame.f_back
        assert frame is not None
        probe.detach()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# -- trio --------------------------------------------------------------------------------------------


def run_trio(clock: TurnedClock, watch: Watch, work: Callable[[TrioProbe], Any]) -> None:
    async def main() -> None:
        probe = TrioProbe(as_watch(watch))
        assert probe.held_since() is None
        probe.attach()
        try:
            await work(probe)
        finally:
            probe.detach()

    trio.run(main)


def test_trio_passes_are_timed_from_poll_to_poll(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(probe: TrioProbe) -> None:
        await trio.lowlevel.checkpoint()
        watch.aftermath = None
        since = clock.now
        assert probe.held_since() == since
        clock.turn(15)
        await trio.lowlevel.checkpoint()
        assert watch.stalls == [(since, since + 15)]
        clock.turn(9)
        await trio.lowlevel.checkpoint()
        assert len(watch.stalls) == 1

    run_trio(clock, watch, work)


def test_trio_waiting_is_no_stall(clock: TurnedClock) -> None:
    watch = Watch()

    class Wait(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            clock.turn(100 if timeout > 0 else 0)

    async def work(probe: TrioProbe) -> None:
        wait = Wait()
        trio.lowlevel.add_instrument(wait)
        await trio.sleep(0.01)
        trio.lowlevel.remove_instrument(wait)

    run_trio(clock, watch, work)
    assert clock.now > 1000
    assert watch.stalls == []


def test_trio_what_held_the_loop_adds_up(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(probe: TrioProbe) -> None:
        await trio.lowlevel.checkpoint()
        for held in (2, 4, 12):
            clock.turn(held)
            await trio.lowlevel.checkpoint()

    run_trio(clock, watch, work)
    assert watch.load.busy == 2 + 4 + 12
    assert watch.load.delay == (4 + 16 + 144) / 2


@pytest.mark.parametrize(("takes", "told"), [(9.75, []), (10.0, [(1000, 1010)])])
def test_trio_a_long_poll_is_told(clock: TurnedClock, takes: float, told: list[tuple[float, float]]) -> None:
    watch = Watch()

    class Wait(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            clock.turn(takes)

    async def work(probe: TrioProbe) -> None:
        wait = Wait()
        trio.lowlevel.add_instrument(wait)
        await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(wait)

    run_trio(clock, watch, work)
    assert watch.polls == told


def test_trio_the_pass_after_a_rest_wakes_the_watchdog(clock: TurnedClock) -> None:
    watch = Watch()
    rested: list[bool] = []
    probes: list[TrioProbe] = []

    class Rest(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            if not rested:
                rested.append(probes[0].rest())
                clock.turn(5)

    async def work(probe: TrioProbe) -> None:
        assert not probe.rest()
        await trio.lowlevel.checkpoint()
        assert watch.woken == []
        probes.append(probe)
        rest = Rest()
        trio.lowlevel.add_instrument(rest)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(rest)

    run_trio(clock, watch, work)
    assert (rested, watch.woken) == ([True], [1005])


def test_trio_a_hold_begins_with_the_pass_or_after_what_was_told_of_it(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(probe: TrioProbe) -> None:
        await trio.lowlevel.checkpoint()
        assert probe.hold_began(1003) == 1000
        watch.stalled_until = 1002
        assert probe.hold_began(1003) == 1002
        clock.turn(11)
        await trio.lowlevel.checkpoint()
        assert watch.stalls == []  # nine of the eleven are left

    run_trio(clock, watch, work)
    assert TrioProbe(as_watch(watch)).hold_began(1003) == 1003


def test_trio_tells_of_each_step_in_an_aftermath(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(probe: TrioProbe) -> None:
        await trio.lowlevel.checkpoint()
        assert watch.steps == []
        clock.turn(11)
        await trio.lowlevel.checkpoint()
        assert set(watch.steps) == {trio.lowlevel.current_task()}
        assert list(probe.resumed()) == []  # each step is told of already
        watch.aftermath = None
        steps = len(watch.steps)
        await trio.lowlevel.checkpoint()
        assert len(watch.steps) == steps

    run_trio(clock, watch, work)


def test_trio_the_load_is_marked_by_the_watchdog(clock: TurnedClock) -> None:
    watch = Watch()
    probe = TrioProbe(as_watch(watch))
    watch.load.busy = 1.0
    probe.mark(1002, None)
    assert watch.load.utilisation(1003, 0.0).last_1s == 0.0


def test_trio_aftermath_ends_before_the_loop_sleeps(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(probe: TrioProbe) -> None:
        clock.turn(11)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert "close" not in watch.log
        await trio.sleep(0.01)
        assert watch.log[0] == "stalled"
        assert watch.log[-1] == "close"
        assert set(watch.log[1:-1]) == {"settle"}

    run_trio(clock, watch, work)


def test_trio_tasks_and_frames(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(probe: TrioProbe) -> None:
        await trio.lowlevel.checkpoint()
        task = trio.lowlevel.current_task()
        assert probe.runner() is task
        frame = sys._getframe().f_back
        while frame is not None and id(frame) != probe.outside:
            frame = frame.f_back
        assert frame is not None
        assert frame.f_code.co_name == "unrolled_run"

    run_trio(clock, watch, work)


def test_between_two_trio_tasks_nobody_runs(clock: TurnedClock) -> None:
    watch = Watch()

    seen: list[object] = []
    probes: list[TrioProbe] = []

    class Look(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            seen.append(probes[0].runner())

    async def work(probe: TrioProbe) -> None:
        probes.append(probe)
        look = Look()
        trio.lowlevel.add_instrument(look)
        await trio.sleep(0.001)
        trio.lowlevel.remove_instrument(look)

    run_trio(clock, watch, work)
    assert set(seen) == {None}


def test_trio_detached_twice_or_after_the_end(clock: TurnedClock) -> None:
    watches = [Watch(), Watch()]
    probes = [TrioProbe(as_watch(watch)) for watch in watches]

    async def main() -> None:
        for probe in probes:
            probe.attach()
        probes[0].detach()
        probes[0].detach()

    trio.run(main)
    # Who was still there when the run ended was told so.
    assert [watch.ended for watch in watches] == [False, True]
    probes[1].detach()
    assert probes[1].held_since() is None
    probes[1].pause()
