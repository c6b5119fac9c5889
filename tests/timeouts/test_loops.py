"""Timers, tasks at the side, and blocks that can be stopped, on every loop."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing
import uvloop

from asyncguard.timeouts._asyncio import AsyncioLoop, TaskSection
from asyncguard.timeouts._loops import Loop, Section, running_loop
from asyncguard.timeouts._trio import ScopeSection, TrioLoop

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)

variable: ContextVar[str] = ContextVar("variable", default="")
held_by_a_request: ContextVar[object] = ContextVar("held_by_a_request")


class Marker(Exception):
    pass


def soon(loop: Loop, *calls: Callable[[], object]) -> None:
    """Make the calls, in this order, once the current task waits for something."""

    def make_them() -> None:
        for call in calls:
            call()

    loop.call_later(0, make_them)


# -- a block that is stopped -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_its_own_cancellation_ends_at_the_end_of_the_block() -> None:
    loop = running_loop()
    steps: list[str] = []
    with loop.section() as section:
        soon(loop, section.cancel)
        try:
            await anyio.sleep_forever()
        finally:
            steps.append("cleaned up")
    steps.append("went on")
    await anyio.lowlevel.checkpoint()
    assert steps == ["cleaned up", "went on"]


@pytest.mark.anyio
async def test_a_block_that_nobody_stops_is_as_if_it_were_not_there() -> None:
    loop = running_loop()
    with loop.section() as section:
        await anyio.lowlevel.checkpoint()
        assert not section.is_over()
    assert section.is_over()
    with pytest.raises(Marker), loop.section():
        raise Marker


@pytest.mark.anyio
async def test_a_foreign_cancellation_passes_through() -> None:
    loop = running_loop()
    steps: list[str] = []
    with anyio.CancelScope() as foreign:
        with loop.section():
            soon(loop, foreign.cancel)
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        steps.append("went on")
    assert foreign.cancelled_caught
    assert not steps


@pytest.mark.anyio
@pytest.mark.parametrize("order", ["its own first", "the foreign one first"])
async def test_of_two_cancellations_at_once_the_foreign_one_passes_through(order: str) -> None:
    loop = running_loop()
    steps: list[str] = []
    with anyio.CancelScope() as foreign:
        with loop.section() as section:
            calls = [section.cancel, foreign.cancel]
            soon(loop, *(calls if order == "its own first" else reversed(calls)))
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        steps.append("went on")
    assert foreign.cancelled_caught
    assert not steps
    await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_a_cancellation_that_is_swallowed_is_over_at_the_end_of_the_block() -> None:
    loop = running_loop()
    steps: list[str] = []
    with loop.section() as section:
        soon(loop, section.cancel)
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            steps.append("swallowed")
    await anyio.lowlevel.checkpoint()
    assert steps == ["swallowed"]


@pytest.mark.anyio
async def test_an_error_in_cleaning_up_passes_through() -> None:
    loop = running_loop()

    async def work() -> None:
        with loop.section() as section:
            soon(loop, section.cancel)
            try:
                await anyio.sleep_forever()
            finally:
                raise Marker

    with pytest.raises(Marker):
        await work()
    await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_cancelled_again_it_is_stopped_all_the_same() -> None:
    loop = running_loop()
    steps: list[str] = []
    with loop.section() as section:
        soon(loop, section.cancel)
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            steps.append("deaf")
        soon(loop, section.cancel)
        await anyio.sleep_forever()
        steps.append("went on")
    await anyio.lowlevel.checkpoint()
    assert steps == ["deaf"]


@pytest.mark.anyio
async def test_cancelled_twice_before_its_next_step_it_is_stopped_once() -> None:
    loop = running_loop()
    with loop.section() as section:
        soon(loop, section.cancel, section.cancel)
        await anyio.sleep_forever()
    await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_after_the_end_of_the_block_cancelling_does_nothing() -> None:
    loop = running_loop()
    with loop.section() as section:
        pass
    section.cancel()
    await anyio.lowlevel.checkpoint()
    soon(loop, section.cancel)
    await anyio.sleep(0.001)
    assert section.is_over()
    assert not section.is_shielded()


@pytest.mark.anyio
async def test_of_two_blocks_in_each_other_one_is_stopped() -> None:
    loop = running_loop()
    steps: list[str] = []
    with loop.section() as outer:
        with loop.section() as inner:
            soon(loop, inner.cancel)
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        steps.append("the outer one goes on")
        with loop.section() as inner:
            soon(loop, outer.cancel)
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        steps.append("never")
    await anyio.lowlevel.checkpoint()
    assert steps == ["the outer one goes on"]


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize("foreign", [0, 1])
async def test_the_task_is_asked_to_end_as_often_as_before(foreign: int) -> None:
    """`asyncio.timeout` and `asyncio.TaskGroup` around the block count on it."""
    loop = running_loop()
    task = asyncio.current_task()
    assert task is not None
    for _ in range(foreign):
        soon(loop, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await anyio.sleep_forever()
    for deaf in (False, True):
        with loop.section() as section:
            soon(loop, section.cancel)
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                assert task.cancelling() == foreign + 1
                if not deaf:
                    raise
            soon(loop, section.cancel, section.cancel)
            await anyio.sleep_forever()
        assert task.cancelling() == foreign
    for _ in range(foreign):
        task.uncancel()


@pytest.mark.anyio
@on_asyncio
async def test_a_task_that_another_cancels_during_its_own_cancellation_ends() -> None:
    loop = running_loop()
    sections: list[Section] = []
    steps: list[str] = []

    async def work() -> None:
        with loop.section() as section:
            sections.append(section)
            await anyio.sleep_forever()
        steps.append("went on")

    task = asyncio.create_task(work())
    await anyio.lowlevel.checkpoint()
    sections[0].cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1
    assert not steps


@pytest.mark.anyio
@on_asyncio
async def test_on_asyncio_the_code_inside_may_await_while_it_cleans_up() -> None:
    loop = running_loop()
    steps: list[str] = []
    with loop.section() as section:
        soon(loop, section.cancel)
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.lowlevel.checkpoint()
            await anyio.sleep(0.001)
            steps.append("cleaned up")
    assert steps == ["cleaned up"]


@pytest.mark.anyio
@on_asyncio
async def test_inside_a_timeout_of_asyncio_each_stops_its_own() -> None:
    loop = running_loop()
    async with asyncio.timeout(30):
        with loop.section() as section:
            soon(loop, section.cancel)
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()

    async def work() -> None:
        async with asyncio.timeout(0.001):
            with loop.section():
                await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        await work()


def test_outside_a_task_nothing_is_stopped() -> None:
    """A loop's callback belongs to no task."""
    sections: list[TaskSection] = []

    def callback() -> None:
        with TaskSection() as section:
            sections.append(section)
            section.cancel()

    async def main() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert [section.is_over() for section in sections] == [True]


def test_a_task_that_has_ended_inside_is_not_cancelled() -> None:
    """Its block was never left: the coroutine was taken apart."""
    sections: list[TaskSection] = []

    async def work() -> None:
        sections.append(TaskSection().__enter__())

    async def main() -> None:
        task = asyncio.create_task(work())
        await task
        sections[0].cancel()
        assert not task.cancelling()

    asyncio.run(main())


# -- what is shielded --------------------------------------------------------------------------------


@pytest.mark.anyio
@on_asyncio
async def test_on_asyncio_a_block_tells_whether_it_is_shielded() -> None:
    with running_loop().section() as section:
        assert not section.is_shielded()
        with anyio.CancelScope(shield=True):
            assert section.is_shielded()
        assert not section.is_shielded()
    assert not section.is_shielded()


@pytest.mark.anyio
@on_asyncio
async def test_a_shield_around_the_block_does_not_keep_it_from_being_stopped() -> None:
    """A middleware may shield the whole request: what is inside was promised nothing."""
    loop = running_loop()
    steps: list[str] = []
    with anyio.CancelScope(shield=True):
        with loop.section() as section:
            assert not section.is_shielded()
            with anyio.CancelScope(shield=True):
                assert section.is_shielded()
            with anyio.CancelScope():
                assert not section.is_shielded()
            soon(loop, section.cancel)
            await anyio.sleep_forever()
        steps.append("stopped")
    await anyio.lowlevel.checkpoint()
    assert steps == ["stopped"]


@pytest.mark.anyio
@on_asyncio
async def test_a_block_in_a_task_of_a_shielded_group_is_not_shielded() -> None:
    seen: list[bool] = []

    async def child() -> None:
        with running_loop().section() as section:
            seen.append(section.is_shielded())
            with anyio.CancelScope(shield=True):
                seen.append(section.is_shielded())

    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as group:
            group.start_soon(child)
    assert seen == [False, True]


def test_on_trio_shields_are_trios_own_business() -> None:
    async def main() -> None:
        with TrioLoop().section() as section:
            section.cancel()
            with trio.CancelScope(shield=True):
                assert not section.is_shielded()
                await trio.sleep(1)
                steps.append("shielded")
            with pytest.raises(NotImplementedError):
                section.when_resumed(lambda: None)
            await trio.sleep_forever()

    steps: list[str] = []
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert steps == ["shielded"]


@pytest.mark.anyio
@on_asyncio
async def test_a_call_is_made_once_the_code_inside_has_gone_on() -> None:
    first, second, called = anyio.Event(), anyio.Event(), anyio.Event()
    sections: list[Section] = []
    steps: list[str] = []

    def call() -> None:
        steps.append("called")
        called.set()

    async def work() -> None:
        with running_loop().section() as section:
            sections.append(section)
            await first.wait()
            steps.append("went on")
            await second.wait()
        steps.append("ended")

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await anyio.wait_all_tasks_blocked()
        sections[0].when_resumed(call)
        await anyio.lowlevel.checkpoint()
        assert steps == []
        first.set()
        with anyio.fail_after(30):
            await called.wait()
        assert steps == ["went on", "called"]
        second.set()
    assert steps == ["went on", "called", "ended"]


@pytest.mark.anyio
@on_asyncio
async def test_code_that_is_about_to_go_on_is_looked_at_again_soon() -> None:
    called = anyio.Event()
    with running_loop().section() as section:
        section.when_resumed(called.set)
        with anyio.fail_after(30):
            await called.wait()
    called = anyio.Event()
    section.when_resumed(called.set)
    with anyio.fail_after(30):
        await called.wait()


@pytest.mark.anyio
@on_asyncio
async def test_as_soon_as_a_shield_ends_the_block_can_be_stopped() -> None:
    """What the shield was given for is done, and nothing after it."""
    loop = running_loop()
    release = anyio.Event()
    steps: list[str] = []
    with loop.section() as section:

        def stop() -> None:
            if section.is_shielded():
                steps.append("shielded")
                section.when_resumed(stop)
                release.set()
            else:
                section.cancel()

        soon(loop, stop)
        with anyio.CancelScope(shield=True):
            await release.wait()
            steps.append("done")
        await anyio.sleep_forever()
        steps.append("never")
    assert steps == ["shielded", "done"]


# -- timers ------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_timer_calls_once_in_an_empty_context() -> None:
    loop = running_loop()
    called = anyio.Event()
    seen: list[str] = []

    def call() -> None:
        seen.append(variable.get())
        variable.set("by the timer")
        called.set()

    variable.set("of the request")
    loop.call_later(0.001, call)
    with anyio.fail_after(30):
        await called.wait()
    await anyio.wait_all_tasks_blocked()
    assert (seen, variable.get()) == ([""], "of the request")


@pytest.mark.anyio
async def test_what_a_timer_sets_in_its_context_is_not_there_for_the_next() -> None:
    loop = running_loop()
    last = anyio.Event()
    seen: list[str] = []

    def call(name: str) -> None:
        seen.append(variable.get())
        variable.set(name)

    for name in ("first", "second"):
        loop.call_later(0.001, functools.partial(call, name))
    loop.call_later(0.002, last.set)
    with anyio.fail_after(30):
        await last.wait()
    assert seen == ["", ""]


@pytest.mark.anyio
async def test_what_a_timer_holds_back_holds_nothing_of_the_request() -> None:
    """It may be set for minutes, long after the request has ended."""

    class Held:
        pass

    loop, held = running_loop(), Held()
    gone = weakref.ref(held)
    token = held_by_a_request.set(held)
    timer = loop.call_later(3600, print)
    held_by_a_request.reset(token)
    del held, token
    assert gone() is None
    timer.cancel()


@pytest.mark.anyio
async def test_a_timer_that_was_called_off_does_not_call() -> None:
    loop = running_loop()
    seen: list[str] = []
    later = anyio.Event()
    timer = loop.call_later(0.001, functools.partial(seen.append, "called off"))
    timer.cancel()
    timer.cancel()
    loop.call_later(0.002, later.set)
    with anyio.fail_after(30):
        await later.wait()
    assert not seen
    timer.cancel()  # too late, and no harm


@pytest.mark.anyio
async def test_timers_call_in_their_order() -> None:
    loop = running_loop()
    seen: list[int] = []
    last = anyio.Event()
    for number in (3, 1, 2):
        loop.call_later(number / 100, functools.partial(seen.append, number))
    loop.call_later(0.05, last.set)
    with anyio.fail_after(30):
        await last.wait()
    assert seen == [1, 2, 3]


# -- from another thread -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_call_from_another_thread_is_made_on_the_loops() -> None:
    loop = running_loop()
    called = anyio.Event()
    threads: list[int] = []

    def call() -> None:
        threads.append(threading.get_ident())
        called.set()

    await anyio.to_thread.run_sync(loop.call_threadsafe, call)
    with anyio.fail_after(30):
        await called.wait()
    assert threads == [threading.get_ident()]


@pytest.mark.anyio
async def test_only_the_loops_thread_is_here() -> None:
    loop = running_loop()
    assert loop.is_here()
    assert not await anyio.to_thread.run_sync(loop.is_here)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop", "trio"])
def test_a_loop_that_has_ended_is_called_in_vain(kind: str) -> None:
    async def main() -> Loop:
        return running_loop()

    seen: list[str] = []
    loop = run(main, kind)
    assert not loop.is_here()
    loop.call_threadsafe(lambda: seen.append("called"))
    assert not seen


@pytest.mark.parametrize("kind", ["asyncio", "uvloop", "trio"])
def test_another_run_in_the_same_thread_is_another_loop(kind: str) -> None:
    earlier: list[Loop] = []

    async def main() -> bool:
        loop = running_loop()
        earlier.append(loop)
        return earlier[0].is_here()

    assert [run(main, kind), run(main, kind)] == [True, False]


def run(main: Callable[[], Any], kind: str) -> Any:
    if kind == "trio":
        return trio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if kind == "uvloop" else None) as runner:
        return runner.run(main())


# -- tasks at the side -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_task_at_the_side_runs_in_the_context_it_was_given() -> None:
    loop = running_loop()
    ended = anyio.Event()
    seen: list[str] = []

    async def work() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(variable.get())
        variable.set("by the task")
        ended.set()

    context = copy_context()
    context.run(variable.set, "given")
    loop.spawn(work, context)
    with anyio.fail_after(30):
        await ended.wait()
    assert seen == ["given"]
    assert (context[variable], variable.get()) == ("by the task", "")


@pytest.mark.anyio
@pytest.mark.parametrize("begun", [True, False])
async def test_a_task_at_the_side_can_be_stopped(begun: bool) -> None:
    loop = running_loop()
    steps: list[str] = []

    async def work() -> None:
        steps.append("begun")
        await anyio.sleep_forever()
        steps.append("went on")

    task = loop.spawn(work, copy_context())
    if begun:
        await anyio.wait_all_tasks_blocked()
        assert steps == ["begun"]
    task.cancel()
    await anyio.wait_all_tasks_blocked()
    assert "went on" not in steps
    task.cancel()  # it is over


@pytest.mark.anyio
async def test_a_task_at_the_side_is_not_stopped_with_the_block() -> None:
    loop = running_loop()
    release, ended = anyio.Event(), anyio.Event()

    async def work() -> None:
        await release.wait()
        ended.set()

    with loop.section() as section:
        loop.spawn(work, copy_context())
        soon(loop, section.cancel)
        await anyio.sleep_forever()
    release.set()
    with anyio.fail_after(30):
        await ended.wait()


# -- which loop it is --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_running_loop(anyio_backend: tuple[str, object]) -> None:
    kinds = {"asyncio": (AsyncioLoop, TaskSection), "trio": (TrioLoop, ScopeSection)}[anyio_backend[0]]
    loop = running_loop()
    with loop.section() as section:
        assert (type(loop), type(section)) == kinds


# -- the alarm clock of trio -------------------------------------------------------------------------


def on_trio(main: Callable[[], Any]) -> list[str]:
    """Run `main` on a clock that jumps to the next deadline; the alarm clocks that came and went."""
    seen: list[str] = []

    class Watch(trio.abc.Instrument):
        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            if task.name == "asyncguard-alarms":
                seen.append("started")

        def task_exited(self, task: trio.lowlevel.Task) -> None:
            if task.name == "asyncguard-alarms":
                seen.append("ended")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[Watch()])
    return seen


class Bell:
    """Takes down which alarms rang, and after how many seconds."""

    def __init__(self) -> None:
        self.rung: list[tuple[str, float]] = []
        self._began = trio.current_time()

    def alarm(self, name: str) -> Callable[[], None]:
        return lambda: self.rung.append((name, round(trio.current_time() - self._began, 6)))


def test_alarms_ring_in_their_order_each_at_its_time() -> None:
    async def main() -> None:
        bell, loop = Bell(), TrioLoop()
        for name, delay in (("late", 5), ("early", 1), ("first at three", 3), ("second at three", 3)):
            loop.call_later(delay, bell.alarm(name))
        await trio.sleep(10)
        assert bell.rung == [("early", 1), ("first at three", 3), ("second at three", 3), ("late", 5)]

    assert on_trio(main) == ["started", "ended"]


def test_an_alarm_that_is_earlier_than_the_one_slept_for() -> None:
    async def main() -> None:
        bell, loop = Bell(), TrioLoop()
        loop.call_later(5, bell.alarm("late"))
        await trio.sleep(1)
        loop.call_later(1, bell.alarm("early"))
        loop.call_later(2, bell.alarm("between"))
        await trio.sleep(10)
        assert bell.rung == [("early", 2), ("between", 3), ("late", 5)]

    assert on_trio(main) == ["started", "ended"]


def test_an_alarm_that_was_called_off_does_not_ring() -> None:
    async def main() -> None:
        bell, loop = Bell(), TrioLoop()
        first = loop.call_later(1, bell.alarm("first"))
        loop.call_later(2, bell.alarm("second"))
        third = loop.call_later(3, bell.alarm("third"))
        first.cancel()
        await trio.sleep(2.5)
        third.cancel()
        await trio.sleep(10)
        third.cancel()
        assert bell.rung == [("second", 2)]

    assert on_trio(main) == ["started", "ended"]


def test_an_alarm_that_fails_is_logged_and_the_others_ring(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise LookupError("no such request")

    async def main() -> None:
        bell, loop = Bell(), TrioLoop()
        for delay in (1, 2):
            loop.call_later(delay, fail)
            loop.call_later(delay, bell.alarm("after it"))
        await trio.sleep(10)
        assert bell.rung == [("after it", 1), ("after it", 2)]

    assert on_trio(main) == ["started", "ended"]
    assert [record.getMessage() for record in caplog.records] == ["asyncguard failed at a deadline"] * 2
    assert {record.name for record in caplog.records} == {"asyncguard.timeouts"}
    for record in caplog.records:
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], LookupError)


def test_without_alarms_no_task_is_left_and_the_next_alarm_starts_another() -> None:
    async def main() -> None:
        bell, loop = Bell(), TrioLoop()
        loop.call_later(1, bell.alarm("first"))
        await trio.sleep(5)
        loop.call_later(1, bell.alarm("second"))
        await trio.sleep(5)
        assert bell.rung == [("first", 1), ("second", 6)]

    assert on_trio(main) == ["started", "ended"] * 2


def test_an_alarm_may_set_another() -> None:
    async def main() -> None:
        bell, loop = Bell(), TrioLoop()

        def again() -> None:
            bell.alarm("first")()
            loop.call_later(0, bell.alarm("at once"))
            loop.call_later(1, bell.alarm("second"))

        loop.call_later(1, again)
        await trio.sleep(5)
        assert bell.rung == [("first", 1), ("at once", 1), ("second", 2)]

    assert on_trio(main) == ["started", "ended"]


def test_an_alarm_that_is_due_rings_though_no_time_passes() -> None:
    async def main() -> None:
        bell, loop = Bell(), TrioLoop()
        loop.call_later(0, bell.alarm("due"))
        loop.call_later(-1, bell.alarm("overdue"))
        await trio.testing.wait_all_tasks_blocked()
        assert bell.rung == [("overdue", 0), ("due", 0)]

    assert on_trio(main) == ["started", "ended"]


def test_all_loops_of_a_run_share_one_alarm_clock_and_the_next_run_has_its_own() -> None:
    async def main() -> None:
        bell = Bell()
        TrioLoop().call_later(1, bell.alarm("first"))
        TrioLoop().call_later(2, bell.alarm("second"))
        await trio.sleep(5)
        assert bell.rung == [("first", 1), ("second", 2)]

    for _ in range(2):
        assert on_trio(main) == ["started", "ended"]


def test_alarms_that_are_still_to_come_do_not_keep_a_run_from_ending() -> None:
    rung: list[str] = []

    async def main() -> None:
        TrioLoop().call_later(1000, functools.partial(rung.append, "rang"))
        await trio.sleep(1)

    assert on_trio(main) == ["started", "ended"]
    assert not rung


def test_the_context_of_a_request_is_not_that_of_the_alarm_clock() -> None:
    """Its task lives on, for other requests."""
    contexts: list[Context] = []

    class Watch(trio.abc.Instrument):
        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            if task.name == "asyncguard-alarms":
                contexts.append(task.context)

    async def main() -> None:
        variable.set("of the request")
        TrioLoop().call_later(0, lambda: None)
        await trio.testing.wait_all_tasks_blocked()

    trio.run(main, instruments=[Watch()])
    (context,) = contexts
    assert variable not in context
