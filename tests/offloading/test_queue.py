"""Calls that wait for a worker, with real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncguard.errors import OffloadQueueFull, WorkerCrashed
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import work

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
"""Seconds after which a test has failed."""


async def exists(path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        while not path.exists():
            await anyio.sleep(0.01)


async def test_short_calls_behind_a_long_one_are_not_held_up_while_a_worker_is_free(tmp_path: Path) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go_on"
    short: set[int] = set()
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(2) as pool:
            long: list[int] = []

            async def run_long() -> None:
                long.append(await pool.run(work.hold, str(begun), str(go_on)))

            async def run_short(number: int) -> None:
                assert await pool.run(work.same, number) == number
                short.add(number)

            async with anyio.create_task_group() as group:
                group.start_soon(run_long)
                await exists(begun)
                async with anyio.create_task_group() as behind:
                    for number in range(20):
                        behind.start_soon(run_short, number)
                assert len(short) == 20
                assert (long, pool.stats.running) == ([], 1)  # it runs still
                go_on.touch()
            assert len(long) == 1


async def test_calls_begin_in_the_order_of_their_priorities_and_of_their_coming(tmp_path: Path) -> None:
    begun, go_on, order = tmp_path / "begun", tmp_path / "go_on", tmp_path / "order"
    priorities = [0, 2, 0, -1, 2, 0]
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1) as pool:

            async def run(number: int) -> None:
                options = CallOptions(priority=priorities[number])
                args = (str(order), f"{number}\n")
                await pool.run_call(address_of(work.append), work.append, args, {}, options)

            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, work.hold, str(begun), str(go_on))
                await exists(begun)
                for number in range(len(priorities)):
                    group.start_soon(run, number)
                    while pool.stats.queued <= number:
                        await anyio.sleep(0.001)
                go_on.touch()
    assert [*map(int, order.read_text().split())] == [1, 4, 0, 2, 5, 3]


@pytest.mark.parametrize("how", ["cold", "crashed", "recycled"])
async def test_without_a_queue_there_is_always_a_worker_again(how: str) -> None:
    with anyio.fail_after(PATIENCE):
        pool = OffloadPool(1, max_queue=0, max_calls=1 if how == "recycled" else None)
        pool.open(warm=False)
        try:
            if how == "crashed":
                with pytest.raises(WorkerCrashed):
                    await pool.run(work.leave, 1)
            elif how == "recycled":
                assert await pool.run(work.pid) != os.getpid()
            assert await pool.run(work.add, 1) == 1
        finally:
            await pool.aclose()


async def test_a_full_queue_takes_calls_again_when_there_is_room(tmp_path: Path) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go_on"
    results: list[Any] = []
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, max_queue=1) as pool:

            async def run() -> None:
                results.append(await pool.run(work.add, 1))

            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, work.hold, str(begun), str(go_on))
                await exists(begun)
                group.start_soon(run)
                while not pool.stats.queued:
                    await anyio.sleep(0.001)
                with pytest.raises(OffloadQueueFull):
                    await pool.run(work.add, 2)
                go_on.touch()
            await run()
            assert (results, pool.stats.refused) == ([1, 1], 1)
