"""Each probe tells when its loop is held, exactly where it can, and leaves the loop as it was."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import uvloop

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
        self.turn: object = None
        self.turn_since = 0.0
        self.ended = False
        self.aftermath: Aftermath | None = None
        self.stalled_until = 0.0
        self.stalls: list[tuple[float, float]] = []
        self.log: list[str] = []

    def stalled(self, start: float, end: float) -> None:
        self.stalls.append((start, end))
        self.log.append("stalled")
        self.stalled_until = end
        self.aftermath = Aftermath(rounds=6)

    def end_from_outside(self) -> None:
        self.ended = True

    def settle(self) -> None:
        self.log.append("settle")

    def close_aftermath(self) -> None:
        self.log.append("close")
        self.aftermath = None


class AnyLoop:
    """A loop that selector probes do no more with than to keep in mind."""


ANY_LOOP = cast(asyncio.AbstractEventLoop, AnyLoop())


def selector_probe(watch: Watch, selector: Any) -> SelectorProbe:
    probe = SelectorProbe(as_watch(watch), ANY_LOOP, selector)
    assert probe.held_since() is None
    probe.attach()
    return probe


def as_watch(watch: Watch) -> LoopWatch:
    return cast(LoopWatch, watch)


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
    assert watch.log == ["stalled", "settle", "close"]
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
    assert watch.log == ["stalled", "settle", "settle"]


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

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(delay, callback))
        return self.timers[-1]

    def call_soon(self, callback: Callable[[], None]) -> None:
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
    probe = HeartbeatProbe(as_watch(watch), cast(asyncio.AbstractEventLoop, loop))
    assert probe.held_since() is None
    probe.attach()
    loop.run_soon()
    return probe, loop


def test_a_beat_on_time(clock: TurnedClock) -> None:
    watch = Watch()
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
    watch.turn, watch.turn_since = object(), clock.now
    clock.turn(0.5)
    assert probe.held_since() == 1001
    clock.turn(10)
    assert probe.held_since() == 1001
    watch.turn_since = 1005
    assert probe.held_since() == 1002


def test_a_long_turn_is_exact_and_the_late_beat_adds_nothing(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    clock.turn(12)
    probe.long_turn(1000.25, 1012)
    assert watch.stalls == [(1000.25, 1012)]
    clock.turn(1)
    loop.timers[0].callback()
    assert watch.stalls == [(1000.25, 1012)]


def test_a_hold_after_a_long_turn_is_a_stall_of_its_own(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    clock.turn(12)
    probe.long_turn(1000.25, 1012)
    clock.turn(15)
    loop.timers[0].callback()
    assert watch.stalls == [(1000.25, 1012), (1012, 1027)]


def test_the_aftermath_settles_once_an_iteration(clock: TurnedClock) -> None:
    watch = Watch()
    probe, loop = heartbeat(watch)
    clock.turn(12)
    probe.long_turn(1000, 1012)
    probe.long_turn(1012, 1024)
    assert len(loop.soon) == 1
    for _ in range(3):
        loop.run_soon()
    assert watch.log == ["stalled", "stalled", "settle", "settle", "settle"]
    watch.close_aftermath()
    loop.run_soon()
    assert loop.soon == []
    probe.long_turn(1030, 1042)
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
    probe.long_turn(1000, 1012)
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
    probe.long_turn(0, 100)
    assert watch.stalls == [(0, 100)]


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
