"""Each look-up into the insides of CPython, asyncio and uvloop: the first to fail where a version differs."""

from __future__ import annotations

import asyncio
import dis
import gc
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import uvloop

from asyncguard._frames import RawFrame, await_chain, position, raw_frames
from asyncguard._request import RequestRecord, current_request
from asyncguard.blocking import _lookups
from asyncguard.blocking._lookups import (
    CollectorHeld,
    RawStack,
    RunningRequest,
    arrival,
    due_timers,
    keep_requests,
    living_threads,
    moved_requests,
    read_stack,
    ready_requests,
    request_of_task,
    running_request,
    thread_cpu,
    waiting_tasks,
)

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

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


def not_asked(record: RequestRecord, due: float) -> None: ...


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
    assert {stack.task for stack in stacks} == {None}


def test_a_tasks_step_runs_below_handle_run_too() -> None:
    async def main() -> None:
        current_request.set(GREEN)
        await asyncio.sleep(0)
        stack = read_stack(sys._getframe(), 0)
        assert stack.record is GREEN
        assert stack.callback
        task = asyncio.current_task()
        assert task is not None
        assert stack.task == task.get_name()
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
    assert stacks[0] == RawStack((), None, 0, None)


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
    assert read_stack(None, 0) == RawStack((), None, 0, None)


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
        task = asyncio.current_task()
        assert task is not None
        assert seen == RunningRequest(id(task), expected, task.get_name())

    async def main() -> None:
        remove = keep_requests(asyncio.get_running_loop(), not_asked)
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
    assert seen == [RunningRequest(0, None, None)]


def test_a_trio_task_has_its_context() -> None:
    async def main() -> None:
        current_request.set(RED)
        task = trio.lowlevel.current_task()
        assert asked_from_a_thread(task) == RunningRequest(id(task), RED, task.name)

    trio.run(main)
    assert running_request(None) == RunningRequest(0, None, None)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Task.get_context is of 3.12")
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_task_tells_its_own_context(kind: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()
        remove = keep_requests(loop, not_asked)
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
        remove = keep_requests(loop, not_asked)
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
        remove = keep_requests(loop, not_asked)
        task = loop.create_task(child(), context=context_of(RED))
        assert await task == RunningRequest(id(task), RED, task.get_name())
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
        remove = keep_requests(loop, not_asked)
        loop.set_task_factory(later)
        remove()
        assert loop.get_task_factory() is later

    run(main, "asyncio")


@needs_kept_requests
def test_kept_requests_keep_neither_task_nor_loop_alive() -> None:
    async def child() -> None: ...

    async def main() -> Callable[[], None]:
        remove = keep_requests(asyncio.get_running_loop(), not_asked)
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


# -- who is about to run -----------------------------------------------------------------------------


async def one_step() -> None:
    await asyncio.sleep(0)


def test_tasks_that_are_about_to_run() -> None:
    """asyncio's own loops; `_ready` is private."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: None, context=context_of(GREEN))  # a callback is no task's step
        tasks = [loop.create_task(one_step(), context=context_of(record)) for record in (RED, BLUE)]
        nobodys = loop.create_task(one_step(), context=Context())
        assert list(ready_requests(loop)) == [RED, BLUE]
        await asyncio.gather(nobodys, *tasks)
        assert list(ready_requests(loop)) == []

    run(main, "asyncio")


def test_uvloop_does_not_tell_who_is_about_to_run() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(one_step(), context=context_of(RED))
        assert list(ready_requests(loop)) == []
        await task

    run(main, "uvloop")
    assert list(ready_requests(None)) == []


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_tasks_that_have_moved_since(kind: str) -> None:
    """Told by the future that each waits for; `_fut_waiter` is private."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        remove = keep_requests(loop, not_asked)
        first, second, never = loop.create_future(), loop.create_future(), loop.create_future()

        async def wait_twice() -> None:
            await first
            await second

        async def wait() -> None:
            await never

        moving = [
            loop.create_task(wait_twice(), context=context)
            for context in (context_of(RED), context_of(RED), Context())
        ]
        still = loop.create_task(wait(), context=context_of(BLUE))
        await asyncio.sleep(0)
        waiting = waiting_tasks(loop)
        assert {*moving, still} <= set(waiting)
        assert (waiting[moving[0]], waiting[still]) == (first, never)
        assert list(moved_requests(waiting)) == []
        first.set_result(None)
        await asyncio.sleep(0)
        assert list(moved_requests(waiting)) == [RED, RED]
        assert still in waiting
        # Taken out, they are not told of again.
        second.set_result(None)
        await asyncio.gather(*moving)
        assert list(moved_requests(waiting)) == []
        still.cancel()
        await asyncio.wait([still])
        assert list(moved_requests(waiting)) == [BLUE]
        remove()

    run(main, kind)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_the_request_of_a_task(kind: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        remove = keep_requests(loop, not_asked)
        task = loop.create_task(one_step(), context=context_of(RED))
        nobodys = loop.create_task(one_step(), context=Context())
        assert request_of_task(task) is RED
        assert request_of_task(nobodys) is None
        await asyncio.gather(task, nobodys)
        remove()

    run(main, kind)


# -- timers that are due -----------------------------------------------------------------------------


def test_timers_that_should_have_fired() -> None:
    """asyncio's own loops keep them in a heap, `_scheduled`, which is private."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        handles = [
            loop.call_at(now + after, lambda: None, context=context)
            for after, context in (
                *((100.0 + n, context_of(GREEN)) for n in range(10)),
                (1.0, context_of(RED)),
                (4.0, context_of(BLUE)),
                (2.0, context_of(RED)),
                (3.0, Context()),
                (0.5, context_of(GREEN)),
            )
        ]
        assert list(due_timers(loop)) == []
        handles[-1].cancel()
        loop.time = lambda: now + 4.0  # type: ignore[method-assign]
        due = {(record, round(late, 6)) for record, late in due_timers(loop)}
        loop.time = lambda: now + 200.0  # type: ignore[method-assign]
        assert len(list(due_timers(loop))) == 13
        del loop.time
        assert due == {(RED, 3.0), (RED, 2.0), (BLUE, 0.0)}
        for handle in handles:
            handle.cancel()

    run(main, "asyncio")


def test_uvloop_does_not_tell_what_is_due() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        handle = loop.call_later(0.0, lambda: None, context=context_of(RED))
        assert list(due_timers(loop)) == []
        handle.cancel()

    run(main, "uvloop")
    assert list(due_timers(None)) == []


# -- when data arrived -------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


class Transport:
    """A server's side of a connection, with one socket."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def get_extra_info(self, name: str) -> Any:
        return self.sock if name == "socket" else None


class Connection:
    """What holds a connection, as uvicorn's `RequestResponseCycle` does."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport

    async def receive(self) -> None: ...


class ToldInfo:
    """A socket whose last data came so many milliseconds ago."""

    def __init__(self, milliseconds: int, length: int = 104) -> None:
        fields = [0] * 26
        fields[13] = milliseconds  # 8 bytes, then 32 bits each: the state, ..., last_data_sent, last_ack_sent
        self.info = struct.pack("=26I", *fields)[:length]

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return self.info[:length]


async def plain_receive() -> None: ...


@on_linux
def test_the_system_tells_for_how_many_milliseconds_nothing_has_arrived(clock: TurnedClock) -> None:
    assert arrival(Connection(Transport(ToldInfo(250))).receive) == 999.75
    assert arrival(Connection(Transport(ToldInfo(0))).receive) == 1000


@on_linux
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_when_the_last_data_of_a_real_connection_arrived(kind: str) -> None:
    """While the loop was held, and nobody read it; `tcpi_last_data_recv` is at another place otherwise."""

    class Protocol(asyncio.Protocol, Connection):
        def __init__(self) -> None:
            self.came = asyncio.Event()

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.came.set()

        def data_received(self, data: bytes) -> None:
            self.came.set()

    async def main() -> object:
        loop = asyncio.get_running_loop()
        served = Protocol()
        server = await loop.create_server(lambda: served, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            for _ in range(2):
                await served.came.wait()
                served.came.clear()
                client.sendall(b"x")
                sent = time.monotonic()
                time.sleep(0.25)
                came = arrival(served.receive)
                assert came is not None
                assert abs(came - sent) < 0.1
        served.transport.abort()
        server.close()
        await asyncio.sleep(0.01)
        try:
            return arrival(served.receive)
        except Exception as error:
            return error

    assert run(main, kind) is None  # of a connection that was closed


@on_linux
def test_where_no_data_arrives_by_tcp_nothing_is_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        assert arrival(Connection(Transport(ours)).receive) is None
    listening = socket.create_server(("127.0.0.1", 0))
    closed = Connection(Transport(listening)).receive
    listening.close()
    assert arrival(closed) is None
    assert arrival(Connection(Transport(None)).receive) is None
    assert arrival(Connection(None).receive) is None
    assert arrival(plain_receive) is None
    assert arrival(Transport(None).get_extra_info) is None
    assert arrival(Connection(object()).receive) is None


@on_linux
def test_an_old_kernel_that_tells_less() -> None:
    assert arrival(Connection(Transport(ToldInfo(250, length=52))).receive) is None


def test_a_system_that_does_not_tell_when_data_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert arrival(Connection(Transport(ToldInfo(250))).receive) is None


# -- other threads -----------------------------------------------------------------------------------


def test_threads_are_seen_though_their_list_is_locked() -> None:
    """The one that holds the lock may be the one that hangs; `_active` is private."""
    with threading._active_limbo_lock:  # type: ignore[attr-defined]
        living = living_threads()
    me = threading.current_thread()
    assert living[threading.get_ident()] == (me.name, me.native_id)
    assert set(living) == {thread.ident for thread in threading.enumerate()}


linux = pytest.mark.skipif(sys.platform != "linux", reason="the number of a thread's clock is Linux's")


@linux
def test_what_a_thread_has_used_of_the_cpu() -> None:
    before = time.thread_time()
    used: list[float | None] = []
    native = threading.get_native_id()
    thread = threading.Thread(target=lambda: used.append(thread_cpu(native)))
    thread.start()
    thread.join()
    assert used[0] is not None
    assert before <= used[0] <= time.thread_time()


@linux
def test_a_thread_that_has_ended_uses_nothing() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    with anyio_deadline() as expired:
        while thread_cpu(thread.native_id) is not None:  # the system may take a moment longer than Python
            assert not expired()


def test_a_system_that_does_not_tell_what_threads_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert thread_cpu(None) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert thread_cpu(threading.get_native_id()) is None


@pytest.fixture
def collector_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As up to 3.11, whatever version this is."""
    monkeypatch.setattr(CollectorHeld, "NEEDED", True)


@pytest.mark.usefixtures("collector_needed")
def test_while_a_stack_is_read_nothing_is_collected() -> None:
    held = CollectorHeld()
    for _ in range(2):
        with held:
            assert not gc.isenabled()
        assert gc.isenabled()
    with pytest.raises(ValueError, match="a look that failed"), held:
        raise ValueError("a look that failed")
    assert gc.isenabled()


@pytest.mark.usefixtures("collector_needed")
def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with CollectorHeld():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.usefixtures("collector_needed")
def test_a_forked_child_lets_the_collector_run_again() -> None:
    held = CollectorHeld()
    held.__enter__()
    held.release()
    assert gc.isenabled()
    gc.disable()
    try:
        held.release()  # it holds nothing any more
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="up to 3.11 any allocation may begin a collection")
def test_where_collections_do_no_harm_they_go_on() -> None:
    with CollectorHeld():
        assert gc.isenabled()


def test_a_whole_stack() -> None:
    frame: FrameType | None = sys._getframe()
    frames = raw_frames(frame)
    assert frames[0].code is test_a_whole_stack.__code__
    count = 0
    while frame is not None:
        count += 1
        frame = frame.f_back
    assert len(frames) == count
    assert raw_frames(None) == ()


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
        "from asyncguard._frames import position\n"
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


class Awaitable_:  # noqa: N801
    """Made of a coroutine, as libraries make them: its steps are a `coroutine_wrapper`."""

    def __await__(self) -> Generator[Any, Any, None]:
        return leaf().__await__()


async def over_an_awaitable() -> None:
    await Awaitable_()


async def over_a_step_of_a_generator() -> None:
    await numbers().__anext__()


async def over_a_default() -> None:
    await anext(numbers(), None)


async def over_a_closing_generator() -> None:
    generator = closing()
    await anext(generator)
    await generator.aclose()


async def closing() -> AsyncGenerator[int, None]:
    try:
        yield 1
    finally:
        await leaf()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (over_an_awaitable, ["over_an_awaitable", "leaf"]),
        (over_a_step_of_a_generator, ["over_a_step_of_a_generator", "numbers", "leaf"]),
        (over_a_default, ["over_a_default", "numbers", "leaf"]),
        (over_a_closing_generator, ["over_a_closing_generator", "closing", "leaf"]),
    ],
)
@pytest.mark.asyncio
async def test_what_stands_between_two_coroutines_is_looked_through(make: Any, expected: list[str]) -> None:
    """It does not tell whose it is, but refers to it."""
    assert await suspended(make()) == expected


@pytest.mark.asyncio
async def test_the_steps_of_a_coroutine_lead_to_it() -> None:
    coroutine = middle()
    steps = coroutine.__await__()
    steps.send(None)
    assert type(steps).__name__ == "coroutine_wrapper"
    assert names(steps) == names(coroutine) == ["middle", "leaf"]
    with pytest.raises(asyncio.CancelledError):
        steps.throw(asyncio.CancelledError)
    assert names(steps) == []


class Compiled:
    """A coroutine as Cython makes them: it has the same attributes, and no frame that is a Python one."""

    def __init__(self) -> None:
        self.cr_frame: object = types.SimpleNamespace(f_code=leaf.__code__, f_lineno=1)
        self.cr_await: object = None

    def __await__(self) -> Generator[Any, Any, None]:
        return self  # type: ignore[return-value]

    def __iter__(self) -> Compiled:
        return self

    def __next__(self) -> None: ...


async def over_compiled_code() -> None:
    await Compiled()


def test_compiled_code_ends_the_chain() -> None:
    assert names(Compiled()) == []
    coroutine = over_compiled_code()
    coroutine.send(None)
    assert names(coroutine) == ["over_compiled_code"]
    coroutine.close()


class Agreeable:
    """It has every attribute: itself."""

    def __getattr__(self, name: str) -> Any:
        asked.append(name)
        assert len(asked) < 100
        return self

    def __await__(self) -> Any:
        yield


class Explosive:
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the user's code was run for {name}")

    def __await__(self) -> Any:
        yield


asked: list[str] = []


async def over(awaitable: Any) -> None:
    await awaitable


@pytest.mark.parametrize("kind", [Agreeable, Explosive])
def test_an_object_of_the_users_is_not_asked(kind: type[Any]) -> None:
    assert names(kind()) == []
    coroutine = over(kind())
    coroutine.send(None)
    assert names(coroutine) == ["over", "__await__"]
    coroutine.close()
    assert asked == []


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
