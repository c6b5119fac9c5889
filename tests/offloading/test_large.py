"""Large payloads through real workers: whole, without stalling the loop, and without a trace afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from asyncguard.errors import OffloadTimeout, PayloadError, WorkerCrashed
from asyncguard.offloading import _scratch
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._pool import OffloadPool
from asyncguard.offloading._wire import INLINE
from tests.offloading import chores_large as chores

PATIENCE = 30.0
"""Seconds after which what a test waits for will not come."""
PAYLOAD = "/memfd:asyncguard (deleted)"
"""The file that something large travels in."""
LARGE = 100_000_000
ENOUGH = 20_000_000
"""A large payload, where many are needed."""
SLACK = 60_000_000
"""So many bytes may a process have grown by."""


@pytest.fixture(autouse=True)
def _no_files_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the next argument, that is: only for a moment."""
    monkeypatch.setattr(_scratch, "_KEPT_FOR", 0.01)


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


@pytest.fixture
async def pool(anyio_backend: object) -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(2 * PATIENCE):
        async with OffloadPool(1) as pool:
            yield pool


@pytest.fixture(autouse=True)
def gate() -> Iterator[None]:
    yield
    chores.gate.clear()
    chores.arrived.clear()


on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


async def until(is_so: Callable[[], bool]) -> None:
    with anyio.fail_after(PATIENCE):
        while not is_so():
            await anyio.sleep(0.01)


class Traces:
    """What this process, and the worker of a pool, hold; taken when both are at rest."""

    def __init__(self, pool: OffloadPool) -> None:
        self._pool = pool

    async def take(self) -> Traces:
        # One of each kind of call: so that what is made once, and kept, has been made.
        await self._pool.run(chores.same, chores.make("array", 1_000_000))
        await until(lambda: gc.collect() >= 0 and PAYLOAD not in chores.descriptors())
        self.descriptors = chores.descriptors()
        self.shared_memory = chores.shared_memory()
        self.theirs = await self._pool.run(chores.descriptors)
        self.memory = chores.memory()
        self.their_memory = await self._pool.run(chores.memory)
        return self

    async def are_all(self) -> None:
        """Nothing has come to them since."""
        await self._pool.run(chores.pid)  # a worker that died has its successor now
        # The thread that packed something lets go of it a moment later.
        with contextlib.suppress(TimeoutError):
            await until(lambda: gc.collect() >= 0 and chores.descriptors() == self.descriptors)
        assert chores.descriptors() == self.descriptors
        assert chores.shared_memory() == self.shared_memory
        assert await self._pool.run(chores.descriptors) == self.theirs
        assert chores.memory() < self.memory + SLACK
        assert await self._pool.run(chores.memory) < self.their_memory + SLACK


# -- there and back ----------------------------------------------------------------------------------


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("size", [1_000_000, LARGE])
@pytest.mark.parametrize(
    "kind", ["bytes", "bytearray", "view", "array", "columns", "strided", "frame", "table"]
)
async def test_there_and_back(pool: OffloadPool, kind: str, size: int) -> None:
    value = chores.make(kind, size)
    await pool.run(chores.make, kind, 1000)  # what that needs is imported now
    traces = await Traces(pool).take()
    returned = await pool.run(chores.same, value)
    assert type(returned) is type(value)
    if kind == "frame":
        assert returned.equals(value)
        assert (returned.dtypes == value.dtypes).all()
    elif isinstance(value, np.ndarray):
        assert np.array_equal(returned, value)
        assert returned.dtype == value.dtype
        assert not value.flags.forc or returned.flags.f_contiguous == value.flags.f_contiguous
        assert returned.flags.writeable
    else:
        assert returned == value
    del returned
    await traces.are_all()
    assert pool.stats.crashes == 0


@on_asyncio
@pytest.mark.anyio
async def test_many_small_things(pool: OffloadPool) -> None:
    rows = chores.rows(100_000)
    traces = await Traces(pool).take()
    assert await pool.run(chores.same, rows) == rows
    assert await pool.run(chores.rows, 100_000) == rows
    await traces.are_all()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", [bytes, bytearray, np.zeros])
async def test_around_the_size_that_travels_in_the_stream(pool: OffloadPool, kind: Any) -> None:
    """By one byte from a body that goes just so to one that does not, and empty ones."""
    for size in (0, 1, 32 << 10, *range(INLINE - 250, INLINE + 2)):
        value = kind(size) if kind is not np.zeros else np.zeros(size, np.uint8)
        returned = await pool.run(chores.same, value)
        assert type(returned) is type(value)
        assert bytes(returned) == bytes(value)


@on_asyncio
@pytest.mark.anyio
async def test_views_of_any_shape(pool: OffloadPool) -> None:
    grid = np.arange(90_000.0).reshape(300, 300)
    for array in (grid, grid.T, grid[::2, ::3], np.array(5.0)):
        view = array.data
        returned = await pool.run(chores.same, view)
        assert (type(returned), returned.format, returned.shape) == (memoryview, view.format, view.shape)
        assert returned == view
    with pytest.raises(PayloadError, match=r"argument 1 \(memoryview\) cannot .* pass bytes instead"):
        await pool.run(chores.length, grid.astype(">f8").data)


@on_asyncio
@pytest.mark.anyio
async def test_what_is_small_here_and_huge_on_the_way(pool: OffloadPool) -> None:
    traces = await Traces(pool).take()
    assert await call(pool, chores.same, chores.Huge(LARGE)) == LARGE
    assert await call(pool, chores.huge, LARGE) == LARGE
    await traces.are_all()


@pytest.mark.anyio
async def test_several_at_once() -> None:
    """More than there are workers, and than there are threads for packing."""
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(2) as pool:
            results: dict[int, float] = {}

            async def one(number: int) -> None:
                results[number] = await pool.run(chores.total, np.full(ENOUGH // 80, number))

            async with anyio.create_task_group() as group:
                for number in range(12):
                    group.start_soon(one, number)
            assert results == {number: number * (ENOUGH // 80) for number in range(12)}


# -- the loop meanwhile ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lateness() -> AsyncIterator[list[float]]:
    """By how many seconds a task that wants to run each millisecond was late."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - due)

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0.01)
    try:
        yield late
    finally:
        await asyncio.sleep(0.01)
        ticking.cancel()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["bytes", "array", "strided"])
async def test_the_loop_does_not_stall(pool: OffloadPool, kind: str) -> None:
    """Not for a sixth of what pickling on it would take; the best of a few, as the machine may be busy."""
    value = chores.make(kind, LARGE)
    await pool.run(chores.pid)
    before = time.perf_counter()
    pickle.loads(pickle.dumps(value, 5))
    on_the_loop = time.perf_counter() - before
    worst = []
    end = time.monotonic() + PATIENCE / 2
    while time.monotonic() < end:
        async with lateness() as late:
            returned = await pool.run(chores.same, value)
        assert type(returned) is type(value)
        del returned
        worst.append(max(late))
        if worst[-1] < on_the_loop / 6:
            break
    assert min(worst) < on_the_loop / 6, (worst, on_the_loop)


# -- calls that are given up in the middle -----------------------------------------------------------


@pytest.mark.anyio
async def test_a_scope_that_is_cancelled_while_its_call_is_packed(pool: OffloadPool) -> None:
    traces = await Traces(pool).take()
    async with anyio.create_task_group() as group:

        async def run() -> None:
            await pool.run(chores.same, [bytes(ENOUGH), chores.Gated()])

        group.start_soon(run)
        await until(chores.arrived.is_set)
        group.cancel_scope.cancel()
        chores.gate.set()
    await traces.are_all()


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_while_its_call_is_packed() -> None:
    """Asyncio's own way: the task goes on at once, and the thread does not."""
    async with OffloadPool(1) as pool:
        traces = await Traces(pool).take()
        for _ in range(3):
            task = asyncio.ensure_future(pool.run(chores.same, [bytes(ENOUGH), chores.Gated()]))
            await until(chores.arrived.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            chores.gate.set()
            await traces.are_all()
            chores.gate.clear()
            chores.arrived.clear()
        assert pool.stats.running == 0


@pytest.mark.asyncio
async def test_a_loop_that_ends_while_a_call_is_packed() -> None:
    def serve() -> None:
        async def main() -> None:
            async with OffloadPool(1) as pool:
                await pool.run(chores.pid)
                task = asyncio.ensure_future(pool.run(chores.same, [bytes(ENOUGH), chores.Gated()]))
                await until(chores.arrived.is_set)
                task.cancel()

        asyncio.run(main())
        chores.gate.set()  # the loop is gone

    await asyncio.to_thread(serve)
    chores.arrived.clear()
    before = [each for each in chores.descriptors() if each != PAYLOAD]  # its thread may be writing still
    chores.gate.clear()
    await asyncio.to_thread(serve)
    await until(lambda: gc.collect() >= 0 and chores.descriptors() == before)


@on_asyncio
@pytest.mark.anyio
async def test_a_deadline_that_passes_while_a_call_is_packed(pool: OffloadPool, tmp_path: Path) -> None:
    """It is raised as soon as that is done, and nothing has begun."""
    traces = await Traces(pool).take()
    begun = tmp_path / "begun"
    opener = asyncio.get_running_loop().call_later(0.3, chores.gate.set)
    args = str(begun), [bytes(ENOUGH), chores.Gated()]
    with pytest.raises(OffloadTimeout):
        await pool.run_call(
            address_of(chores.linger), chores.linger, args[:1], {"_": args[1]}, CallOptions(timeout=0.1)
        )
    opener.cancel()
    await traces.are_all()
    assert not begun.exists()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("how", ["kill", "deadline", "cancel"])
@pytest.mark.parametrize("where", ["there", "back"])
async def test_a_worker_that_is_killed_in_the_middle_of_a_transfer(
    pool: OffloadPool, how: str, where: str, tmp_path: Path
) -> None:
    """While it rebuilds an argument, or packs its result."""
    traces = await Traces(pool).take()
    first = await pool.run(chores.pid)
    begun = tmp_path / "begun"
    transfer: tuple[Any, ...] = (chores.slow_to_pickle, str(begun), LARGE)
    if where == "there":
        value = [np.zeros(LARGE, np.uint8), chores.SlowToRebuild(str(begun)), bytes(ENOUGH)]
        transfer = (chores.same, value)
        del value
    options: dict[str, Any] = {"on_cancel": "kill"}
    if how == "deadline":
        options["timeout"] = 0.5
    task = asyncio.ensure_future(call(pool, *transfer, **options))
    if how == "deadline":
        with pytest.raises(OffloadTimeout):
            await task
    else:
        await until(begun.exists)
        if how == "kill":
            os.kill(first, signal.SIGKILL)
            with pytest.raises(WorkerCrashed):
                await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    del task, transfer
    # Packing may have taken all of its time: then it was not begun, and nobody was killed.
    assert await pool.run(chores.pid) != first or (how == "deadline" and not begun.exists())
    await traces.are_all()


@on_asyncio
@pytest.mark.anyio
async def test_a_worker_that_dies_with_a_frame_in_its_socket(pool: OffloadPool) -> None:
    """The descriptor of the file is on its way when nobody is left to take it."""
    traces = await Traces(pool).take()
    first = await pool.run(chores.pid)
    os.kill(first, signal.SIGSTOP)
    tasks = [asyncio.ensure_future(pool.run(chores.same, np.zeros(LARGE, np.uint8)))]
    await until(lambda: pool.stats.running == 1)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(WorkerCrashed):
        await tasks.pop()
    await traces.are_all()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("function", [chores.length, chores.make], ids=["there", "back"])
async def test_kills_at_any_moment(pool: OffloadPool, function: Callable[..., Any]) -> None:
    """A result or a crash; and the worst that can be left is a stopped clock, not a file."""
    value = chores.make("array", ENOUGH)
    args = (value,) if function is chores.length else ("array", ENOUGH)
    traces = await Traces(pool).take()
    outcomes = []
    for delay in range(12):
        pid = await pool.run(chores.pid)
        task = asyncio.ensure_future(pool.run(function, *args))
        await asyncio.sleep(delay / 400)
        os.kill(pid, signal.SIGKILL)
        try:
            outcomes.append(await task)
        except WorkerCrashed:
            outcomes.append(None)
        finally:
            del task
        # It may be found dead only when it is given the next call.
        await until(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
        while True:
            try:
                assert await pool.run(chores.pid) != pid
                break
            except WorkerCrashed:
                pass
    assert all(outcome is None or np.size(outcome) in (1, len(value)) for outcome in outcomes)
    outcomes.clear()
    await traces.are_all()
