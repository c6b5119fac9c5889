"""`map`: in order, a few at a time, and nothing is left behind however it ends."""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio

from asyncguard.errors import OffloadError
from asyncguard.offloading._executors import ThreadRunner
from asyncguard.offloading._offload import offload

WITHIN = 30
"""Seconds that no test takes."""

R = TypeVar("R")

variable: ContextVar[str] = ContextVar("variable", default="")


@offload(pool=ThreadRunner())
def add(x: int, y: int = 1) -> int:
    return x + y


class Calls:
    """Runs nothing: each call waits until the test lets it go on."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.running: set[int] = set()
        self.cancelled: list[int] = []
        self.most = 0
        self.gates: dict[int, anyio.Event] = {}
        self.changed = anyio.Event()

    async def run_call(self, *call: Any) -> Any:
        (number,) = call[2]
        self.begun.append(number)
        self.running.add(number)
        self.most = max(self.most, len(self.running))
        self._tell()
        try:
            await self.gate(number).wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(number)
            raise
        finally:
            self.running.discard(number)
            self._tell()
        return add.inline(number, 100) if number >= 0 else math.sqrt(number)

    def gate(self, number: int) -> anyio.Event:
        return self.gates.setdefault(number, anyio.Event())

    def let(self, *numbers: int) -> None:
        for number in numbers:
            self.gate(number).set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        with anyio.fail_after(WITHIN):
            await test(*args, **kwargs)

    return run


def tasks() -> int:
    """How many there are besides this one."""
    if "trio" in sys.modules and trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


async def take_all(results: AsyncIterator[R], taken: list[R]) -> None:
    """Unlike a comprehension, this leaves there what came before a failure."""
    async for result in results:
        taken.append(result)  # noqa: PERF401


async def nothing_left(calls: Calls, before: int) -> None:
    await calls.until(lambda: not calls.running)
    while tasks() > before:
        await anyio.lowlevel.checkpoint()
    begun = len(calls.begun)
    for _ in range(5):
        await anyio.lowlevel.checkpoint()
    assert len(calls.begun) == begun


@pytest.mark.anyio
@bounded
async def test_results_come_in_the_order_of_the_items() -> None:
    calls = Calls()
    mapped = add.using(pool=calls).map(range(4), limit=4)
    results: list[int] = []

    async def take() -> None:
        await take_all(mapped, results)

    before = tasks()
    async with anyio.create_task_group() as group:
        group.start_soon(take)
        await calls.until(lambda: len(calls.running) == 4)
        calls.let(3, 1)
        await calls.until(lambda: calls.running == {0, 2})
        assert results == []
        calls.let(0)
        await calls.until(lambda: calls.running == {2})
        calls.let(2)
    assert results == [100, 101, 102, 103]
    await nothing_left(calls, before)


@pytest.mark.anyio
@bounded
async def test_no_more_than_the_limit_run_and_wait() -> None:
    calls, taken = Calls(), []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    calls.let(*range(1, 20))
    mapped = add.using(pool=calls).map(items(), limit=3)
    assert taken == []
    async with anyio.create_task_group() as group:

        async def take() -> None:
            assert [result async for result in mapped] == list(range(100, 120))

        group.start_soon(take)
        await calls.until(lambda: calls.running == {0} and len(calls.begun) == 5)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert len(taken) == len(calls.begun) <= 6
        calls.let(0)
    assert sorted(calls.begun) == list(range(20))
    assert calls.most <= 3


@pytest.mark.anyio
@bounded
async def test_leaving_the_loop_early_calls_off_what_runs() -> None:
    calls = Calls()
    calls.let(0)
    before = tasks()
    async for result in add.using(pool=calls).map(range(100), limit=4):
        assert result == 100
        break
    await nothing_left(calls, before)
    assert len(calls.begun) <= 5
    assert sorted([0, *calls.cancelled]) == sorted(calls.begun)


@pytest.mark.anyio
@bounded
async def test_so_does_an_exception_in_the_loop() -> None:
    calls = Calls()
    calls.let(0)
    before = tasks()

    async def fail() -> None:
        async for _ in add.using(pool=calls).map(range(100), limit=4):
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    await nothing_left(calls, before)
    assert sorted([0, *calls.cancelled]) == sorted(calls.begun)


@pytest.mark.anyio
@bounded
async def test_a_failure_is_raised_in_its_place_and_ends_it() -> None:
    calls = Calls()
    mapped = add.using(pool=calls).map([0, 1, -2, 3, 4, 5], limit=4)
    before = tasks()
    results: list[int] = []
    async with anyio.create_task_group() as group:

        async def take() -> None:
            with pytest.raises(ValueError, match=r"."):
                await take_all(mapped, results)

        group.start_soon(take)
        await calls.until(lambda: calls.running == {0, 1, -2, 3})
        calls.let(-2)
        await calls.until(lambda: calls.running == {0, 1})
        assert calls.cancelled == [3]
        calls.let(1)
        await calls.until(lambda: calls.running == {0})
        calls.let(0)
    assert results == [100, 101]
    assert len(calls.begun) == 4
    await nothing_left(calls, before)
    with pytest.raises(StopAsyncIteration):
        await anext(mapped)


@pytest.mark.anyio
@bounded
async def test_when_who_waits_is_cancelled_so_are_the_calls() -> None:
    calls = Calls()
    before = tasks()
    async with anyio.create_task_group() as group:

        async def take() -> None:
            async for _ in add.using(pool=calls).map(range(100), limit=4):
                raise AssertionError

        group.start_soon(take)
        await calls.until(lambda: len(calls.running) == 4)
        group.cancel_scope.cancel()
    assert not calls.running
    assert sorted(calls.cancelled) == [0, 1, 2, 3]
    await nothing_left(calls, before)


@pytest.mark.anyio
@bounded
async def test_closing_waits_for_the_end_of_the_calls() -> None:
    calls = Calls()
    calls.let(0)
    before = tasks()
    async with aclosing(add.using(pool=calls).map(range(100), limit=3)) as mapped:
        assert await anext(mapped) == 100
    assert not calls.running
    assert tasks() == before
    with pytest.raises(StopAsyncIteration):
        await anext(mapped)


@pytest.mark.anyio
@bounded
async def test_a_call_that_is_called_off_before_it_began_is_waited_for_too() -> None:
    calls = Calls()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async for _ in add.using(pool=calls).map(range(5), limit=5):
            raise AssertionError
    assert scope.cancelled_caught
    assert not calls.running


@pytest.mark.anyio
@bounded
async def test_an_iterator_that_was_never_used_starts_nothing() -> None:
    calls = Calls()
    mapped = add.using(pool=calls).map(range(5))
    del mapped
    gc.collect()
    await anyio.lowlevel.checkpoint()
    assert calls.begun == []


@pytest.mark.anyio
@bounded
async def test_what_the_items_raise_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise LookupError("no more")

    results: list[int] = []
    with pytest.raises(LookupError, match="no more"):
        await take_all(add.map(items(), limit=8), results)
    assert results == [1, 2]


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def run_call(self, *_: object) -> Any:
        raise self.error


@pytest.mark.anyio
@bounded
async def test_a_call_that_raises_what_ends_a_loop_does_not_end_it_quietly() -> None:
    with pytest.raises(RuntimeError, match=r"StopAsyncIteration"):
        await anext(add.using(pool=Failing(StopAsyncIteration())).map([1]))


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
@pytest.mark.anyio
@bounded
async def test_a_call_that_somebody_else_cancelled_is_an_error() -> None:
    with pytest.raises(OffloadError, match="called off"):
        await anext(add.using(pool=Failing(asyncio.CancelledError())).map([1]))


@pytest.mark.anyio
@bounded
async def test_the_calls_see_the_context() -> None:
    variable.set("seen")
    in_thread = offload(backend="thread")(lambda _: variable.get())
    assert [seen async for seen in in_thread.map([1, 2])] == ["seen", "seen"]


async def no_items() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("items", "limit", "error", "message"),
    [
        (5, 1, TypeError, "items must be iterable, not of type int"),
        (no_items(), 1, TypeError, "items must be iterable, not of type async_generator: collect them"),
        ([], 0, ValueError, "limit must be at least 1, not 0"),
        ([], 1.5, TypeError, r"limit must be an integer, not 1\.5"),
    ],
)
def test_bad_options_of_map_are_refused_at_once(
    items: Any, limit: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        add.map(items, limit=limit)
