"""Calls in anyio's worker processes, for systems that cannot pass descriptors.

What they can is tested here, and what they say that they cannot.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncguard.errors import (
    NotOffloadable,
    OffloadError,
    OffloadQueueFull,
    OffloadTimeout,
    PayloadError,
    WorkerCrashed,
)
from asyncguard.offloading import _borrowed, _to_process
from asyncguard.offloading._address import Address, address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._local import LocalBackend
from asyncguard.offloading._pool import OffloadPool
from asyncguard.offloading._to_process import ToProcessBackend
from tests.offloading import work
from tests.offloading.surroundings import children_of_this_process

PATIENCE = 60.0
"""Seconds after which a test has failed."""

ROOT = Path(__file__).parents[2]
LOOPS = pytest.mark.parametrize(
    "loop", [("asyncio",), ("asyncio", "uvloop"), ("trio",)], ids=["asyncio", "uvloop", "trio"]
)
START = 'anyio.run(main, backend=sys.argv[1], backend_options={"use_uvloop": True} if sys.argv[2:] else {})'

pytestmark = [pytest.mark.slow]
in_a_loop = pytest.mark.anyio


def pool_of(workers: int = 1, **options: Any) -> OffloadPool:
    return OffloadPool(workers, backend=ToProcessBackend(), **options)


@pytest.fixture
async def pool() -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with pool_of() as pool:
            yield pool


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.01)


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


# -- calls that are stopped --------------------------------------------------------------------------


@in_a_loop
@pytest.mark.parametrize("function", [work.loop, work.count_in_c, work.swallow])
async def test_out_of_time(pool: OffloadPool, function: Any) -> None:
    first = await pool.run(work.pid)
    with pytest.raises(OffloadTimeout, match=f"work.{function.__name__} did not end within 1 s") as caught:
        await call(pool, function, timeout=1)
    assert caught.value.stack == ""
    assert "where it was is not known" in str(caught.value)
    assert await pool.run(work.pid) != first
    assert not is_alive(first)
    stats = pool.stats
    assert (stats.timeouts, stats.kills, stats.respawns, stats.crashes) == (1, 1, 1, 0)


@in_a_loop
@pytest.mark.parametrize("function", [work.sleep, work.loop])
@pytest.mark.parametrize("on_cancel", ["raise", "kill"])
async def test_cancelled(pool: OffloadPool, function: Any, on_cancel: str, tmp_path: Path) -> None:
    first = await pool.run(work.pid)
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    args = (str(begun), str(ended)) if function is work.loop else (60, str(begun), str(ended))

    async def run() -> None:
        await call(pool, function, *args, on_cancel=on_cancel)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await until(begun.exists)
        group.cancel_scope.cancel()
    assert await pool.run(work.pid) != first
    assert not is_alive(first)
    assert not ended.exists(), "it is killed; what it cannot have is a `finally`"
    assert (pool.stats.cancelled, pool.stats.kills) == (1, 1)


@in_a_loop
async def test_cancelled_and_abandoned(pool: OffloadPool, tmp_path: Path) -> None:
    first = await pool.run(work.pid)
    begun, ended = tmp_path / "begun", tmp_path / "ended"

    async def run() -> None:
        await call(pool, work.sleep, 0.5, str(begun), str(ended), on_cancel="abandon")

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await until(begun.exists)
        group.cancel_scope.cancel()
    assert await pool.run(work.pid) == first
    assert ended.exists(), "it was waited for"
    with pytest.raises(OffloadTimeout):
        await call(pool, work.sleep, 3, on_cancel="abandon", timeout=1)
    assert await pool.run(work.pid) == first


@in_a_loop
@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_given_up_while_its_worker_starts(how: str, tmp_path: Path) -> None:
    """The function never runs, and the worker is of use to the next."""
    never = tmp_path / "never"
    with anyio.fail_after(PATIENCE):
        pool = pool_of()
        pool.open(warm=False)
        try:
            if how == "late":
                with pytest.raises(
                    OffloadTimeout, match=r"was not begun: its worker was not ready within 0\.01"
                ):
                    await call(pool, work.sleep, 0, str(never), timeout=0.01, on_cancel="abandon")
            else:
                with anyio.move_on_after(0.01) as scope:
                    await call(pool, work.sleep, 0, str(never), on_cancel="abandon")
                assert scope.cancelled_caught
            assert await pool.run(work.add, 1) == 1
            assert not never.exists()
            assert pool.stats.kills == 0
        finally:
            await pool.aclose()


# -- workers that die --------------------------------------------------------------------------------


@in_a_loop
@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (work.leave, (3,), None),
        (work.leave_politely, (4,), 4),
        (work.crash, (), None),
        (work.kill_self, (), None),
        (os.closerange, (3, 4096), None),
    ],
)
async def test_a_crash_fails_one_call(function: Any, args: Any, code: int | None, tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        async with pool_of(2) as pool, anyio.create_task_group() as group:
            results: list[bytes] = []
            begun, end = tmp_path / "begun", tmp_path / "end"

            async def other() -> None:
                await pool.run(hold, str(begun), str(end))
                results.append(await pool.run(work.same, b"fine"))

            group.start_soon(other)
            await until(begun.exists)
            with pytest.raises(WorkerCrashed, match=function.__name__) as caught:
                await pool.run(function, *args)
            assert caught.value.exit_code == code
            assert code is not None or "exit code is not known" in str(caught.value)
            assert pool.stats.crashes == 1
            assert await pool.run(work.add, 1) == 1
            end.touch()
            await until(lambda: results)
            assert results == [b"fine"]


@in_a_loop
async def test_a_call_is_never_run_twice(pool: OffloadPool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"import os\nwith open({str(log)!r}, 'a') as file: file.write('x')\nos.kill(os.getpid(), 9)"
    with pytest.raises(WorkerCrashed):
        await pool.run(exec, command)
    assert await pool.run(work.add, 1) == 1
    assert log.read_text() == "x"


@in_a_loop
async def test_workers_that_died_in_their_sleep_fail_no_call(tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        async with pool_of(2) as pool:
            pids: set[int] = set()

            async def one(number: int) -> None:
                begun = tmp_path / str(number)
                await pool.run(work.sleep, 0.3, str(begun))
                pids.add(await pool.run(work.pid))

            async with anyio.create_task_group() as group:
                for number in range(4):
                    group.start_soon(one, number)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert await pool.run(work.add, 1) == 1
            assert await pool.run(work.pid) not in pids
            assert pool.stats.crashes == 0


@in_a_loop
async def test_a_python_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with anyio.fail_after(PATIENCE):
        async with pool_of() as pool:
            with pytest.raises(WorkerCrashed, match="was not begun: a worker could not be started"):
                await pool.run(work.add, 1)
            assert (pool.stats.crashes, pool.stats.running) == (0, 0)


# -- what cannot be sent -----------------------------------------------------------------------------


class Fussy(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("fussy")

    def __reduce__(self) -> Any:
        return Fussy, (1,)


def raise_fussy() -> None:
    raise Fussy(1, 2)


@in_a_loop
async def test_what_cannot_be_sent(pool: OffloadPool) -> None:
    first = await pool.run(work.pid)
    with pytest.raises(PayloadError, match="argument 1"):
        await pool.run(work.add, threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="argument 'b'"):
        await pool.run(work.add, 1, b=work.Unbuildable())  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="result"):
        await pool.run(work.unpicklable)
    with pytest.raises(PayloadError, match="result"):
        await pool.run(work.unbuildable)
    with pytest.raises(PayloadError, match="fussy"):
        await pool.run(raise_fussy)
    with pytest.raises(NotOffloadable):
        await pool.run(lambda: 1)
    assert await pool.run(work.pid) == first


@in_a_loop
async def test_exceptions(pool: OffloadPool) -> None:
    error = work.Marker("mine")
    error.add_note("a note")
    with pytest.raises(work.Marker, match="mine") as caught:
        await pool.run(work.fail, error)
    assert caught.value.__notes__ == ["a note"]
    text = str(caught.value.__cause__)
    assert "in fail" in text
    assert "work.py" in text
    assert "_borrowed.py" not in text
    group = ExceptionGroup("several", [ValueError("one"), work.Marker("two")])
    with pytest.raises(ExceptionGroup) as found:
        await pool.run(work.fail, group)
    assert [type(member) for member in found.value.exceptions] == [ValueError, work.Marker]
    with pytest.raises(OffloadError, match="raised KeyboardInterrupt"):
        await pool.run(work.fail, KeyboardInterrupt())
    assert await pool.run(work.add, 1) == 1


@in_a_loop
async def test_context_variables_by_name(pool: OffloadPool) -> None:
    token = work.tenant.set("acme")
    try:
        assert await call(pool, work.read_tenant) == "nobody"
        assert await call(pool, work.read_tenant, context=(work.tenant,)) == "acme"
        assert await call(pool, work.read_tenant) == "nobody"
    finally:
        work.tenant.reset(token)


# -- its surroundings --------------------------------------------------------------------------------


def write_to_all() -> int:
    """As C code does, and programs do that a function starts."""
    for descriptor in (1, 2):
        for _ in range(5):
            os.write(descriptor, bytes(100_000))
    command = (
        "import sys; print('x' * 300_000); print('x' * 300_000, file=sys.stderr); print(sys.stdin.read())"
    )
    return subprocess.call([sys.executable, "-c", command])


def print_at_last() -> None:
    """What is left in a buffer must not come out between two answers."""
    sys.__stdout__.write("left over")  # type: ignore[union-attr]
    threading.Timer(0.01, print, ["later"]).start()


@in_a_loop
async def test_what_a_function_prints_and_reads_does_no_harm(pool: OffloadPool) -> None:
    first = await pool.run(work.pid)
    await pool.run(work.say, "hello")
    assert await pool.run(work.listen) == ""
    assert await pool.run(write_to_all) == 0
    await pool.run(print_at_last)
    for _ in range(5):
        await pool.run(work.sleep, 0.02)
    assert await pool.run(work.pid) == first


@in_a_loop
async def test_log_records_arrive(pool: OffloadPool, caplog: pytest.LogCaptureFixture) -> None:
    await pool.run(work.log, "hello")
    await pool.run(work.warn, "beware")
    records = {record.name: record for record in caplog.records if record.name in ("app.work", "py.warnings")}
    assert records["app.work"].getMessage() == "hello"
    assert records["app.work"].colour == "red"  # type: ignore[attr-defined]
    assert "beware" in records["py.warnings"].getMessage()


@in_a_loop
async def test_workers_are_nicer_than_their_parent() -> None:
    with anyio.fail_after(PATIENCE):
        async with pool_of(nice=7) as pool:
            assert await pool.run(work.niceness) == os.nice(0) + 7
            assert await pool.run(work.niceness) == os.nice(0) + 7


@in_a_loop
async def test_a_signal_for_the_server_is_none_of_their_business(pool: OffloadPool) -> None:
    first = await pool.run(work.pid)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(first, number)
        assert await pool.run(work.pid) == first


@in_a_loop
@pytest.mark.parametrize("size", [1_000_000, 100_000_000])
async def test_large_things(pool: OffloadPool, size: int) -> None:
    data = random.randbytes(1000) * (size // 1000)
    assert await pool.run(work.length, data) == size
    array = await pool.run(work.same, bytearray(data))
    assert array == data
    array[0] ^= 1  # it may be written to


# -- the queue ---------------------------------------------------------------------------------------


def hold(begun: str, end: str) -> None:
    """Run until it is told to end."""
    Path(begun).touch()
    while not Path(end).exists():
        time.sleep(0.01)


@in_a_loop
async def test_calls_that_wait(tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        async with pool_of(max_queue=2) as pool:
            await pool.run(work.add, 1)
            begun, end, never = tmp_path / "begun", tmp_path / "end", tmp_path / "never"
            order: list[str] = []

            async def run(name: str, priority: int) -> None:
                await call(pool, work.same, name, priority=priority)
                order.append(name)

            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, hold, str(begun), str(end))
                await until(begun.exists)
                with pytest.raises(OffloadTimeout, match="was not begun: no worker was free"):
                    await call(pool, work.sleep, 0, str(never), timeout=0.1)
                with anyio.move_on_after(0.05):
                    await pool.run(work.sleep, 0, str(never))
                assert pool.stats.queued == 0
                group.start_soon(run, "low", -1)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(run, "high", 1)
                await anyio.wait_all_tasks_blocked()
                assert pool.stats.queued == 2
                with pytest.raises(OffloadQueueFull, match="the queue is full") as caught:
                    await pool.run(work.add, 1)
                assert caught.value.retry_after > 0
                end.touch()
            assert order == ["high", "low"]
            assert (pool.stats.refused, pool.stats.queued) == (1, 0)
            assert not never.exists()


@in_a_loop
async def test_one_call_after_the_other_needs_no_queue() -> None:
    with anyio.fail_after(PATIENCE):
        async with pool_of(max_queue=0) as pool:
            for number in range(20):
                assert await pool.run(work.add, number) == number


@in_a_loop
async def test_recycling(tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        async with pool_of(max_calls=2) as pool:
            pids = [await pool.run(work.pid) for _ in range(4)]
            assert pool.stats.recycled == 1
        assert pids[0] == pids[1] != pids[2] == pids[3]
        async with pool_of(max_rss=1) as pool:
            assert await pool.run(work.pid) != await pool.run(work.pid)


def is_imported(module: str) -> bool:
    return module in sys.modules


@in_a_loop
async def test_modules_that_will_be_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harmless.py").write_text("print('hello')\n")
    (tmp_path / "deadly.py").write_text("import os\nos._exit(1)\n")
    with anyio.fail_after(PATIENCE):
        for modules, is_there in ((["harmless", "not_there"], True), (["harmless", "deadly"], False)):
            pool = pool_of()
            pool.open(preload=modules)
            try:
                await pool.ready()
                assert await pool.run(is_imported, "harmless") is is_there
            finally:
                await pool.aclose()


@in_a_loop
async def test_a_module_that_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    address = Address("leaving", "probe")
    with anyio.fail_after(PATIENCE):
        async with pool_of() as pool:
            with pytest.raises(NotOffloadable, match=r"leaving ends the process with sys.exit\(3\)"):
                await pool.run_call(address, work.add, (), {}, CallOptions())
            assert await pool.run(work.add, 1) == 1


@in_a_loop
async def test_stress() -> None:
    """Three seconds of everything at once: each call has its own outcome, and it is as good as new."""
    outcomes: dict[str, int] = {}

    async def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < until_then or sum(outcomes.values()) < 12:
            kind = chance.choice(["add", "add", "add", "data", "fail", "late", "cancel", "leave", "lock"])
            outcomes[kind] = outcomes.get(kind, 0) + 1
            number = chance.randrange(10**9)
            if kind == "add":
                assert await busy.run(work.add, number, b=1) == number + 1
            elif kind == "data":
                data = b"%d" % number * 20_000
                assert await busy.run(work.same, data) == data
            elif kind == "fail":
                with pytest.raises(work.Marker, match=f"^{number}$"):
                    await busy.run(work.fail, work.Marker(number))
            elif kind == "late":
                with pytest.raises(OffloadTimeout):
                    await call(busy, work.sleep, 60, timeout=chance.random() * 0.1)
            elif kind == "cancel":
                with anyio.move_on_after(chance.random() * 0.1) as scope:
                    await busy.run(work.sleep, 60)
                assert scope.cancelled_caught
            elif kind == "leave":
                with pytest.raises(WorkerCrashed):
                    await busy.run(work.leave, 1)
            else:
                with pytest.raises(PayloadError):
                    await busy.run(work.unpicklable)

    children = children_of_this_process()
    with anyio.fail_after(2 * PATIENCE):
        async with pool_of(2) as busy:
            until_then = time.monotonic() + 3
            async with anyio.create_task_group() as group:
                for seed in range(6):
                    group.start_soon(client, seed)
            assert sum(outcomes.values()) >= 12
            assert await busy.run(work.add, 1) == 1
            await until(lambda: busy.stats.running == 0)
            assert busy.stats.queued == 0
        assert children_of_this_process() <= children


# -- the end -----------------------------------------------------------------------------------------


@in_a_loop
async def test_closing(tmp_path: Path) -> None:
    errors: list[str] = []
    short, long = tmp_path / "short", tmp_path / "long"

    async def run(function: Any, *args: Any) -> None:
        try:
            await closed.run(function, *args)
        except OffloadError as error:
            errors.append(str(error))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            async with pool_of(2, grace=10) as closed:
                group.start_soon(run, work.sleep, 1, str(short))
                await until(short.exists)
        assert errors == [], "it had the time to end"
        async with anyio.create_task_group() as group:
            async with pool_of(1, grace=0.1) as closed:
                pid = await closed.run(work.pid)
                group.start_soon(run, work.sleep, 60, str(long))
                await until(long.exists)
                group.start_soon(run, work.add, 1)
                await until(lambda: closed.stats.queued)
        assert not is_alive(pid)
    assert sorted(error.partition(" was ")[2] for error in errors) == [
        "not begun: its pool was closed",
        "stopped: its pool was closed",
    ]
    with pytest.raises(OffloadError, match="is not open"):
        await closed.run(work.add, 1)


@in_a_loop
async def test_closing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker may take longer to start than closing waits for it.
    monkeypatch.setattr(_to_process, "_CLOSED_WITHIN", PATIENCE)

    async def once() -> None:
        async with pool_of(2) as pool:
            await pool.run(work.same, bytes(300_000))
            with pytest.raises(WorkerCrashed):
                await pool.run(work.leave, 1)
            with pytest.raises(OffloadTimeout):
                await call(pool, work.sleep, 60, timeout=0.1)

    with anyio.fail_after(2 * PATIENCE):
        children = children_of_this_process()  # other tests' too
        await once()
        before = len(os.listdir("/proc/self/fd"))
        await once()
        pool = pool_of(2)
        pool.open()
        await pool.aclose()  # while they start
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        assert children_of_this_process() <= children


@LOOPS
def test_a_loop_that_ends_without_a_word(loop: tuple[str, ...]) -> None:
    pids: list[int] = []

    async def main() -> None:
        pool = pool_of(1)
        pool.open()
        pids.append(await pool.run(work.pid))

    options = {"use_uvloop": True} if "uvloop" in loop else {}
    anyio.run(main, backend=loop[0], backend_options=options)
    assert_gone(pids)


SERVER = f"""
import os, sys

import anyio

from asyncguard.offloading._pool import OffloadPool
from asyncguard.offloading._to_process import ToProcessBackend
from tests.offloading import work

async def main():
    async with OffloadPool(3, backend=ToProcessBackend()) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, work.loop)
            group.start_soon(pool.run, work.swallow)
            while pool.stats.running < 2 or len(pool._backend._workers._pids) < 3:
                await anyio.sleep(0.01)
            print(*pool._backend._workers._pids, flush=True)
            THEN

{START}
"""


@contextmanager
def server(then: str, loop: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER.replace("THEN", then), *loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            pids = [*map(int, process.stdout.readline().split())]
            assert len(pids) == 3
            yield process, pids
        finally:
            process.kill()


@LOOPS
@pytest.mark.parametrize("then", ["await anyio.sleep(600)", "os._exit(0)"], ids=["killed", "exits"])
def test_a_server_that_dies_leaves_no_worker(then: str, loop: tuple[str, ...]) -> None:
    """But for one that never lets go of the GIL: that ends with its call."""
    with server(then, loop) as (process, pids):
        if "sleep" in then:
            assert all(map(is_alive, pids))
            process.kill()
        process.wait(PATIENCE)
        assert_gone(pids)


# -- what it says ------------------------------------------------------------------------------------


@in_a_loop
async def test_it_says_once_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_to_process, "_is_told", False)
    seen: list[float] = []
    with anyio.fail_after(PATIENCE):
        for _ in range(2):
            async with pool_of() as pool:
                assert await call(pool, work.progress, on_progress=seen.append) == "done"
    assert seen == []
    (said,) = [record for record in caplog.records if record.name == "asyncguard.offloading"]
    assert said.levelname == "WARNING"
    for missing in (
        "`finally` blocks do not run",
        "stack",
        "exit code",
        "on_progress",
        "print",
        "log",
        "large",
    ):
        assert missing in said.getMessage()


@in_a_loop
async def test_memory_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_borrowed, "rss", lambda: 0)
    with pytest.raises(ValueError, match="max_rss must be None"):
        pool_of(max_rss=10**9).open()
    async with pool_of():
        pass


def test_it_is_not_used_where_descriptors_can_be_passed() -> None:
    assert isinstance(OffloadPool()._backend, LocalBackend)


SYSTEM = """
import faulthandler, mmap, os, signal, socket, sys

if os.environ["SIMULATED"] == "trio":  # it goes by the name of the system, not by what that has
    import trio

pair, unix = socket.socketpair, socket.AF_UNIX

def socketpair(family=None, type=socket.SOCK_STREAM, proto=0):  # which Windows has
    return pair(unix, type, proto)

socket.socketpair = socketpair

class Missing:
    def __get__(self, instance, owner=None):
        raise AttributeError

for name in ("sendmsg", "recvmsg", "recvmsg_into"):
    setattr(socket.socket, name, Missing())
for owner, names in (
    (faulthandler, "register unregister"),
    (mmap, "MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE"),
    (os, "fork forkpty getpgrp memfd_create nice pidfd_open pread preadv pwrite pwritev readv"),
    (os, "register_at_fork sched_getaffinity sysconf writev"),
    (signal, "SIGUSR1 SIGUSR2 pidfd_send_signal pthread_kill pthread_sigmask"),
    (socket, "AF_UNIX CMSG_LEN CMSG_SPACE MSG_CMSG_CLOEXEC MSG_CTRUNC SCM_RIGHTS SOCK_SEQPACKET"),
):
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
"""
"""What such a system is like, in the server and in its workers: run by Python before anything else."""

SCRIPT = f"""
import functools
import logging
import os
import sys

import anyio

from asyncguard import NotOffloadable, OffloadPool, OffloadTimeout, WorkerCrashed, offload

logging.basicConfig(format="%(name)s %(message).40s", stream=sys.stdout)
logging.getLogger("asyncio").disabled = True  # it may complain about a process whose end it learned twice

class Point:
    def __init__(self, x):
        self.x = x

def doubled(function):
    @functools.wraps(function)
    def around(*args):
        return function(*args), function(*args)
    return around

@offload
def move(point):
    return Point(point.x + 1)

@offload
@doubled
def where(number):
    return number, __name__, hasattr(os, "fork")

@offload(timeout=0.2)
def stay():
    while True:
        pass

@offload
def leave():
    os._exit(1)

@offload
def length(data):
    logging.getLogger("work").warning("measured")
    return len(data)

async def main():
    async with OffloadPool(1) as pool:
        print(type(pool._backend).__name__)
        moved = await move(Point(1))
        print(type(moved) is Point, moved.x)
        print(*await where(3))
        for function in (stay, leave):
            try:
                await function()
            except (OffloadTimeout, WorkerCrashed) as error:
                print(type(error).__name__)
        print(await length(bytes(1_000_000)))
        try:
            offload(lambda: 1)
        except NotOffloadable as error:
            print(type(error).__name__)
    print(sorted(name for name in sys.modules if name in (
        "asyncguard.offloading._local", "asyncguard.offloading._control", "asyncguard.offloading._worker"
    )))

if __name__ == "__main__":
    {START}
"""


@LOOPS
def test_a_system_that_cannot_pass_descriptors(loop: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "system").mkdir()
    (tmp_path / "system/sitecustomize.py").write_text(SYSTEM)
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "script.py", *loop],
        # Coverage is not counted there: it needs what that system lacks.
        env={key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
        | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "system"), str(ROOT)]), "SIMULATED": loop[0]},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (found.returncode, found.stderr.decode()) == (0, "")
    assert found.stdout.decode().splitlines() == [
        "asyncguard.offloading offloaded calls run in worker processes ",
        "ToProcessBackend",
        "True 2",
        "(3, '__mp_main__', False) (3, '__mp_main__', False)",
        "OffloadTimeout",
        "WorkerCrashed",
        "work measured",
        "1000000",
        "NotOffloadable",
        "[]",
    ]


UNGUARDED = """
import asyncio
import sys
from asyncguard import OffloadPool, WorkerCrashed, offload
from asyncguard.offloading._to_process import ToProcessBackend

@offload
def work():
    pass

async def main():
    async with OffloadPool(1, backend=ToProcessBackend()):
        try:
            await work()
        except WorkerCrashed as error:
            print(error)

asyncio.run(main())
"""


def test_a_main_module_that_starts_the_program_when_it_is_imported(tmp_path: Path) -> None:
    """Each worker would start others."""
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    found = subprocess.run(
        [sys.executable, tmp_path / "unguarded.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    assert b"work was not begun: a worker could not be started: RuntimeError" in found.stdout
    assert b"if __name__ == '__main__':" in found.stdout
