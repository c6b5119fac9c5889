"""Calls on a real Dask cluster: what comes back, and that nothing is run twice, whatever dies."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy
import pytest
import trio

from asyncguard.errors import (
    NotOffloadable,
    OffloadError,
    OffloadQueueFull,
    OffloadTimeout,
    PayloadError,
    WorkerCrashed,
)
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._failure import RemoteTraceback
from asyncguard.offloading._interrupt import Interrupted
from asyncguard.offloading._payload import pack
from asyncguard.offloading._pool import OffloadPool
from asyncguard.offloading._summons import pack_call
from asyncguard.offloading.dask import DaskBackend
from asyncguard.offloading.dask._parcel import Parcel
from asyncguard.offloading.dask._serve import Call, Refused, serve
from tests.offloading import errands, work
from tests.offloading.cluster import PATIENCE, ROOT, Cluster, free_port, tasks_of

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The module's, with both workers; and nothing may be left on it."""
    if any(worker.poll() is not None for worker in shared.workers.values()):
        shared.start()
    yield shared
    left = [""]
    deadline = time.monotonic() + PATIENCE
    while left and time.monotonic() < deadline:
        left = shared.ask(_what_is_left)
    assert left == []


async def _what_is_left(client: Any) -> Any:
    return await client.run_on_scheduler(_tasks)


def _tasks(dask_scheduler: Any) -> list[str]:
    return tasks_of(dask_scheduler)


@pytest.fixture
async def pool(cluster: Cluster) -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(2 * PATIENCE):
        async with OffloadPool(backend=DaskBackend(cluster.address, connect_timeout=PATIENCE)) as pool:
            await pool.run(work.add, 1)  # it is connected
            yield pool


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.01)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


async def outcome(awaitable: Awaitable[Any], results: list[Any]) -> None:
    try:
        results.append(await awaitable)
    except OffloadError as error:
        results.append(error)


# -- what comes back ---------------------------------------------------------------------------------


async def test_results(pool: OffloadPool) -> None:
    assert await pool.run(work.add, 1, b=2) == 3
    assert await pool.run(work.pid) != os.getpid()
    assert await errands.double(4) == 8  # in the pool that is open
    stats = pool.stats
    assert (stats.calls, stats.workers, stats.idle, stats.running, stats.queued) == (4, 2, 2, 0, 0)
    assert sum(stats.run.counts) == sum(stats.wait.counts) == 4


async def test_context_variables(pool: OffloadPool) -> None:
    token = work.tenant.set("acme")
    try:
        assert await errands.whose() == "acme"
    finally:
        work.tenant.reset(token)
    assert await pool.run(work.read_tenant) == "nobody"


async def test_exceptions(pool: OffloadPool) -> None:
    with pytest.raises(work.Marker, match="mine") as caught:
        await pool.run(work.fail, work.Marker("mine"))
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "in fail" in str(cause)
    assert "_serve.py" not in str(cause)
    with pytest.raises(ExceptionGroup, match="several") as group:
        await pool.run(errands.raise_several)
    assert [type(each) for each in group.value.exceptions] == [work.Marker, ValueError]
    with pytest.raises(errands.Odd, match="odd") as odd:  # Dask would have the cause travel as well
        await pool.run(errands.raise_odd)
    assert odd.value.number == 7
    with pytest.raises(TimeoutError, match="its own") as own:
        await call(pool, work.fail, TimeoutError("its own"), timeout=PATIENCE)
    assert not isinstance(own.value, OffloadError)
    assert pool.stats.timeouts == 0


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_exceptions_that_would_end_a_worker(pool: OffloadPool, error: BaseException) -> None:
    pids = {await pool.run(work.pid) for _ in range(10)}
    with pytest.raises(OffloadError, match=f"work.fail raised {type(error).__name__}"):
        await pool.run(work.fail, error)
    assert await pool.run(work.pid) in pids or len(pids) == 1


async def test_what_cannot_be_sent(pool: OffloadPool) -> None:
    with pytest.raises(PayloadError, match=r"was not begun: argument 1 \(_thread.lock\) cannot be pickled"):
        await pool.run(work.add, threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="argument 2 cannot be rebuilt"):
        await pool.run(work.add, 1, work.Unbuildable())  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match=r"the result .*cannot be pickled"):
        await pool.run(work.unpicklable)
    with pytest.raises(PayloadError, match="the result cannot be rebuilt"):
        await pool.run(work.unbuildable)
    with pytest.raises(NotOffloadable, match="lambda"):
        await pool.run(lambda: 1)


async def test_a_module_that_the_workers_lack(
    pool: OffloadPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def f(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    with pytest.raises(ModuleNotFoundError, match="No module named 'only_here'") as caught:
        await pool.run(only_here.f)
    assert isinstance(caught.value.__cause__, RemoteTraceback)


async def test_what_is_refused(pool: OffloadPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="on_cancel='kill' is not for a DaskBackend"):
        await call(pool, work.add, 1, on_cancel="kill")
    address = address_of(work.add)._replace(module="__main__")
    with pytest.raises(NotOffloadable, match=r"__main__.add cannot be run on a Dask cluster"):
        await pool.run_call(address, work.add, (1,), {}, CallOptions())
    with pytest.raises(TypeError, match="address"):
        DaskBackend(8786)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="connect_timeout"):
        DaskBackend("tcp://127.0.0.1:1", connect_timeout=0)


@pytest.mark.parametrize("size", [1000, 100_000, 20_000_000])
async def test_large_things(pool: OffloadPool, size: int) -> None:
    """Dask would warn of large graphs, and that would fail the test."""
    array = numpy.arange(size // 8, dtype=float)
    assert await pool.run(errands.total, array) == (array.sum(), True)
    back = await pool.run(work.same, array)
    assert numpy.array_equal(back, array)
    back[0] = 1  # it may be written to
    data = os.urandom(size)
    assert await pool.run(work.same, data) == data
    assert await pool.run(work.same, bytearray(data)) == data
    assert await pool.run(work.length, "x" * size) == size


def test_large_buffers_are_not_copied() -> None:
    import pickle

    from distributed.protocol.serialize import deserialize, serialize

    from asyncguard.offloading.dask._serve import Answer

    array, data = numpy.zeros(1_000_000), bytes(1_000_000)
    parcel = Parcel.of(pack([("one", array), ("other", data)]))
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(parcel, 5, buffer_callback=buffers.append)
    assert len(pickled) < 1000
    header, frames = serialize(Answer(2, parcel, 0.5))
    assert any(numpy.shares_memory(numpy.frombuffer(each, "u1"), array) for each in frames)
    result = deserialize(header, frames)  # type: ignore[no-untyped-call]
    for found in (pickle.loads(pickled, buffers=buffers), result.parcel):
        one, other = found.body().unpack(("one", "other"))
        assert numpy.shares_memory(one, array)
        assert other == data
    assert sys.getsizeof(parcel) > array.nbytes + len(data)  # what Dask reckons with


# -- calls that are stopped --------------------------------------------------------------------------


async def test_out_of_time(pool: OffloadPool, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    with pytest.raises(OffloadTimeout, match=r"errands.loop did not end within 1 s on the Dask cluster"):
        await call(pool, errands.loop, str(begun), str(ended), timeout=1)
    await until(lambda: not begun.exists() or ended.exists())
    assert pool.stats.timeouts == 1
    gate = tmp_path / "gate"
    results: list[Any] = []
    async with anyio.create_task_group() as group:  # both threads are free again
        for name in ("a", "b"):
            group.start_soon(
                outcome, pool.run(errands.wait_for, str(tmp_path / "both"), str(gate), name), results
            )
        await until(lambda: len(lines(tmp_path / "both")) == 2)
        gate.touch()
    assert len(set(results)) == 2


async def test_cancelled(pool: OffloadPool, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    async with anyio.create_task_group() as group:
        group.start_soon(pool.run, errands.loop, str(begun), str(ended))
        await until(begun.exists)
        group.cancel_scope.cancel()
    await until(ended.exists)
    assert pool.stats.cancelled == 1


async def test_cancelled_where_exceptions_come_to_nothing(pool: OffloadPool, tmp_path: Path) -> None:
    begun, between, ended = tmp_path / "begun", tmp_path / "between", tmp_path / "ended"
    async with anyio.create_task_group() as group:
        group.start_soon(pool.run, errands.loop_twice, str(begun), str(between), str(ended))
        await until(begun.exists)
        group.cancel_scope.cancel()
    await until(ended.exists)
    assert between.exists()


async def test_cancelled_at_once(pool: OffloadPool, tmp_path: Path, cluster: Cluster) -> None:
    """The scheduler may hear of it before it has taken the call in."""
    for _ in range(20):
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, errands.loop, str(tmp_path / "begun"), str(tmp_path / "ended"))
            await anyio.sleep(0)
            await anyio.sleep(0.001)
            group.cancel_scope.cancel()
    while await asyncio.to_thread(cluster.ask, _what_is_left):
        await anyio.sleep(0.01)
    # One may have been stopped before it had written that it began.
    await until(lambda: len(lines(tmp_path / "begun")) <= len(lines(tmp_path / "ended")))
    assert await pool.run(work.add, 1) == 1


async def test_abandoned(pool: OffloadPool, tmp_path: Path) -> None:
    begun, gate, ended = tmp_path / "begun", tmp_path / "gate", tmp_path / "ended"

    async def run() -> None:
        await call(pool, errands.wait_and_note, str(begun), str(gate), str(ended), on_cancel="abandon")

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await until(begun.exists)
        group.cancel_scope.cancel()
    gate.touch()
    await until(ended.exists)


async def test_calls_that_wait(cluster: Cluster, tmp_path: Path) -> None:
    """They are bounded; those that are late or cancelled never run; the others run by priority."""
    begun, gate, never, after = (str(tmp_path / name) for name in ("begun", "gate", "never", "after"))
    results: list[Any] = []
    with anyio.fail_after(2 * PATIENCE):
        async with OffloadPool(
            max_queue=3, backend=DaskBackend(cluster.address, connect_timeout=PATIENCE)
        ) as pool:
            await pool.run(work.add, 1)
            async with anyio.create_task_group() as group:
                for name in ("a", "b"):
                    group.start_soon(outcome, pool.run(errands.wait_for, begun, gate, name), results)
                await until(lambda: len(lines(Path(begun))) == 2)
                group.start_soon(outcome, pool.run(errands.note, after, "c"), results)
                await until(lambda: pool.stats.queued == 1)
                with pytest.raises(OffloadTimeout):
                    await call(pool, errands.note, never, timeout=0.2)
                with anyio.move_on_after(0.2):
                    await pool.run(errands.note, never)
                for name in ("d", "e"):
                    group.start_soon(outcome, pool.run(errands.note, after, name), results)
                await until(lambda: pool.stats.queued == 3)
                with pytest.raises(OffloadQueueFull, match="3 calls wait for the 2 threads") as caught:
                    await pool.run(work.add, 1)
                assert caught.value.retry_after > 0
                Path(gate).touch()
            assert sorted(lines(Path(after))) == ["c", "d", "e"]
            assert not Path(never).exists()
            assert not [each for each in results if isinstance(each, OffloadError)]
            assert (pool.stats.refused, pool.stats.queued, pool.stats.cancelled) == (1, 0, 1)


# -- what dies ---------------------------------------------------------------------------------------


async def test_a_worker_that_dies_under_a_call(pool: OffloadPool, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(WorkerCrashed, match=r"the worker at tcp://127.0.0.1:\d+ .*errands.die"):
        await pool.run(errands.die, str(runs))
    for _ in range(4):  # whatever the other worker had to do before that
        assert await pool.run(work.add, 1) == 1
    assert len(lines(runs)) == 1
    assert pool.stats.crashes == 1


async def test_a_worker_that_dies_with_the_result(cluster: Cluster, tmp_path: Path) -> None:
    """Dask would compute it again."""
    from distributed import Client

    runs, key = tmp_path / "runs", "lost-1"
    parcel = Parcel.of(pack_call(address_of(errands.note), (str(runs),), {}))
    client: Any
    async with OffloadPool(backend=DaskBackend(cluster.address, connect_timeout=PATIENCE)) as pool:
        await pool.run(work.add, 1)  # the scheduler keeps the record from now on
        with anyio.fail_after(PATIENCE):
            async with Client(  # type: ignore[no-untyped-call]
                cluster.address, asynchronous=True, set_as_default=False, timeout=PATIENCE
            ) as client:
                future = client.submit(serve, key, parcel, True, key=key, pure=False)
                await until(future.done)
                (pid,) = lines(runs)
                os.kill(int(pid), signal.SIGKILL)

                def is_gone() -> bool:
                    return all(str(each) != pid for each in alive(cluster))

                await until(is_gone)
                while not isinstance(answer := await client.gather(future), Refused):
                    # The scheduler has not heard of it yet.
                    await anyio.sleep(0.05)
                assert answer.where.startswith("tcp://")
    assert len(lines(runs)) == 1


def alive(cluster: Cluster) -> list[int]:
    """The processes of the workers, nannies' children included."""
    found = []
    for worker in cluster.workers.values():
        pids = [str(worker.pid)]
        for pid in pids:
            try:
                pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                found.append(int(pid))
    return found


async def test_a_worker_that_dies_with_calls_that_wait_there(pool: OffloadPool, tmp_path: Path) -> None:
    begun, gate, after = (str(tmp_path / name) for name in ("begun", "gate", "after"))
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(outcome, pool.run(errands.wait_for, begun, gate), results)
        await until(lambda: len(lines(Path(begun))) == 2)
        for name in "pqrstu":
            group.start_soon(outcome, pool.run(errands.note, after, name), results)
        await until(lambda: pool.stats.queued == 6)
        await anyio.sleep(0.2)  # some of them have been handed to the worker by now, if Dask does so
        os.kill(int(lines(Path(begun))[0]), signal.SIGKILL)
        await until(lambda: results)
        Path(gate).touch()
    crashed = [each for each in results if isinstance(each, WorkerCrashed)]
    assert len(crashed) == 1
    assert "errands.wait_for" in str(crashed[0])
    assert len(lines(Path(begun))) == 2  # what ran was not begun again
    assert sorted(lines(Path(after))) == [*"pqrstu"]


async def test_stolen_calls_run_once(pool: OffloadPool, tmp_path: Path) -> None:
    """One worker is held up, so that the other steals its calls."""
    begun, gate, after = (str(tmp_path / name) for name in ("begun", "gate", "after"))
    results: list[Any] = []
    names = [f"n{number}" for number in range(60)]
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, pool.run(errands.wait_for, begun, gate), results)
        await until(lambda: lines(Path(begun)))
        for name in names:
            group.start_soon(outcome, pool.run(errands.note, after, name), results)
        await until(lambda: len(results) == len(names))
        Path(gate).touch()
    assert sorted(lines(Path(after))) == sorted(names)
    assert not [each for each in results if isinstance(each, OffloadError)]


async def test_a_worker_that_is_retired(pool: OffloadPool, tmp_path: Path, cluster: Cluster) -> None:
    """Dask would begin its call elsewhere, while it runs on here."""
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    results: list[Any] = []

    async def retire(client: Any) -> None:
        pids = await client.run(os.getpid)
        await client.retire_workers([name for name, pid in pids.items() if [str(pid)] == lines(begun)])

    async with anyio.create_task_group() as group:
        group.start_soon(outcome, pool.run(errands.wait_for, str(begun), str(gate)), results)
        await until(begun.exists)
        await asyncio.to_thread(cluster.ask, retire)
        await until(lambda: results)
        gate.touch()
    assert isinstance(results[0], WorkerCrashed)
    assert len(lines(begun)) == 1
    await until(lambda: any(worker.poll() is not None for worker in cluster.workers.values()))


SERVER = """
import asyncio, sys
from asyncguard import OffloadPool
from asyncguard.offloading.dask import DaskBackend
from tests.offloading import errands

async def main(address, begun, ended):
    async with OffloadPool(backend=DaskBackend(address, connect_timeout=60)) as pool:
        await pool.run(errands.loop, begun, ended)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_server_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    """What it had the cluster do is stopped."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, cluster.address, str(begun), str(ended)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        await until(begun.exists)
        assert not ended.exists()
    finally:
        server.kill()
        server.wait()
    await until(ended.exists)


# -- the scheduler -----------------------------------------------------------------------------------


async def test_no_scheduler(caplog: pytest.LogCaptureFixture) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(backend=DaskBackend(address, connect_timeout=0.5)) as pool:
            with pytest.raises(
                OffloadError,
                match=f"work.add was not begun: no Dask scheduler answered at {address} within 0.5",
            ):
                await pool.run(work.add, 1)
            assert "no Dask scheduler answered" in caplog.text
        pool = OffloadPool(backend=DaskBackend(address, connect_timeout=PATIENCE))
        pool.open(warm=False)
        with pytest.raises(OffloadTimeout):
            await call(pool, work.add, 1, timeout=0.2)
        await pool.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_scheduler_that_goes_and_comes_back(tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    cluster = Cluster(tmp_path)
    backend = DaskBackend(cluster.address, connect_timeout=PATIENCE)
    results: list[Any] = []
    try:
        with anyio.fail_after(4 * PATIENCE):
            await asyncio.to_thread(cluster.start)
            async with OffloadPool(backend=backend) as pool:
                # It goes under a call.
                async with anyio.create_task_group() as group:
                    group.start_soon(outcome, pool.run(errands.wait_for, str(begun), str(gate)), results)
                    await until(begun.exists)
                    await asyncio.to_thread(cluster.stop_scheduler, signal.SIGKILL)
                (error,) = results
                assert type(error) is OffloadError
                assert f"the connection to the Dask scheduler at {cluster.address} was lost" in str(error)
                assert "errands.wait_for" in str(error)
                gate.touch()
                await asyncio.to_thread(
                    cluster.stop
                )  # the workers leave with their scheduler, sooner or later
                await asyncio.to_thread(cluster.start)
                assert await pool.run(work.add, 1) == 1
                assert len(lines(begun)) == 1

                # It goes while there is no call: Dask's client finds the next one by itself.
                client: Any = backend._link._client
                await asyncio.to_thread(cluster.stop_scheduler)
                await until(lambda: client.status == "connecting")
                await asyncio.to_thread(cluster.stop)
                await asyncio.to_thread(cluster.start)
                await until(lambda: client.status == "running")
                assert await pool.run(work.add, 1) == 1
                assert backend._link._client is not client
    finally:
        await asyncio.to_thread(cluster.stop)


# -- the end -----------------------------------------------------------------------------------------


async def test_closing_stops_what_runs(cluster: Cluster, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    results: list[Any] = []
    with anyio.fail_after(2 * PATIENCE):
        async with anyio.create_task_group() as group:
            async with OffloadPool(backend=DaskBackend(cluster.address, connect_timeout=PATIENCE)) as pool:
                group.start_soon(outcome, pool.run(errands.loop, str(begun), str(ended)), results)
                await until(begun.exists)
        assert [str(each) for each in results] == [
            "tests.offloading.errands.loop was stopped: its pool was closed"
        ]
        await until(ended.exists)


async def test_nothing_is_left(cluster: Cluster, tmp_path: Path) -> None:
    async def once() -> None:
        async with OffloadPool(backend=DaskBackend(cluster.address, connect_timeout=PATIENCE)) as pool:
            assert await pool.run(work.same, bytes(300_000)) == bytes(300_000)
            with pytest.raises(OffloadTimeout):
                await call(pool, errands.loop, str(tmp_path / "begun"), str(tmp_path / "ended"), timeout=0.3)

    with anyio.fail_after(4 * PATIENCE):
        for _ in range(2):  # Dask keeps a thread or two, once it has used them
            await once()
        tasks = {*asyncio.all_tasks()}
        gc.collect()
        before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(3):
            await once()
        await until(lambda: {*asyncio.all_tasks()} <= tasks)
        gc.collect()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        assert threading.active_count() <= threads + 2  # not one each time


def test_a_loop_that_ends_first(cluster: Cluster, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    pool = OffloadPool(backend=DaskBackend(cluster.address, connect_timeout=PATIENCE))

    async def leave() -> asyncio.Future[Any]:
        pool.open()
        running = asyncio.ensure_future(pool.run(errands.loop, str(begun), str(ended)))
        await until(begun.exists)
        return running

    loop = asyncio.new_event_loop()
    running = loop.run_until_complete(leave())
    pool.abandon()
    loop.close()
    deadline = time.monotonic() + PATIENCE
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not running.done()
    running._log_destroy_pending = False  # type: ignore[attr-defined]


def test_it_does_not_run_on_trio() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="needs asyncio or uvloop"):
            OffloadPool(backend=DaskBackend("tcp://127.0.0.1:1")).open()

    trio.run(main)


def test_what_to_install() -> None:
    code = "import sys; sys.modules['distributed'] = None; import asyncguard.offloading.dask"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, check=False
    )
    assert "ImportError: DaskBackend needs distributed: pip install 'asyncguard[dask]'" in done.stderr


# -- the exception that stops a thread ---------------------------------------------------------------


def test_an_interrupt_hits_its_call_alone() -> None:
    """At whatever moment it comes: in the function, before it, after it."""
    calls: list[Call] = []
    is_over = threading.Event()
    stopped = [0, 0]

    def stop() -> None:
        seen = 0
        while not is_over.is_set():
            if len(calls) > seen:
                seen = len(calls)
                calls[-1].stop()

    thread = threading.Thread(target=stop)
    thread.start()
    gc.disable()  # lest it be raised in some `__del__`
    try:
        deadline = time.monotonic() + PATIENCE
        while stopped[0] < 50 and time.monotonic() < deadline:
            call = Call("key", True)
            calls.append(call)
            try:
                try:
                    try:
                        call.begin()
                        for _ in range(1000):
                            pass
                    finally:
                        call.end()
                finally:
                    call.end()
            except Interrupted:
                stopped[0] += 1
            else:
                stopped[1] += 1
            for _ in range(1000):  # here nothing may be raised any more
                pass
    finally:
        gc.enable()
        is_over.set()
        thread.join()
    assert stopped[0] >= 50


def test_an_interrupt_that_comes_first() -> None:
    call = Call("key", True)
    assert call.stop()
    with pytest.raises(Interrupted):
        call.begin()
    abandoned = Call("key", False)
    assert abandoned.stop()
    abandoned.begin()
    abandoned.end()
