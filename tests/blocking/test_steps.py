"""A coroutine that is driven by hand behaves as if it were awaited, and each of its turns is timed."""

from __future__ import annotations

import asyncio
import gc
import math
import traceback
import weakref
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asyncguard._request import RequestRecord
from asyncguard.blocking._stall import Aftermath
from asyncguard.blocking._watch import LoopWatch
from tests.driving import driven

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio


class Watch(LoopWatch):
    """One that is on no loop, and takes down what it is told."""

    def __init__(self, threshold: float = 10.0, busy_after: float = math.inf) -> None:
        self.threshold = threshold
        self.busy_after = busy_after
        self.turn = None
        self.aftermath = None
        self.long_turns: list[tuple[RequestRecord, float, float]] = []
        self.busy_turns: list[tuple[RequestRecord, float, float]] = []

    def note_long_turn(self, record: RequestRecord, since: float, until: float) -> None:
        assert self.turn is record  # the watchdog must not forget what it saw before it was taken down
        self.long_turns.append((record, since, until))

    def note_busy(self, record: RequestRecord, held: float, now: float) -> None:
        self.busy_turns.append((record, held, now))


def new_record() -> RequestRecord:
    return RequestRecord({"type": "http", "method": "GET", "path": "/"}, 0.0)


async def run(coroutine: Any, watch: Watch | None = None, record: RequestRecord | None = None) -> Any:
    return await driven(coroutine, record or new_record(), watch or Watch())


class Marker(Exception):
    pass


async def test_the_value_comes_back() -> None:
    result = object()

    async def work() -> object:
        await anyio.lowlevel.checkpoint()
        return result

    assert await run(work()) is result


async def test_values_go_in() -> None:
    async def work() -> int:
        return await anyio.to_thread.run_sync(lambda: 42)

    assert await run(work()) == 42


@pytest.mark.parametrize("turns", [0, 3])
async def test_an_exception_comes_out_unchanged(turns: int) -> None:
    error = Marker()

    async def work() -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        raise error

    with pytest.raises(Marker) as caught:
        await run(work())
    assert caught.value is error
    assert error.__context__ is None
    assert error.__cause__ is None
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert functions[1:] == (["run", "driven", "drive", "work"] if turns else ["run", "driven", "work"])


async def test_stop_iteration_is_no_return() -> None:
    async def work() -> None:
        raise StopIteration(1)

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await run(work())


async def test_an_exception_thrown_in_is_the_same_inside() -> None:
    """What the loop throws at the outer await arrives at the inner one, and may be handled there."""
    error = Marker()
    seen: list[BaseException] = []

    class Awaitable:
        def __await__(self) -> Generator[str, None, None]:
            yield "asked"

    async def work() -> str:
        try:
            await Awaitable()
        except Marker as caught:
            seen.append(caught)
        return "recovered"

    coroutine = run(work())
    assert coroutine.send(None) == "asked"
    with pytest.raises(StopIteration) as stop:
        coroutine.throw(error)
    assert stop.value.value == "recovered"
    assert seen == [error]
    assert error.__context__ is None


async def test_an_exception_thrown_through_keeps_its_traceback_and_context() -> None:
    class Awaitable:
        def __await__(self) -> Generator[str, None, None]:
            yield "asked"

    async def work() -> None:
        await Awaitable()

    origin = ValueError("origin")
    error = Marker()
    error.__context__ = origin
    coroutine = run(work())
    coroutine.send(None)
    with pytest.raises(Marker) as caught:
        coroutine.throw(error)
    assert caught.value is error
    assert error.__context__ is origin
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert functions[-2:] == ["work", "__await__"]


async def test_a_cancelled_request_may_clean_up() -> None:
    log: list[str] = []

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            log.append("cancelled")
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                log.append("cleaned up")
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(run, work())
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert log == ["cancelled", "cleaned up"]


async def test_an_edge_cancellation_is_one_exception(anyio_backend_name: str) -> None:
    """asyncio throws once: the rest of the coroutine may await again, and its value still comes back."""
    if anyio_backend_name == "trio":
        pytest.skip("trio cancels by level")

    async def work() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)
        return "done"

    task = asyncio.create_task(run(work()))
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "done"


async def test_closing_runs_the_inner_finally() -> None:
    log: list[str] = []

    class Awaitable:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def work() -> None:
        try:
            await Awaitable()
        except GeneratorExit:
            log.append("exit")
            raise
        finally:
            log.append("finally")

    inner = work()  # held here: being let go would close it as well
    coroutine = run(inner)
    coroutine.send(None)
    coroutine.close()
    assert log == ["exit", "finally"]


async def test_turns_add_up(clock: TurnedClock) -> None:
    watch, record = Watch(), new_record()

    async def work() -> None:
        clock.turn(1)
        await anyio.lowlevel.checkpoint()
        clock.turn(2)
        with suppress(Marker):
            raise Marker
        await anyio.lowlevel.checkpoint()
        clock.turn(4)

    async def bystander() -> None:
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
            clock.turn(1000)

    async with anyio.create_task_group() as group:
        group.start_soon(bystander)
        await anyio.lowlevel.checkpoint()
        await run(work(), watch, record)
        released = clock.now
        assert record.released == released
        group.cancel_scope.cancel()
    assert record.loop_time == 7
    assert watch.long_turns == []


async def test_while_it_runs_the_turn_is_its_own(clock: TurnedClock) -> None:
    watch, record = Watch(), new_record()

    async def work() -> None:
        assert (watch.turn, record.turn_since) == (record, 1000)
        clock.turn(1)
        await anyio.lowlevel.checkpoint()
        assert (watch.turn, record.turn_since) == (record, 1001)

    async def bystander() -> None:
        assert watch.turn is None

    async with anyio.create_task_group() as group:
        group.start_soon(run, work(), watch, record)
        group.start_soon(bystander)
    assert watch.turn is None


@pytest.mark.parametrize("fails", [False, True])
async def test_a_guarded_application_inside_another(clock: TurnedClock, fails: bool) -> None:
    watch, outer, inner = Watch(), new_record(), new_record()

    async def inner_work() -> None:
        clock.turn(1)
        assert watch.turn is inner
        await anyio.lowlevel.checkpoint()
        clock.turn(2)
        if fails:
            raise Marker

    async def outer_work() -> None:
        clock.turn(4)
        with suppress(Marker):
            await run(inner_work(), watch, inner)
        assert watch.turn is outer
        assert outer.turn_since == 1005  # since the turn began, not since the inner one ended
        clock.turn(8)

    await run(outer_work(), watch, outer)
    assert watch.turn is None
    assert (inner.loop_time, outer.loop_time) == (3, 15)


@pytest.mark.parametrize(("held", "noted"), [(9.75, 0), (10.0, 1), (25.0, 1)])
async def test_a_long_turn_is_noted_once(clock: TurnedClock, held: float, noted: int) -> None:
    watch, record = Watch(threshold=10.0), new_record()

    async def work() -> None:
        await anyio.lowlevel.checkpoint()
        clock.turn(held)
        await anyio.lowlevel.checkpoint()
        clock.turn(1)

    await run(work(), watch, record)
    assert watch.long_turns == [(record, 1000, 1000 + held)] * noted


async def test_a_long_turn_that_raises_or_returns_is_noted(clock: TurnedClock) -> None:
    watch = Watch()

    async def work(error: Exception | None) -> None:
        clock.turn(11)
        if error:
            raise error

    await run(work(None), watch)
    with pytest.raises(Marker):
        await run(work(Marker()), watch)
    assert [until - since for _, since, until in watch.long_turns] == [11, 11]


async def test_from_half_of_too_much_on_each_turn_is_added_up(clock: TurnedClock) -> None:
    watch, record = Watch(busy_after=5.0), new_record()

    async def work() -> None:
        for held in (2, 2.5, 1, 30, 0.25):
            clock.turn(held)
            await anyio.lowlevel.checkpoint()

    await run(work(), watch, record)
    # The long one is a stall, and not a piece.
    assert watch.busy_turns == [(record, 1, 1005.5), (record, 0.25, 1035.75), (record, 0, 1035.75)]
    assert watch.long_turns == [(record, 1005.5, 1035.5)]


async def test_most_requests_are_never_added_up(clock: TurnedClock) -> None:
    watch, record = Watch(), new_record()

    async def work() -> None:
        for _ in range(20):
            clock.turn(9)
            await anyio.lowlevel.checkpoint()

    await run(work(), watch, record)
    assert record.loop_time == 180
    assert watch.busy_turns == []


async def test_the_aftermath_of_a_stall_is_told_of_each_turn(clock: TurnedClock) -> None:
    watch, record = Watch(), new_record()

    async def work() -> None:
        await anyio.lowlevel.checkpoint()
        watch.aftermath = Aftermath()
        clock.turn(1)
        await anyio.lowlevel.checkpoint()

    await run(work(), watch, record)
    assert watch.aftermath is not None
    assert [(wait.record, wait.waiting_since, wait.resumed) for wait in watch.aftermath.waits] == [
        (record, 1001, 1001)
    ]


class Result:
    pass


async def test_nothing_is_left_to_the_garbage_collector() -> None:
    """After a value, an exception out, and an exception in and out: no reference cycle."""

    class Awaitable:
        def __await__(self) -> Generator[None, None, None]:
            yield

    results: list[weakref.ref[Any]] = []

    async def work(fate: str) -> Result:
        result = Result()
        results.append(weakref.ref(result))
        if fate == "raise":
            raise Marker
        try:
            await Awaitable()
        except Marker:
            if fate == "recover":
                return result
            raise
        return result

    def live(fate: str) -> None:
        coroutine = run(work(fate))
        with suppress(Marker, StopIteration):
            coroutine.send(None)
            if fate == "return":
                coroutine.send(None)
            else:
                coroutine.throw(Marker())

    gc.collect()
    gc.disable()
    try:
        for fate in ("return", "raise", "recover", "reraise"):
            live(fate)
            assert results[-1]() is None, fate
        assert gc.collect() == 0
    finally:
        gc.enable()


async def test_an_aftermath_that_is_closed_at_the_same_time(clock: TurnedClock) -> None:
    """By the watchdog, on its own thread: the request must not notice."""

    class ClosedMeanwhile(Watch):
        asked = 0

        @property
        def aftermath(self) -> Aftermath | None:
            self.asked += 1
            return Aftermath() if self.asked % 2 else None

        @aftermath.setter
        def aftermath(self, aftermath: Aftermath | None) -> None: ...

    async def work() -> str:
        await anyio.lowlevel.checkpoint()
        return "done"

    assert await run(work(), ClosedMeanwhile()) == "done"
