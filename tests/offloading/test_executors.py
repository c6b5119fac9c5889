"""Calls in threads and in executors: what they see, and what becomes of those that are given up."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import math
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asyncguard.errors import NotOffloadable, OffloadError, OffloadTimeout, WorkerCrashed
from asyncguard.offloading import _executors
from asyncguard.offloading._executors import Errand, interpreters
from asyncguard.offloading._offload import offload
from tests.offloading.surroundings import request_with

WITHIN = 30
"""Seconds that no test takes."""
SOON = 0.05
"""Seconds for what is to run out of time."""

variable: ContextVar[str] = ContextVar("variable", default="")


@offload
def spare(x: int) -> int:
    return x + 1


class Held:
    """A function that runs until it is let go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        try:
            assert self.gate.wait(WITHIN)
        finally:
            self.ended.set()
        return "let go"

    async def until(self, event: threading.Event) -> None:
        with anyio.fail_after(WITHIN):
            assert await anyio.to_thread.run_sync(event.wait, WITHIN)


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.gate.set()
    if made.begun.is_set():
        assert made.ended.wait(WITHIN)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(params=["thread", "executor"])
def backend(request: pytest.FixtureRequest, threads: ThreadPoolExecutor) -> Any:
    return "thread" if request.param == "thread" else threads


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        with anyio.fail_after(WITHIN):
            await test(*args, **kwargs)

    return run


# -- threads of either kind ------------------------------------------------------------------------


@pytest.mark.anyio
@bounded
async def test_it_runs_in_another_thread_in_the_context_of_the_caller(backend: Any) -> None:
    def where(*args: int, **kwargs: int) -> tuple[int, object]:
        return threading.get_ident(), (variable.get(), args, kwargs)

    variable.set("seen")
    thread, seen = await offload(backend=backend)(where)(1, 2, x=3)
    assert thread != threading.get_ident()
    assert seen == ("seen", (1, 2), {"x": 3})


@pytest.mark.anyio
@bounded
async def test_what_the_function_raises_is_raised(backend: Any) -> None:
    class Marker(Exception):
        pass

    def fail() -> None:
        raise Marker

    with pytest.raises(Marker):
        await offload(backend=backend)(fail)()


@pytest.mark.anyio
@bounded
async def test_a_call_that_is_late_is_given_up_and_runs_on(backend: Any, held: Held) -> None:
    with pytest.raises(OffloadTimeout, match=r"Held did not end within 0\.05 s; it runs on"):
        await offload(backend=backend, timeout=SOON)(held)()
    await held.until(held.begun)
    assert not held.ended.is_set()
    held.gate.set()
    await held.until(held.ended)


@pytest.mark.anyio
@bounded
async def test_what_a_request_has_left_counts_too(backend: Any, held: Held) -> None:
    with request_with(SOON):
        with pytest.raises(OffloadTimeout, match=r"within 0\.05 s"):
            await offload(backend=backend, timeout=WITHIN)(held)()


@pytest.mark.anyio
@bounded
async def test_a_call_that_is_cancelled_is_given_up_and_runs_on(backend: Any, held: Held) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(offload(backend=backend)(held))
        await held.until(held.begun)
        group.cancel_scope.cancel()
    assert not held.ended.is_set()


@pytest.mark.anyio
@bounded
async def test_a_timeout_of_the_function_is_its_own(backend: Any) -> None:
    def late() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine") as caught:
        await offload(backend=backend, timeout=WITHIN)(late)()
    assert not isinstance(caught.value, OffloadTimeout)


# -- anyio's threads ---------------------------------------------------------------------------------


@pytest.mark.anyio
@bounded
async def test_a_timeout_says_where_the_thread_is(held: Held) -> None:
    with pytest.raises(OffloadTimeout) as caught:
        await offload(backend="thread", timeout=SOON)(held)()
    lines = caught.value.stack.splitlines()
    assert any(__file__ in line and line.endswith("in __call__") for line in lines)
    assert not any("in run" in line for line in lines)


@pytest.mark.anyio
@bounded
async def test_a_call_keeps_its_seat_until_its_thread_is_done(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    seats = anyio.CapacityLimiter(1)
    monkeypatch.setattr(_executors, "_limiters", lambda: (seats, anyio.CapacityLimiter(math.inf)))
    with pytest.raises(OffloadTimeout, match="did not end"):
        await offload(backend="thread", timeout=SOON)(held)()
    assert seats.borrowed_tokens == 1
    with pytest.raises(OffloadTimeout, match=r"was not begun: no thread was free within 0\.05 s"):
        await offload(backend="thread", timeout=SOON)(math.sqrt)(4.0)
    held.gate.set()
    assert await offload(backend="thread", timeout=WITHIN)(math.sqrt)(4.0) == 2
    assert seats.borrowed_tokens == 0


@pytest.mark.anyio
@bounded
async def test_a_call_that_is_cancelled_before_it_began_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seats = anyio.CapacityLimiter(1)
    monkeypatch.setattr(_executors, "_limiters", lambda: (seats, anyio.CapacityLimiter(math.inf)))
    calls: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await offload(backend="thread")(calls.append)(1)
    assert scope.cancelled_caught
    assert seats.borrowed_tokens == 0
    assert calls == []


def test_what_is_given_up_before_a_thread_took_it_is_not_run() -> None:
    async def main() -> None:
        calls: list[int] = []
        seats = anyio.CapacityLimiter(1)
        call = _executors._ThreadCall(functools.partial(calls.append, 1), seats)
        await seats.acquire_on_behalf_of(call)
        call.give_up()
        assert seats.borrowed_tokens == 0
        assert call.run() is None
        assert not calls
        assert not call.has_begun
        assert call.stack() == ""

    asyncio.run(main())


def test_a_thread_may_outlive_its_loop(held: Held) -> None:
    async def main() -> None:
        with pytest.raises(OffloadTimeout):
            await offload(backend="thread", timeout=SOON)(held)()
        held.gate.set()

    asyncio.run(main())
    assert held.ended.wait(WITHIN)


@pytest.mark.anyio
@bounded
async def test_as_many_threads_as_anyio_allows_but_not_the_same() -> None:
    assert await offload(backend="thread")(math.sqrt)(4.0) == 2
    seats, unlimited = _executors._limiters()
    default = anyio.to_thread.current_default_thread_limiter()
    assert seats is not default
    assert (seats.total_tokens, unlimited.total_tokens) == (default.total_tokens, math.inf)
    assert _executors._limiters() == (seats, unlimited)
    assert seats.borrowed_tokens == unlimited.borrowed_tokens == 0


# -- executors ----------------------------------------------------------------------------------------


@pytest.mark.anyio
@bounded
async def test_a_call_that_an_executor_has_not_begun_is_taken_back(
    held: Held, threads: ThreadPoolExecutor
) -> None:
    calls: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(offload(backend=threads)(held))
        await held.until(held.begun)
        with pytest.raises(OffloadTimeout, match=r"append was not begun within 0\.05 s"):
            await offload(backend=threads, timeout=SOON)(calls.append)(1)
        with anyio.move_on_after(SOON):
            await offload(backend=threads)(calls.append)(2)
        held.gate.set()
        await offload(backend=threads)(calls.append)(3)
    assert calls == [3]


@pytest.mark.anyio
@bounded
async def test_an_executor_that_is_shut_down_is_an_error(held: Held) -> None:
    executor = ThreadPoolExecutor(1)
    errors: list[BaseException] = []

    async def wait() -> None:
        with pytest.raises(OffloadError, match="sqrt was called off by its executor") as caught:
            await offload(backend=executor)(math.sqrt)(4.0)
        errors.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(offload(backend=executor)(held))
        await held.until(held.begun)
        group.start_soon(wait)
        while not executor._work_queue.qsize():
            await anyio.lowlevel.checkpoint()
        executor.shutdown(wait=False, cancel_futures=True)
        held.gate.set()
    assert len(errors) == 1
    with pytest.raises(OffloadError, match="sqrt was not begun: cannot schedule new futures after shutdown"):
        await offload(backend=executor)(math.sqrt)(4.0)


class Broken(Executor):
    """Breaks at once, or under the call."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        error = BrokenProcessPool("a process died")
        if self.at_once:
            raise error
        future: Future[Any] = Future()
        future.set_exception(error)
        return future


@pytest.mark.anyio
@bounded
@pytest.mark.parametrize(
    ("at_once", "message"), [(True, "sqrt was not begun: "), (False, "that ran .*sqrt broke: ")]
)
async def test_an_executor_that_is_broken_is_a_crash(at_once: bool, message: str) -> None:
    with pytest.raises(WorkerCrashed, match=message):
        await offload(backend=Broken(at_once=at_once))(math.sqrt)(4.0)


@pytest.mark.anyio
@bounded
async def test_an_executor_of_processes_is_sent_the_address() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert await offload(backend=executor)(math.sqrt)(4.0) == 2
        with pytest.raises(NotOffloadable, match="a lambda has no name"):
            await offload(backend=executor)(lambda: None)()
        with pytest.raises(NotOffloadable, match=r"context=\.\.\. to this executor"):
            await offload(backend=executor, context=[variable])(math.sqrt)(4.0)
        assert await offload(backend=executor)(math.sqrt)(9.0) == 3


def test_an_errand_leads_through_pickle_to_the_function_that_was_decorated() -> None:
    errand = pickle.loads(pickle.dumps(Errand(spare.__wrapped__, ())))
    assert errand(1) == 2
    with pytest.raises(NotOffloadable):
        pickle.dumps(Errand(lambda: None, ()))


@pytest.mark.anyio
@bounded
async def test_interpreters_are_an_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreters.cache_clear()
    monkeypatch.setattr(concurrent.futures, "InterpreterPoolExecutor", ThreadPoolExecutor, raising=False)
    try:
        sqrt = offload(backend="interpreter")(math.sqrt)
        assert await sqrt(4.0) == 2
        assert interpreters() is interpreters()
        interpreters().executor.shutdown()
    finally:
        interpreters.cache_clear()


@pytest.mark.skipif(sys.version_info < (3, 14), reason="they came with it")
@pytest.mark.anyio
@bounded
async def test_a_call_in_an_interpreter() -> None:
    interpreters.cache_clear()
    try:
        assert await offload(backend="interpreter")(math.sqrt)(4.0) == 2
        with pytest.raises(ValueError, match=r".+"):
            await offload(backend="interpreter")(math.sqrt)(-1.0)
    finally:
        interpreters().executor.shutdown()
        interpreters.cache_clear()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
@pytest.mark.anyio
@bounded
async def test_the_loop_runs_on_meanwhile(backend: Any) -> None:
    ticks = 0
    call = asyncio.ensure_future(offload(backend=backend)(time.sleep)(0.05))
    while not call.done():
        ticks += 1
        await asyncio.sleep(0.005)
    assert ticks > 1
