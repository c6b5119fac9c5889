"""Workers do not outlive their server, however that ends; nor does a pool outlive its loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from asyncguard.offloading import _pools
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import work

PATIENCE = 30.0
ROOT = Path(__file__).parents[2]

SERVER = """
import asyncio, os, sys, threading
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import work

async def main():
    async with OffloadPool(2) as pool:
        pids = [await pool.run(work.pid), *(child for child in [os.getpid()])]
        calls = [asyncio.ensure_future(pool.run(getattr(work, name))) for name in {functions!r}]
        await asyncio.sleep(0.5)
        print(*[process.pid for process in pool._backend._dispatcher._processes.values()], flush=True)
        {then}
        await asyncio.gather(*calls)

{start}
"""
PLAINLY = "asyncio.run(main())"
IN_A_THREAD = "thread = threading.Thread(target=asyncio.run, args=(main(),)); thread.start(); thread.join()"


@contextmanager
def server(
    *functions: str, then: str = "pass", start: str = PLAINLY
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    code = SERVER.format(functions=functions, then=then, start=start)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            pids = [*map(int, process.stdout.readline().split())]
            assert len(pids) == 2
            yield process, pids
        finally:
            process.kill()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.02)


@pytest.mark.parametrize("start", [PLAINLY, IN_A_THREAD], ids=["", "thread"])
def test_a_killed_server_leaves_no_worker(start: str) -> None:
    """Not even one that never lets go of the GIL, and one that swallows all."""
    with server("count_in_c", "swallow", start=start) as (process, pids):
        assert all(map(is_alive, pids))
        process.kill()
        process.wait(PATIENCE)
        assert_gone(pids)


def test_a_server_that_ends_without_a_word_leaves_no_worker() -> None:
    with server("count_in_c", "swallow", then="os._exit(0)") as (process, pids):
        process.wait(PATIENCE)
        assert_gone(pids)


def test_a_forked_child_keeps_no_worker_alive() -> None:
    """It has copies of all that the server has open, unless it lets go of them."""
    fork = "child = os.fork(); child or (print(os.getpid(), flush=True), __import__('time').sleep(60))"
    with server("count_in_c", "swallow", then=fork) as (process, pids):
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait(PATIENCE)
            assert is_alive(child)
            assert_gone(pids)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_pool_that_nobody_opened_ends_with_its_loop() -> None:
    async def main() -> int:
        pool = _pools.current()
        assert _pools.current() is pool
        return await pool.run(work.pid)

    first = asyncio.run(main())
    assert_gone([first])
    assert asyncio.run(main()) != first


def test_a_loop_that_is_closed_without_a_word() -> None:
    loop = asyncio.new_event_loop()

    async def main() -> int:
        return await _pools.current().run(work.pid)

    first = loop.run_until_complete(main())
    loop.close()
    assert asyncio.run(main()) != first
    assert_gone([first])


async def _pid_of_default() -> int:
    return await _pools.current().run(work.pid)


def test_a_pool_that_nobody_opened_on_trio() -> None:
    first = anyio.run(_pid_of_default, backend="trio")
    assert_gone([first])


@pytest.mark.anyio
async def test_the_innermost_open_pool_is_the_one() -> None:
    async with OffloadPool(1) as outer:
        assert _pools.current() is outer
        async with OffloadPool(1) as inner:
            assert _pools.current() is inner
        assert _pools.current() is outer


@pytest.mark.anyio
async def test_a_pool_is_of_one_loop() -> None:
    async with OffloadPool(1) as pool:
        with pytest.raises(RuntimeError, match="another event loop"):
            await anyio.to_thread.run_sync(lambda: anyio.run(pool.run, work.pid))
        with pytest.raises(RuntimeError, match="open already"):
            pool.open()
