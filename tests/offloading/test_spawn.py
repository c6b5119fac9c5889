"""Workers that are each a Python of their own do what forked ones do, and bear what those do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncguard.errors import OffloadError, OffloadTimeout, WorkerCrashed
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import work
from tests.offloading.surroundings import children_of_this_process

PATIENCE = 30.0
"""Seconds after which a test has failed."""

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow]
in_a_loop = pytest.mark.anyio


@pytest.fixture
async def pool() -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, start_method="spawn") as pool:
            yield pool


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where modules are found."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


def function_of(module: str, name: str = "probe") -> Any:
    """What stands for a function whose module the server does not import."""

    def function() -> None: ...

    function.__module__, function.__qualname__ = module, name
    return function


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- calls -------------------------------------------------------------------------------------------


@in_a_loop
async def test_calls(pool: OffloadPool) -> None:
    assert await pool.run(work.add, 1, b=2) == 3
    data = os.urandom(1_000_000)
    assert await pool.run(work.same, data) == data
    with pytest.raises(work.Marker, match="mine") as caught:
        await pool.run(work.fail, work.Marker("mine"))
    assert "in fail" in str(caught.value.__cause__)
    await pool.run(work.say, "hello")
    assert await pool.run(work.listen) == ""


@in_a_loop
async def test_a_worker_is_a_child_of_the_server_and_no_copy(pool: OffloadPool) -> None:
    first = await pool.run(work.pid)
    assert await pool.run(os.getppid) == os.getpid()
    assert await pool.run(os.getpgrp) == first, "a Ctrl-C in the terminal is not for it"
    async with OffloadPool(2, start_method="spawn") as other:
        assert await other.run(os.getppid) == os.getpid()
    async with OffloadPool(1) as forking:
        assert await forking.run(os.getppid) != os.getpid()


@in_a_loop
async def test_all_workers_start(tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(3, start_method="spawn", nice=7) as pool:
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(pool.run, work.sleep, 60, str(tmp_path / str(number)))
                await until(lambda: len([*tmp_path.iterdir()]) == 3)
                assert (pool.stats.workers, pool.stats.running) == (3, 3)
                group.cancel_scope.cancel()
            assert await pool.run(work.niceness) == os.nice(0) + 7


# -- calls that go wrong -----------------------------------------------------------------------------


@in_a_loop
@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (work.leave, (3,), 3),
        (work.leave_politely, (4,), 4),
        (work.crash, (), -signal.SIGSEGV),
        (work.kill_self, (), -signal.SIGKILL),
    ],
)
async def test_a_crash_fails_one_call(pool: OffloadPool, function: Any, args: Any, code: int) -> None:
    with pytest.raises(WorkerCrashed, match=f"the worker that ran .*work.{function.__name__} ") as caught:
        await pool.run(function, *args)
    assert caught.value.exit_code == code
    if function is work.crash:
        assert "in crash" in caught.value.stack
    assert await pool.run(work.add, 1) == 1
    assert (pool.stats.crashes, pool.stats.workers) == (1, 1)


@in_a_loop
async def test_no_zombie_is_left(pool: OffloadPool) -> None:
    pids = []
    for _ in range(3):
        pids.append(await pool.run(work.pid))
        with pytest.raises(WorkerCrashed):
            await pool.run(work.leave, 1)
    assert len({*pids}) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@in_a_loop
async def test_its_end_is_heard_of_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def pidfd_open(pid: int, flags: int = 0) -> int:
        raise OSError(38, "no such call")

    with anyio.fail_after(PATIENCE):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pidfd_open", pidfd_open)
            pool = OffloadPool(1, start_method="spawn")
            async with pool:
                for _ in range(2):
                    with pytest.raises(WorkerCrashed) as caught:
                        await pool.run(work.leave, 3)
                    assert caught.value.exit_code == 3
                pid = await pool.run(work.pid)
        assert not Path(f"/proc/{pid}").exists()


@in_a_loop
async def test_out_of_time(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, start_method="spawn", nice=0, grace=PATIENCE) as pool:
            first = await pool.run(work.pid)
            with pytest.raises(OffloadTimeout):
                await call(pool, work.loop, "", str(ended), timeout=1)
            await until(ended.exists)
            assert await pool.run(work.pid) == first, "it was interrupted, not killed"


@in_a_loop
async def test_out_of_time_and_deaf(pool: OffloadPool) -> None:
    first = await pool.run(work.pid)
    with pytest.raises(OffloadTimeout):
        await call(pool, work.count_in_c, timeout=1)
    assert await pool.run(work.pid) != first
    assert not is_alive(first)
    assert pool.stats.kills == 1


@in_a_loop
async def test_the_stack_of_what_was_out_of_time(pool: OffloadPool) -> None:
    stack = ""
    while "in count_in_c" not in stack:  # it may have had no time to write it, or to begin
        with pytest.raises(OffloadTimeout) as caught:
            await call(pool, work.count_in_c, timeout=0.3)
        stack = caught.value.stack
    assert "in count_in_c" in stack
    assert "_worker.py" not in stack


@in_a_loop
async def test_recycling() -> None:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, start_method="spawn", max_calls=1) as pool:
            pids = [await pool.run(work.pid) for _ in range(3)]
    assert len({*pids}) == 3


@in_a_loop
@pytest.mark.parametrize(
    ("executable", "reason"),
    [("/no/such/python", "No such file"), ("/bin/false", "its process ended with 1 before it was a worker")],
)
async def test_a_python_that_does_not_start(
    executable: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, start_method="spawn") as pool:
            with pytest.raises(WorkerCrashed, match="was not begun"):
                await pool.run(work.add, 1)
    assert f"an offload worker could not be started: {reason}" in caplog.text.replace("[Errno 2] ", "")


# -- modules -----------------------------------------------------------------------------------------


@in_a_loop
async def test_a_module_that_starts_threads(modules: Path, pool: OffloadPool) -> None:
    """What a fork would break: it is whole in the first worker, and in the next, which imports it early."""
    (modules / "with_threads.py").write_text(
        "import os, threading\n"
        "go_on, calls = threading.Event(), []\n"
        "def work():\n    while go_on.wait():\n        go_on.clear()\n        done.set()\n"
        "done = threading.Event()\n"
        "thread = threading.Thread(target=work, daemon=True)\n"
        "thread.start()\n"
        "pipe = os.pipe()\n"
        "def probe():\n"
        "    done.clear()\n"
        "    go_on.set()\n"
        "    os.write(pipe[1], b'x')\n"
        "    return done.wait(20), os.read(pipe[0], 1), os.getpid()\n"
    )
    probe = function_of("with_threads")
    done, byte, first = await call(pool, probe)
    assert (done, byte) == (True, b"x")
    with pytest.raises(WorkerCrashed):
        await pool.run(work.kill_self)
    done, byte, second = await call(pool, probe)
    assert (done, byte) == (True, b"x")
    assert second != first
    assert (await call(pool, probe))[2] == second


@in_a_loop
async def test_modules_are_imported_before_a_worker_is_ready(modules: Path, pool: OffloadPool) -> None:
    (modules / "counted.py").write_text(
        "import sys\n"
        "def frames(f):\n    while f:\n        yield f.f_code.co_name\n        f = f.f_back\n"
        "names = [*frames(sys._getframe())]\n"
        "def probe():\n    return 'run' not in names\n"
    )
    probe = function_of("counted")
    assert await call(pool, probe) is False
    with pytest.raises(WorkerCrashed):
        await pool.run(work.leave, 1)
    assert await call(pool, probe) is True


@in_a_loop
async def test_a_module_whose_import_ends_the_process(modules: Path, pool: OffloadPool) -> None:
    (modules / "deadly.py").write_text("import os\nos._exit(9)\n")
    for _ in range(3):
        with pytest.raises(WorkerCrashed, match=r"the worker that ran deadly\.probe ended with exit code 9"):
            await call(pool, function_of("deadly"))
        assert await pool.run(work.add, 1) == 1


SCRIPT = """
import os
import sys

import anyio

from asyncguard.offloading._pool import OffloadPool

print("imported as", __name__)

class Point:
    def __init__(self, x):
        self.x = x

def move(point):
    return Point(point.x + 1), __name__

async def main():
    async with OffloadPool(1, start_method="spawn") as pool:
        moved, name = await pool.run(move, Point(1))
        print(type(moved) is Point, moved.x, name)

if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1], backend_options={"use_uvloop": True} if sys.argv[2:] else {})
"""


def run_script(path: Path, text: str, *arguments: str) -> str:
    path.write_text(text)
    found = subprocess.run(
        [sys.executable, path, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, sys.path)])},
        capture_output=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
    return found.stdout.decode()


@pytest.mark.parametrize(
    "loop", [("asyncio",), ("asyncio", "uvloop"), ("trio",)], ids=["asyncio", "uvloop", "trio"]
)
def test_a_function_of_the_main_module(loop: tuple[str, ...], tmp_path: Path) -> None:
    lines = run_script(tmp_path / "script.py", SCRIPT, *loop).splitlines()
    assert sorted(lines) == ["True 2 __mp_main__", "imported as __main__", "imported as __mp_main__"]


# -- the end -----------------------------------------------------------------------------------------


@in_a_loop
async def test_closing_leaves_nothing(tmp_path: Path) -> None:
    async def once() -> None:
        async with OffloadPool(2, start_method="spawn") as pool:
            await pool.run(work.same, bytes(300_000))
            with pytest.raises(WorkerCrashed):
                await pool.run(work.leave, 1)

    with anyio.fail_after(2 * PATIENCE):
        children = children_of_this_process()  # other tests' too
        await once()
        before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        await once()
        pool = OffloadPool(2, start_method="spawn")
        pool.open()
        await pool.aclose()  # while they start
        assert len(os.listdir("/proc/self/fd")) <= before
        assert threading.active_count() <= threads + 1
        assert children_of_this_process() <= children


@in_a_loop
async def test_closing_ends_what_is_deaf() -> None:
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            async with OffloadPool(1, start_method="spawn", grace=0.1) as pool:
                pid = await pool.run(work.pid)

                async def run() -> None:
                    with pytest.raises(OffloadError, match="its pool was closed"):
                        await pool.run(work.count_in_c)

                group.start_soon(run)
                while not pool.stats.running:
                    await anyio.sleep(0.01)
        assert not Path(f"/proc/{pid}").exists()


SERVER = """
import os, sys

import anyio

from asyncguard.offloading._pool import OffloadPool
from tests.offloading import work

async def main():
    async with OffloadPool(2, start_method="spawn") as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, work.count_in_c)
            group.start_soon(pool.run, work.swallow)
            while pool.stats.running < 2:
                await anyio.sleep(0.01)
            print(*[process.pid for process in pool._backend._dispatcher._processes.values()], flush=True)
            await anyio.sleep(0.3)
            THEN

anyio.run(main, backend=sys.argv[1], backend_options={"use_uvloop": True} if sys.argv[2:] else {})
"""


@pytest.mark.parametrize("then", ["await anyio.sleep(600)", "os._exit(0)"], ids=["killed", "exits"])
@pytest.mark.parametrize(
    "loop", [("asyncio",), ("asyncio", "uvloop"), ("trio",)], ids=["asyncio", "uvloop", "trio"]
)
def test_a_server_that_dies_leaves_no_worker(loop: tuple[str, ...], then: str) -> None:
    """Not even one that never lets go of the GIL, and one that swallows all."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER.replace("THEN", then), *loop],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as server:
        try:
            assert server.stdout is not None
            pids = [*map(int, server.stdout.readline().split())]
            assert len(pids) == 2
            if "sleep" in then:
                assert all(map(is_alive, pids))
                server.kill()
            server.wait(PATIENCE)
            deadline = time.monotonic() + PATIENCE
            while any(map(is_alive, pids)):
                assert time.monotonic() < deadline, [pid for pid in pids if is_alive(pid)]
                time.sleep(0.02)
        finally:
            server.kill()
