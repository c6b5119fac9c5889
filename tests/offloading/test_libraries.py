"""What NumPy, pandas and Arrow make goes through real workers as it is; long calls of C code are stopped."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest

from asyncguard.errors import OffloadTimeout, PayloadError
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import chores_large as chores

pytestmark = [pytest.mark.anyio]

pa: Any = import_module("pyarrow")  # it has no types

PATIENCE = 60.0
COUNT = 100_000


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shared_pool(anyio_backend: object) -> AsyncIterator[OffloadPool]:
    async with OffloadPool(1) as pool:
        yield pool


@pytest.fixture
async def pool(shared_pool: OffloadPool) -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        yield shared_pool


# -- arrays ------------------------------------------------------------------------------------------


def read_only() -> np.ndarray[Any, Any]:
    array = np.arange(COUNT)
    array.flags.writeable = False
    return array


FLOATS = np.arange(float(COUNT))
RECORD = np.dtype([("id", "i4"), ("at", "f8", (3,)), ("name", "U5")])
ARRAYS: dict[str, Any] = {
    "C": FLOATS.reshape(1000, -1),
    "F": np.asfortranarray(FLOATS.reshape(1000, -1)),
    "a slice": FLOATS[10:-10],
    "every third": FLOATS[::3],
    "backwards": FLOATS[::-1],
    "axes in another order": FLOATS.reshape(100, 100, -1).transpose(1, 2, 0),
    "columns of a matrix": FLOATS.reshape(1000, -1)[:, 10:20],
    "a broadcast": np.broadcast_to(np.arange(10.0), (COUNT // 10, 10)),
    "objects": np.array([{"a": 1}, None, "text"] * (COUNT // 3), dtype=object),
    "objects, strided": np.array(["text", None] * COUNT, dtype=object)[::2],
    "read-only": read_only(),
    "read-only and small": read_only()[:10],
    "structured": np.zeros(COUNT, RECORD),
    "a field": np.zeros(COUNT, RECORD)["at"],
    "big-endian": FLOATS.astype(">f8"),
    "times": np.arange(COUNT).astype("M8[s]"),
    "text": np.array(["abc", "é"] * COUNT),
    "complex": FLOATS.astype(complex),
    "empty": np.zeros((0, 5)),
    "no axes": np.array(5.0),
    "masked": np.ma.masked_greater(FLOATS, 50),
    "records": np.rec.array(np.zeros(COUNT, RECORD)),
}


@pytest.mark.parametrize("name", ARRAYS)
async def test_arrays(pool: OffloadPool, name: str) -> None:
    array = ARRAYS[name]
    returned = await pool.run(chores.same, array)
    assert type(returned) is type(array)
    assert (returned.dtype, returned.shape) == (array.dtype, array.shape)
    assert np.array_equal(returned, array)
    assert returned.flags.aligned
    if array.flags.forc:
        assert (returned.flags.c_contiguous, returned.flags.f_contiguous) == (
            array.flags.c_contiguous,
            array.flags.f_contiguous,
        )
        assert returned.flags.writeable == array.flags.writeable
    else:  # a copy, which is the receiver's own
        assert returned.flags.forc
    if returned.flags.writeable and returned.size and returned.dtype == float:
        returned.flat[0] = 7
        assert array.flat[0] != 7


async def test_a_function_may_write_to_its_argument(pool: OffloadPool) -> None:
    array = np.zeros(COUNT)
    assert (await pool.run(chores.fill, array, 3) == 3).all()
    assert not array.any()
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        await pool.run(chores.fill, array, 3)


async def test_an_array_is_the_same_object_wherever_it_is_meant(pool: OffloadPool) -> None:
    array = np.zeros(COUNT)
    assert await pool.run(chores.is_same, array, array, third=array) == (True, True)
    first, second = await pool.run(chores.same, (array, array))
    assert first is second
    left, right = await pool.run(chores.same, (array[: COUNT // 2], array[COUNT // 4 :]))
    left[:] = 1  # views of one array are arrays of their own afterwards
    assert not right.any()
    nested: list[Any] = [array]
    nested.append(nested)
    returned = await pool.run(chores.same, nested)
    assert returned[1] is returned


async def test_what_came_is_passed_on(pool: OffloadPool) -> None:
    """A result is a mapping; so is what is a view of it, what is written to it, and what outlives it."""
    array = await pool.run(chores.make, "array", 8 * COUNT)
    part = array[5 : COUNT // 2]
    assert await pool.run(chores.total, part) == part.sum()
    part[:] = 1
    assert await pool.run(chores.total, part) == part.size
    del array
    gc.collect()
    again = await pool.run(chores.same, part)
    del part
    gc.collect()
    assert (again == 1).all()
    assert await pool.run(chores.total, again) == again.size


@pytest.mark.parametrize(("count", "size"), [(10_000, 100), (3000, 5000)])
async def test_many_arrays(pool: OffloadPool, count: int, size: int) -> None:
    arrays = [np.full(size, number, np.float64) for number in range(count)]
    returned = await pool.run(chores.same, arrays)
    assert len(returned) == count
    assert all(map(np.array_equal, arrays, returned))


async def test_results_that_are_collected_take_few_descriptors(pool: OffloadPool) -> None:
    before = len(chores.descriptors())
    results = [await pool.run(chores.make, "array", 400_000) for _ in range(100)]
    assert len(chores.descriptors()) <= before + 65
    assert {result.sum() for result in results} == {results[0].sum()}
    results.clear()
    end = time.monotonic() + PATIENCE / 2
    while len(chores.descriptors()) > before + 1:
        assert time.monotonic() < end
        gc.collect()
        await anyio.sleep(0.01)


# -- frames and tables -------------------------------------------------------------------------------

TIMES = pd.date_range("2026-01-01", periods=20_000, freq="min", tz="Europe/Berlin")
FRAMES: dict[str, Any] = {
    "numbers": pd.DataFrame({"a": np.arange(COUNT), "b": np.arange(COUNT) / 2}),
    "text": pd.DataFrame({"name": [f"row {number}" for number in range(COUNT)]}),
    "times": pd.DataFrame({"at": TIMES, "took": TIMES - TIMES[0]}),
    "categories": pd.DataFrame({"kind": pd.Categorical(["x", "y"] * COUNT, ordered=True)}),
    "objects": pd.DataFrame({"any": pd.Series([{"a": 1}, None] * 10_000, dtype=object)}),
    "of all sorts": pd.DataFrame({"n": range(20_000), "s": ["text"] * 20_000, "at": TIMES}, index=TIMES),
    "with gaps": pd.DataFrame({"n": pd.array([1, None] * COUNT, dtype="Int64")}),
    "every second row": pd.DataFrame({"a": np.arange(COUNT), "b": np.arange(COUNT) / 2}).iloc[::2],
    "two levels": pd.DataFrame(
        {"n": range(40_000)}, index=pd.MultiIndex.from_product([range(200), range(200)])
    ),
    "empty": pd.DataFrame({"a": [], "b": []}),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_frames(pool: OffloadPool, name: str) -> None:
    frame = FRAMES[name]
    returned = await pool.run(chores.same, frame)
    pd.testing.assert_frame_equal(returned, frame)
    if name == "numbers":
        returned.loc[0, "a"] = 7
        assert (returned.loc[0, "a"], frame.loc[0, "a"]) == (7, 0)
        series = await pool.run(chores.same, frame["b"])
        pd.testing.assert_series_equal(series, frame["b"])


def table() -> Any:
    return pa.table(
        {
            "id": np.arange(COUNT),
            "name": [f"row {number}" for number in range(COUNT)],
            "list": [[1, 2], None] * (COUNT // 2),
            "kind": pa.array(["x", "y"] * (COUNT // 2)).dictionary_encode(),
        }
    )


async def test_tables(pool: OffloadPool) -> None:
    whole = table()
    for value in (
        whole,
        whole.slice(100, 1000),
        whole.to_batches()[0],
        whole["name"],
        whole["list"].chunk(0),
    ):
        returned = await pool.run(chores.same, value)
        assert type(returned) is type(value)
        assert returned.equals(value)
        returned.validate(full=True)
    assert await pool.run(chores.same, whole.schema) == whole.schema
    assert await pool.run(chores.length, pa.table({})) == 0


async def test_a_table_next_to_what_cannot_be_sent(pool: OffloadPool) -> None:
    with pytest.raises(PayloadError):
        await pool.run(chores.same, [table(), threading.Lock()])
    assert (await pool.run(chores.same, table())).equals(table())


# -- calls that do not listen ------------------------------------------------------------------------

DEAF = [chores.multiply, chores.sort, chores.count]
LONG = [*DEAF, chores.match, chores.sleep]
STALL = 0.005
"""For so many seconds the loop may be held up."""


def starved() -> float:
    """For how many seconds this thread has been ready to run and got no CPU: the machine's fault."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


@pytest.mark.parametrize("how", ["deadline", "cancel"])
@pytest.mark.parametrize("function", LONG, ids=lambda function: function.__name__)
async def test_long_calls_are_stopped(function: Callable[..., Any], how: str) -> None:
    """Those that are deaf are killed; and the loop goes on meanwhile, if the GIL is kept there or not."""
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, grace=0.1 if function in DEAF else PATIENCE) as pool:
            stalls = [await is_stopped(pool, function, how)]
            while stalls[-1] >= STALL and len(stalls) < 5:
                stalls.append(await is_stopped(pool, function, how))
            assert stalls[-1] < STALL, stalls


async def is_stopped(pool: OffloadPool, function: Callable[..., Any], how: str) -> float:
    """Returns the longest stall of the loop meanwhile; plus infinity if it could not be seen."""
    await pool.run(chores.total, np.zeros(1))
    first = await pool.run(chores.pid)
    begun = anyio.Event()
    gaps: list[float] = []
    kills = pool.stats.kills

    async def tick() -> None:
        while True:
            before, waited = time.perf_counter(), starved()
            await anyio.sleep(0.001)
            gaps.append(time.perf_counter() - before - 0.001 - (starved() - waited))

    def on_progress(fraction: float) -> None:
        begun.set()

    async with anyio.create_task_group() as ticking:
        ticking.start_soon(tick)
        if how == "deadline":
            with pytest.raises(OffloadTimeout) as caught:
                await call(pool, function, timeout=0.7, on_progress=on_progress)
            stack = caught.value.stack  # there is none if the machine was so busy that it came too late
            assert not stack or f"in {function.__name__}" in stack
        else:

            async def run() -> None:
                await call(pool, function, on_progress=on_progress)

            async with anyio.create_task_group() as group:
                group.start_soon(run)
                await begun.wait()
                await anyio.sleep(0.2)
                group.cancel_scope.cancel()
        # None of them would have ended by then.
        assert await pool.run(chores.length, b"next") == 4
        ticking.cancel_scope.cancel()
    killed = pool.stats.kills - kills
    assert killed <= (function in DEAF)
    assert (await pool.run(chores.pid) != first) == killed
    assert not (killed and Path(f"/proc/{first}").exists())
    assert len(gaps) > 5
    # On a busy machine it may be told before it has come to where it hears nothing.
    return max(gaps) if killed == (function in DEAF) else math.inf


async def test_a_library_with_threads_does_not_swallow_what_stops_a_function() -> None:
    """A signal for the process may be given to any of them. The function itself may then go on sleeping."""
    with anyio.fail_after(2 * PATIENCE):
        async with OffloadPool(1, grace=PATIENCE) as pool:
            first = await pool.run(chores.pid)
            for _ in range(10):
                await pool.run(chores.start_threads)
                with pytest.raises(OffloadTimeout):
                    await call(pool, chores.sleep, timeout=0.05)
                with anyio.fail_after(PATIENCE / 3):
                    assert await pool.run(chores.pid) == first
            assert pool.stats.kills == 0
