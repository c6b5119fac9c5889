"""Each look-up into the insides of anyio, asyncio and uvicorn: the first to fail where a version differs."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import CodeType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from starlette.concurrency import run_in_threadpool

from asyncguard._frames import suspended_frames
from asyncguard.timeouts._lookups import (
    awaited_future,
    cancel_scope,
    is_in_thread,
    is_shielded,
    transport_of,
    worker_frame,
)
from asyncguard.timeouts._loops import running_loop

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)


@asynccontextmanager
async def running(coroutine: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that has come to what it waits for; it is ended afterwards, shielded or not."""
    task = asyncio.create_task(coroutine)
    await anyio.wait_all_tasks_blocked()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


# -- shielded ----------------------------------------------------------------------------------------


async def in_a_shield() -> None:
    with anyio.CancelScope(shield=True):
        await asyncio.sleep(3600)


async def around_a_shield() -> None:
    with anyio.CancelScope(shield=True), anyio.CancelScope(), anyio.move_on_after(3600):
        await asyncio.sleep(3600)


async def in_a_plain_scope() -> None:
    with anyio.CancelScope(), anyio.move_on_after(3600):
        await asyncio.sleep(3600)


async def after_a_shield() -> None:
    with anyio.CancelScope(shield=True):
        await anyio.lowlevel.checkpoint()
    await asyncio.sleep(3600)


async def without_a_scope() -> None:
    await asyncio.sleep(3600)


async def in_a_group_in_a_shield() -> None:
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group():
            await asyncio.sleep(3600)


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize(
    ("work", "verdict"),
    [
        (in_a_shield, True),
        (around_a_shield, True),
        (in_a_group_in_a_shield, True),
        (in_a_plain_scope, False),
        (after_a_shield, False),
        (without_a_scope, False),
    ],
)
async def test_whether_a_task_is_shielded(work: Callable[[], Awaitable[None]], verdict: bool) -> None:
    async with running(work()) as task:
        assert is_shielded(task, None) is verdict
    assert not is_shielded(task, None)


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize("abandon", [False, True])
async def test_who_waits_for_a_worker_thread_is_shielded_unless_it_abandons_the_thread(abandon: bool) -> None:
    release = threading.Event()

    async def work() -> None:
        await anyio.to_thread.run_sync(release.wait, 30, abandon_on_cancel=abandon)

    task = asyncio.create_task(work())
    try:
        await anyio.wait_all_tasks_blocked()
        assert is_shielded(task, None) is not abandon
    finally:
        release.set()  # or the loop would wait for the thread
        await task
    assert not is_shielded(task, None)


@pytest.mark.anyio
@on_asyncio
async def test_a_shield_of_another_task_is_not_its_own() -> None:
    """It is around the whole task: whatever stops the one that holds it stops this one too."""
    children: list[tuple[asyncio.Task[Any], object]] = []

    async def child() -> None:
        task = this_task()
        children.append((task, cancel_scope(task)))
        await asyncio.sleep(3600)

    async def shielded_child() -> None:
        task = this_task()
        children.append((task, cancel_scope(task)))
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(3600)

    async def parent() -> None:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                group.start_soon(child)
                group.start_soon(shielded_child)

    async with running(parent()) as task:
        try:
            assert is_shielded(task, None)
            assert [is_shielded(found, outside) for found, outside in children] == [False, True]
        finally:
            for found, _ in children:
                found.cancel()  # one by one: the shields keep out what comes from the parent


@pytest.mark.anyio
@on_asyncio
async def test_only_a_shield_that_was_entered_inside_counts() -> None:
    task = this_task()
    with anyio.CancelScope(shield=True) as shield, anyio.CancelScope() as plain:
        assert is_shielded(task, None)
        assert not is_shielded(task, shield)
        assert not is_shielded(task, plain)
        with anyio.CancelScope():
            assert is_shielded(task, None)
            assert not is_shielded(task, plain)
            with anyio.CancelScope(shield=True) as inner:
                assert is_shielded(task, plain)
                assert not is_shielded(task, inner)
            assert not is_shielded(task, plain)


@pytest.mark.anyio
@on_asyncio
async def test_a_scope_that_was_left_is_around_nothing_any_more() -> None:
    task = this_task()
    with anyio.CancelScope() as left:
        pass
    with anyio.CancelScope(shield=True):
        assert is_shielded(task, left)


@pytest.mark.anyio
@on_asyncio
async def test_the_innermost_scope_of_a_task() -> None:
    """`_task_states` is private."""
    task = this_task()
    around = cancel_scope(task)
    with anyio.CancelScope() as outer:
        assert cancel_scope(task) is outer
        with anyio.move_on_after(3600) as inner:
            assert cancel_scope(task) is inner
        assert cancel_scope(task) is outer
    assert cancel_scope(task) is around


@pytest.mark.asyncio
async def test_a_task_that_never_entered_a_scope_is_in_none() -> None:
    async with running(without_a_scope()) as task:
        assert cancel_scope(task) is None


def test_without_anyio_nothing_is_taken_for_shielded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        task = this_task()
        with anyio.CancelScope(shield=True):
            assert is_shielded(task, None)
            monkeypatch.delitem(sys.modules, "anyio._backends._asyncio")
            assert not is_shielded(task, None)
            for other in (SimpleNamespace(), SimpleNamespace(_task_states={task: SimpleNamespace()})):
                monkeypatch.setitem(sys.modules, "anyio._backends._asyncio", other)
                assert cancel_scope(task) is None
                assert not is_shielded(task, None)
            monkeypatch.undo()

    asyncio.run(main())


# -- what a task awaits ------------------------------------------------------------------------------


@pytest.mark.anyio
@on_asyncio
async def test_the_future_that_a_task_awaits() -> None:
    """`Task._fut_waiter` is private."""
    future = asyncio.get_running_loop().create_future()

    async def inner() -> None:
        await future

    async def work() -> None:
        await inner()

    task = asyncio.create_task(work())
    assert awaited_future(task) is None  # it has not begun
    await anyio.wait_all_tasks_blocked()
    assert awaited_future(task) is future
    future.set_result(None)
    assert awaited_future(task) is None  # it is about to go on
    await task
    assert awaited_future(task) is None


@pytest.mark.anyio
@on_asyncio
async def test_a_task_that_runs_awaits_nothing() -> None:
    task = this_task()
    assert awaited_future(task) is None


@pytest.mark.anyio
@on_asyncio
async def test_whoever_asks_the_future_is_called_after_the_task() -> None:
    """The task asked to be woken first."""
    future = asyncio.get_running_loop().create_future()
    steps: list[str] = []

    async def work() -> None:
        await future
        steps.append("the task")

    task = asyncio.create_task(work())
    await anyio.wait_all_tasks_blocked()
    awaited = awaited_future(task)
    assert awaited is not None
    awaited.add_done_callback(lambda _: steps.append("the caller"))
    future.set_result(None)
    await task
    await anyio.lowlevel.checkpoint()
    assert steps == ["the task", "the caller"]


def test_a_task_that_does_not_tell() -> None:
    task: Any = SimpleNamespace()
    assert awaited_future(task) is None


# -- threads -----------------------------------------------------------------------------------------


class Thread:
    """What a worker thread does until it is released."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self._tell: Callable[[], object] = partial(running_loop().call_threadsafe, self.begun.set)
        self._release = threading.Event()

    def work(self) -> None:
        _ = (self._tell(), self._release.wait(30))  # in the thread

    async def seen_from(self, coroutine: Any) -> tuple[list[CodeType], list[int]]:
        """The code in which `coroutine` waits for a thread, and on which lines of `work` that is found."""
        waiting: list[CodeType] = []
        lines: list[int] = []
        async with anyio.create_task_group() as group:

            async def run_it() -> None:
                await coroutine

            group.start_soon(run_it)
            try:
                with anyio.fail_after(30):
                    await self.begun.wait()
                for frame in filter(is_in_thread, suspended_frames(coroutine)):
                    waiting.append(frame.f_code)
                    running = worker_frame(frame)
                    while running is not None:
                        if running.f_code is Thread.work.__code__:
                            lines.append(running.f_lineno)
                        running = running.f_back
            finally:
                self._release.set()
        return waiting, lines


async def by_anyio(thread: Thread) -> None:
    await anyio.to_thread.run_sync(thread.work)


async def by_anyio_abandoning_it(thread: Thread) -> None:
    await anyio.to_thread.run_sync(thread.work, abandon_on_cancel=True)


async def by_starlette(thread: Thread) -> None:
    await run_in_threadpool(thread.work)


async def by_asyncio(thread: Thread) -> None:
    await asyncio.to_thread(thread.work)


async def by_trio(thread: Thread) -> None:
    await trio.to_thread.run_sync(thread.work)


@pytest.mark.anyio
@pytest.mark.parametrize("work", [by_anyio, by_anyio_abandoning_it, by_starlette])
async def test_waiting_for_a_thread_of_anyios(work: Callable[[Thread], Awaitable[None]]) -> None:
    thread = Thread()
    waiting, _ = await thread.seen_from(work(thread))
    assert waiting


@pytest.mark.asyncio
async def test_waiting_for_a_thread_of_asyncios() -> None:
    thread = Thread()
    waiting, lines = await thread.seen_from(by_asyncio(thread))
    assert waiting == [asyncio.to_thread.__code__]
    assert lines == []  # asyncio does not tell which thread it is


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_waiting_for_a_thread_of_trios() -> None:
    thread = Thread()
    waiting, lines = await thread.seen_from(by_trio(thread))
    assert waiting == [inspect.unwrap(trio.to_thread.run_sync).__code__]
    assert lines == []


async def to_thread() -> None:
    await anyio.sleep_forever()


@pytest.mark.anyio
async def test_a_function_of_the_same_name_waits_for_no_thread() -> None:
    coroutine = to_thread()
    async with anyio.create_task_group() as group:

        async def run_it() -> None:
            await coroutine

        group.start_soon(run_it)
        await anyio.wait_all_tasks_blocked()
        frames = list(suspended_frames(coroutine))
        assert frames[0].f_code is to_thread.__code__
        assert not any(map(is_in_thread, frames))
        group.cancel_scope.cancel()


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize("work", [by_anyio, by_anyio_abandoning_it, by_starlette])
async def test_what_a_thread_of_anyios_runs(
    work: Callable[[Thread], Awaitable[None]], marked: Callable[[str], int]
) -> None:
    """By the local variable `worker` of the function that waits."""
    thread = Thread()
    _, lines = await thread.seen_from(work(thread))
    assert lines == [marked("in the thread")]


def test_a_frame_that_does_not_tell_its_thread() -> None:
    assert worker_frame(sys._getframe()) is None
    worker = threading.Thread(target=int)
    assert worker_frame(sys._getframe()) is None  # not begun
    worker.start()
    worker.join()
    assert worker_frame(sys._getframe()) is None  # ended


# -- the connection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["h11_impl", "httptools_impl"])
def test_under_uvicorn_a_send_tells_its_connection(module: str) -> None:
    """It is a method of the cycle of a request and its response, which has a `transport`."""
    implementation = importlib.import_module(f"uvicorn.protocols.http.{module}")
    cycle_class = implementation.RequestResponseCycle
    arguments = {name: Mock(name=name) for name in inspect.signature(cycle_class).parameters}
    cycle = cycle_class(**arguments)
    seen: list[object] = []

    async def app(scope: object, receive: object, send: object) -> None:
        seen.append(transport_of(send))
        cycle.disconnected = True  # nobody waits for a response

    asyncio.run(cycle.run_asgi(app))
    assert seen == [arguments["transport"]]


class Connection:
    def __init__(self, transport: object) -> None:
        self.transport = transport

    async def send(self, message: object) -> None: ...


async def send(message: object) -> None: ...


def test_a_transport_is_what_can_be_aborted() -> None:
    transport: Any = SimpleNamespace(abort=lambda: None)
    assert transport_of(Connection(transport).send) is transport
    assert transport_of(Connection(None).send) is None
    assert transport_of(Connection(object()).send) is None


@pytest.mark.parametrize("other", [send, print, None, object()], ids=repr)
def test_elsewhere_no_connection_is_told(other: object) -> None:
    assert transport_of(other) is None
