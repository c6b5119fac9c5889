"""Each look-up into the insides of CPython, asyncio and uvloop: the first to fail where a version differs."""

from __future__ import annotations

import asyncio
import dis
import gc
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from types import CodeType, FrameType
from typing import Any

import anyio
import pytest
import trio
import uvloop

from asyncguard._request import RequestRecord, current_request
from asyncguard.blocking import _lookups
from asyncguard.blocking._lookups import (
    RawFrame,
    RawStack,
    RunningRequest,
    await_chain,
    keep_requests,
    position,
    read_stack,
    running_request,
)

needs_kept_requests = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="from 3.12 on, tasks tell their context"
)


def request(path: str) -> RequestRecord:
    return RequestRecord({"type": "http", "method": "GET", "path": path}, 0.0)


RED, BLUE, GREEN = request("/red"), request("/blue"), request("/green")


def context_of(record: RequestRecord) -> Context:
    context = copy_context()
    context.run(current_request.set, record)
    return context


def asked_from_a_thread(runner: Any) -> RunningRequest:
    """What another thread sees while this one holds the loop."""
    seen: list[RunningRequest] = []
    thread = threading.Thread(target=lambda: seen.append(running_request(runner)))
    thread.start()
    thread.join()
    return seen[0]


def run(main: Callable[[], Any], kind: str) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if kind == "uvloop" else None) as runner:
        return runner.run(main())


# -- the stack ---------------------------------------------------------------------------------------


def test_a_callback_runs_below_handle_run_which_holds_its_context() -> None:
    """asyncio's own loops; `Handle._run` and `self._context` are private."""
    stacks: list[RawStack] = []

    def inner() -> None:
        stacks.append(read_stack(sys._getframe(), 0))

    def callback() -> None:
        inner()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for context in (context_of(RED), context_of(BLUE), Context()):
            loop.call_soon(callback, context=context)
        await asyncio.sleep(0)

    run(main, "asyncio")
    assert [stack.record for stack in stacks] == [RED, BLUE, None]
    assert [[frame.code for frame in stack.frames] for stack in stacks] == [
        [inner.__code__, callback.__code__]
    ] * 3
    assert len({stack.callback for stack in stacks} - {0}) == 3


def test_a_tasks_step_runs_below_handle_run_too() -> None:
    async def main() -> None:
        current_request.set(GREEN)
        await asyncio.sleep(0)
        stack = read_stack(sys._getframe(), 0)
        assert stack.record is GREEN
        assert stack.callback
        assert [frame.code.co_name for frame in stack.frames] == ["main"]

    run(main, "asyncio")


def test_between_two_callbacks_nothing_runs() -> None:
    """asyncio's `_run_once` is no callback's frame: its poll, for one, is below none."""
    stacks: list[RawStack] = []

    async def main() -> None:
        selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        original = selector.select

        def select(timeout: float | None = None) -> Any:
            stacks.append(read_stack(sys._getframe(), 0))
            return original(timeout)

        selector.select = select
        await asyncio.sleep(0)
        del selector.select

    run(main, "asyncio")
    assert stacks[0] == RawStack((), None, 0)


def test_no_frame_of_a_uvloop_callback_is_left_out() -> None:
    async def main() -> None:
        stack = read_stack(sys._getframe(), 0)
        assert (stack.record, stack.callback) == (None, 0)
        assert stack.frames[0].code.co_name == "main"
        assert len(stack.frames) > 1

    run(main, "uvloop")


def test_a_stack_ends_outside() -> None:
    frame = sys._getframe()

    def inner() -> RawStack:
        return read_stack(sys._getframe(), id(frame))

    stack = inner()
    assert [raw.code for raw in stack.frames] == [inner.__code__]
    assert (stack.record, stack.callback) == (None, 0)


def test_a_deep_stack_is_read_to_its_end() -> None:
    frame = sys._getframe()

    def nested(depth: int) -> RawStack:
        return nested(depth - 1) if depth else read_stack(sys._getframe(), id(frame))

    assert len(nested(200).frames) == 201


def test_no_frame_no_stack() -> None:
    assert read_stack(None, 0) == RawStack((), None, 0)


def test_a_raw_frame_keeps_no_locals() -> None:
    secret = object()
    before = sys.getrefcount(secret)
    stack = read_stack(sys._getframe(), 0)
    assert stack.frames[0].namespace is globals()
    assert sys.getrefcount(secret) == before


# -- the running task --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_the_running_tasks_request_is_seen_from_another_thread(kind: str) -> None:
    async def child(expected: RequestRecord | None) -> None:
        await asyncio.sleep(0)
        seen = asked_from_a_thread(asyncio.get_running_loop())
        assert seen == RunningRequest(id(asyncio.current_task()), expected)

    async def main() -> None:
        remove = keep_requests(asyncio.get_running_loop())
        try:
            nobodys = asyncio.create_task(child(None))
            current_request.set(RED)
            first = asyncio.create_task(child(RED))
            current_request.set(BLUE)
            given = asyncio.create_task(child(GREEN), context=context_of(GREEN))
            # A context of its own, without a request: cut off from this one on purpose.
            cut_off = asyncio.create_task(child(None), context=Context())
            await asyncio.gather(nobodys, first, child(BLUE), given, cut_off)
        finally:
            remove()

    run(main, kind)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_plain_callback_is_no_task(kind: str) -> None:
    seen: list[RunningRequest] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: seen.append(asked_from_a_thread(loop)))
        await asyncio.sleep(0)

    run(main, kind)
    assert seen == [RunningRequest(0, None)]


def test_a_trio_task_has_its_context() -> None:
    async def main() -> None:
        current_request.set(RED)
        task = trio.lowlevel.current_task()
        assert asked_from_a_thread(task) == RunningRequest(id(task), RED)

    trio.run(main)
    assert running_request(None) == RunningRequest(0, None)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Task.get_context is of 3.12")
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_task_tells_its_own_context(kind: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()
        remove = keep_requests(loop)
        assert loop.get_task_factory() is factory
        remove()
        assert loop.get_task_factory() is factory
        current_request.set(RED)
        assert running_request(loop).record is RED

    run(main, kind)


@needs_kept_requests
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_kept_requests_leave_task_making_as_it_is(kind: str) -> None:
    async def child() -> RequestRecord | None:
        return current_request.get()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        remove = keep_requests(loop)
        task = loop.create_task(child(), name="named", context=context_of(RED))
        assert type(task) is asyncio.Task
        assert task.get_name() == "named"
        assert task.get_loop() is loop
        assert await task is RED
        remove()
        assert loop.get_task_factory() is None

    run(main, kind)


@needs_kept_requests
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_an_existing_task_factory_is_used_and_put_back(kind: str) -> None:
    made: list[asyncio.Task[Any]] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        made.append(task)
        return task

    async def child() -> RunningRequest:
        return asked_from_a_thread(asyncio.get_running_loop())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(factory)
        remove = keep_requests(loop)
        task = loop.create_task(child(), context=context_of(RED))
        assert await task == RunningRequest(id(task), RED)
        assert made == [task]
        remove()
        assert loop.get_task_factory() is factory

    run(main, kind)


@needs_kept_requests
def test_a_task_factory_set_later_stays() -> None:
    def later(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coroutine, loop=loop, **options)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        remove = keep_requests(loop)
        loop.set_task_factory(later)
        remove()
        assert loop.get_task_factory() is later

    run(main, "asyncio")


@needs_kept_requests
def test_kept_requests_keep_neither_task_nor_loop_alive() -> None:
    async def child() -> None: ...

    async def main() -> Callable[[], None]:
        remove = keep_requests(asyncio.get_running_loop())
        gc.collect()  # earlier tests' tasks must not go while this one counts
        before = len(_lookups._requests)
        current_request.set(RED)
        await asyncio.create_task(child())
        await asyncio.sleep(0)
        assert len(_lookups._requests) == before
        return remove

    with asyncio.Runner() as runner:
        remove = runner.run(main())
        loop = weakref.ref(runner.get_loop())
    del runner
    gc.collect()
    assert loop() is None
    remove()


# -- positions ---------------------------------------------------------------------------------------


def text_at(code: CodeType, instruction: int) -> str:
    line, end_line, column, end_column = position(code, instruction)
    assert line is not None
    assert end_line is not None
    with open(code.co_filename, "rb") as file:
        lines = file.read().splitlines()[line - 1 : end_line]
    lines[-1] = lines[-1][:end_column]
    lines[0] = lines[0][column:]
    return b"\n".join(lines).decode()


def test_the_instruction_of_a_call_that_a_c_function_holds() -> None:
    """While `sorted` runs, this frame stands on the call of it and on nothing else of the line."""
    seen: list[str] = []
    frames: list[FrameType] = [sys._getframe()]

    def key(item: int) -> int:
        seen.append(text_at(frames[0].f_code, frames[0].f_lasti))
        return item

    _ = len("ä") + len(sorted([1], key=key)) + len("x")
    _ = list(
        map(
            key,
            [2],
        )
    )
    assert seen[0] == "sorted([1], key=key)"
    assert seen[1].splitlines()[0] == "list("
    assert seen[1].splitlines()[-1] == "    )"


def test_the_instruction_seen_from_another_thread() -> None:
    gate, ready = threading.Lock(), threading.Event()
    gate.acquire()

    def blocked() -> None:
        ready.set()
        _ = str(gate.acquire())

    thread = threading.Thread(target=blocked)
    thread.start()
    ready.wait()
    texts: set[str] = set()
    with anyio_deadline() as expired:
        while "gate.acquire()" not in texts and not expired():
            frame: FrameType | None = sys._current_frames()[thread.ident or 0]
            while frame is not None and frame.f_code is not blocked.__code__:
                frame = frame.f_back
            if frame is not None:
                texts.add(text_at(frame.f_code, frame.f_lasti))
    gate.release()
    thread.join()
    assert "gate.acquire()" in texts


class anyio_deadline:  # noqa: N801
    """Ends a busy wait after a time that no machine needs."""

    def __enter__(self) -> Callable[[], bool]:
        import time

        end = time.monotonic() + 30
        return lambda: time.monotonic() > end

    def __exit__(self, *error: object) -> None: ...


def test_every_instruction() -> None:
    """As the interpreter's own disassembler has them."""
    code = test_every_instruction.__code__
    for instruction in dis.get_instructions(code):
        place = instruction.positions
        assert place is not None
        assert position(code, instruction.offset) == (
            place.lineno,
            place.end_lineno,
            place.col_offset,
            place.end_col_offset,
        )


@pytest.mark.parametrize("instruction", [1_000_000, -1])
def test_no_such_instruction(instruction: int) -> None:
    place = position(text_at.__code__, instruction)
    assert place.column is None or instruction < 0  # before the first, a frame stands on its `def`
    assert place.line in (None, text_at.__code__.co_firstlineno)


def test_code_without_columns() -> None:
    """With PYTHONNODEBUGRANGES there are lines only."""
    program = (
        "from asyncguard.blocking._lookups import position\n"
        "places = [position(position.__code__, 2 * n) for n in range(100)]\n"
        "assert any(place.line for place in places)\n"
        "assert all(place.column is None for place in places)\n"
    )
    subprocess.run([sys.executable, "-X", "no_debug_ranges", "-c", program], check=True)


# -- what a coroutine awaits -------------------------------------------------------------------------


def names(awaitable: Any) -> list[str]:
    return [code.co_name for code, _ in await_chain(awaitable)]


async def leaf() -> None:
    await asyncio.get_running_loop().create_future()  # leaf


async def middle() -> None:
    await leaf()  # middle


@types.coroutine
def generator_based() -> Generator[Any, Any, None]:
    yield from leaf().__await__()


@types.coroutine
def generator_over_a_coroutine() -> Generator[Any, Any, None]:
    yield from leaf()


async def over_a_generator() -> None:
    await generator_over_a_coroutine()


async def numbers() -> AsyncIterator[int]:
    await leaf()
    yield 1


@asynccontextmanager
async def manager() -> AsyncIterator[None]:
    await leaf()
    yield


async def over_a_loop() -> None:
    async for _ in numbers():
        pass


async def over_a_manager() -> None:
    async with manager():
        pass


async def suspended(coroutine: Any) -> list[str]:
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    found = names(coroutine)
    task.cancel()
    await asyncio.wait([task])
    return found


@pytest.mark.asyncio
async def test_coroutines_down_to_a_future(marked: Callable[[str], int]) -> None:
    coroutine = middle()
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    assert list(await_chain(coroutine)) == [
        (middle.__code__, marked("middle")),
        (leaf.__code__, marked("leaf")),
    ]
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.asyncio
async def test_generator_based_coroutines() -> None:
    assert await suspended(over_a_generator()) == [
        "over_a_generator",
        "generator_over_a_coroutine",
        "leaf",
    ]


@pytest.mark.asyncio
async def test_an_asynchronous_generator() -> None:
    generator = numbers()
    step = generator.__anext__()
    context = copy_context()
    context.run(step.send, None)  # type: ignore[attr-defined]
    assert names(generator) == ["numbers", "leaf"]
    with pytest.raises(asyncio.CancelledError):
        context.run(step.throw, asyncio.CancelledError)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (over_a_loop, ["over_a_loop", "numbers", "leaf"]),
        (over_a_manager, ["over_a_manager", "__aenter__", "manager", "leaf"]),
    ],
)
@pytest.mark.asyncio
async def test_asynchronous_generators_inside_a_coroutine(make: Any, expected: list[str]) -> None:
    assert await suspended(make()) == expected


async def asleep() -> None:
    await anyio.sleep_forever()


@pytest.mark.anyio
async def test_the_chain_of_a_sleeper_on_every_loop() -> None:
    coroutine = asleep()
    async with anyio.create_task_group() as group:

        async def run_it() -> None:
            await coroutine

        group.start_soon(run_it)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        assert names(coroutine)[:2] == ["asleep", "sleep_forever"]
        group.cancel_scope.cancel()


def test_what_is_not_suspended() -> None:
    coroutine = leaf()
    assert names(coroutine) == ["leaf"]
    coroutine.close()
    assert names(coroutine) == []
    assert names(None) == []
    assert names(object()) == []


def test_raw_frames_are_what_their_docs_say() -> None:
    frame = sys._getframe()
    (raw, *_) = read_stack(frame, 0).frames
    assert isinstance(raw, RawFrame)
    assert raw.code is frame.f_code
