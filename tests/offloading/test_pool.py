"""Calls in real worker processes: what comes back, and what becomes of those that go wrong."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
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
from asyncguard.offloading import _dispatcher
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import work
from tests.offloading.surroundings import children_of_this_process, request_with

pytestmark = [pytest.mark.anyio]

PATIENCE = 30.0
"""Seconds after which a test has failed."""


@pytest.fixture(autouse=True)
def _time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may take long to write down what it does, or to end, when the machine is busy."""
    monkeypatch.setattr(_dispatcher, "_STACK_WITHIN", PATIENCE)
    monkeypatch.setattr(_dispatcher, "_ENDED_WITHIN", PATIENCE)


@pytest.fixture
async def pool() -> AsyncIterator[OffloadPool]:
    """Of one worker, which is given all the time that it needs on a busy machine."""
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=0, grace=PATIENCE) as pool:
            yield pool


@pytest.fixture
async def impatient() -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=0, grace=0.5) as pool:
            yield pool


async def late(pool: OffloadPool, function: Any, *args: Any) -> OffloadTimeout:
    """What is raised by a call that was out of time after it had begun."""
    seconds = 0.2
    while True:
        with pytest.raises(OffloadTimeout) as caught:
            await call(pool, function, *args, timeout=seconds)
        if caught.value.stack:
            return caught.value
        seconds *= 2


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


async def exists(path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        while not path.exists():
            await anyio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def has_ended(pid: int) -> None:
    with anyio.fail_after(PATIENCE):
        while is_alive(pid):
            await anyio.sleep(0.01)


# -- what comes back ---------------------------------------------------------------------------------


async def test_a_result(pool: OffloadPool) -> None:
    assert await pool.run(work.add, 1, b=2) == 3
    assert await pool.run(work.pid) != os.getpid()


async def test_an_exception_with_its_traceback(pool: OffloadPool) -> None:
    with pytest.raises(work.Marker, match="mine") as caught:
        await pool.run(work.fail, work.Marker("mine"))
    assert "in fail" in str(caught.value.__cause__)
    assert "work.py" in str(caught.value.__cause__)
    assert await pool.run(work.add, 1) == 1


@pytest.mark.parametrize("size", [100, 200_000, 5_000_000])
async def test_large_things(pool: OffloadPool, size: int) -> None:
    data = os.urandom(size)
    assert await pool.run(work.same, data) == data
    array = bytearray(data)
    result = await pool.run(work.same, array)
    assert result == array
    result[0] ^= 1  # it may be written to
    assert await pool.run(work.length, memoryview(data).tobytes()) == size


async def test_many_at_once(pool: OffloadPool) -> None:
    results: list[int] = []

    async def one(number: int) -> None:
        results.append(await pool.run(work.add, number))

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(one, number)
    assert sorted(results) == list(range(100))


async def test_what_cannot_be_sent(pool: OffloadPool) -> None:
    with pytest.raises(PayloadError, match="argument 1"):
        await pool.run(work.add, threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="argument 2"):
        await pool.run(work.add, 1, work.Unbuildable())  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="result"):
        await pool.run(work.unpicklable)
    with pytest.raises(PayloadError, match="result"):
        await pool.run(work.unbuildable)
    assert await pool.run(work.add, 1) == 1


async def test_functions_that_no_worker_could_find(pool: OffloadPool) -> None:
    with pytest.raises(NotOffloadable):
        await pool.run(lambda: 1)


async def test_log_records_arrive(pool: OffloadPool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await pool.run(work.log, "hello")
        await pool.run(work.warn, "beware")
    records = {record.name: record for record in caplog.records if record.name in ("app.work", "py.warnings")}
    assert records["app.work"].getMessage() == "hello"
    assert records["app.work"].colour == "red"  # type: ignore[attr-defined]
    assert "beware" in records["py.warnings"].getMessage()


async def test_progress(pool: OffloadPool, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[float] = []
    assert await call(pool, work.progress, on_progress=seen.append) == "done"
    assert seen == [0.25, 0.5, 0.75, 1.0]

    def fail(fraction: float) -> None:
        raise work.Marker

    assert await call(pool, work.progress, on_progress=fail) == "done"
    assert "the on_progress callback of tests.offloading.work.progress raised" in caplog.text


class OfTheRequest(logging.Filter):
    """Fails where there is no request, as those of applications do."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.tenant = request_id.get()
        return True


request_id: ContextVar[str] = ContextVar("request_id")


async def test_records_are_logged_in_the_context_of_the_call(
    pool: OffloadPool, caplog: pytest.LogCaptureFixture
) -> None:
    target, of_the_request = logging.getLogger("app.work"), OfTheRequest()
    target.addFilter(of_the_request)
    token = request_id.set("r1")
    try:
        await pool.run(work.log, "hello")
    finally:
        request_id.reset(token)
        target.removeFilter(of_the_request)
    (record,) = (record for record in caplog.records if record.name == "app.work")
    assert record.__dict__["tenant"] == "r1"


async def test_a_filter_that_raises_loses_a_record_and_no_more(
    pool: OffloadPool, capfd: pytest.CaptureFixture[str]
) -> None:
    target, of_the_request = logging.getLogger("app.work"), OfTheRequest()
    target.addFilter(of_the_request)
    try:
        for number in range(3):
            await pool.run(work.log, "hello")
            assert await pool.run(work.add, number) == number
    finally:
        target.removeFilter(of_the_request)
    assert capfd.readouterr().err.count("LookupError: <ContextVar name='request_id'") == 3


async def test_context_variables_by_name(pool: OffloadPool) -> None:
    token = work.tenant.set("acme")
    try:
        assert await call(pool, work.read_tenant) == "nobody"
        assert await call(pool, work.read_tenant, context=(work.tenant,)) == "acme"
        assert await call(pool, work.read_tenant) == "nobody"
    finally:
        work.tenant.reset(token)
    local: ContextVar[int] = ContextVar("local", default=1)
    with pytest.raises(PayloadError, match="'local' is at the top of no module"):
        await call(pool, work.read_tenant, context=(local,))


async def test_print_and_stdin_are_harmless(pool: OffloadPool) -> None:
    await pool.run(work.say, "hello")
    assert await pool.run(work.listen) == ""


async def test_workers_are_nicer_than_their_parent() -> None:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=7) as pool:
            assert await pool.run(work.niceness) == os.nice(0) + 7


# -- calls that are stopped --------------------------------------------------------------------------


@pytest.mark.parametrize("function", [work.loop, work.sleep])
async def test_out_of_time(pool: OffloadPool, function: Any, tmp_path: Path) -> None:
    first = await pool.run(work.pid)
    ended = tmp_path / "ended"
    args = ("", str(ended)) if function is work.loop else (60, "", str(ended))
    error = await late(pool, function, *args)
    assert f"work.{function.__name__} did not end within 0." in str(error)
    assert f"in {function.__name__}" in error.stack
    assert isinstance(error, TimeoutError)
    assert await pool.run(work.pid) == first  # it was interrupted, not killed
    assert ended.exists()
    assert pool.stats.kills == 0


async def test_each_call_that_is_out_of_time_has_its_own_stack(pool: OffloadPool) -> None:
    """Of one worker, which writes them into one file."""
    first = await pool.run(work.pid)
    for function in (work.loop, work.outlive, work.sleep, work.loop):
        args = (60,) if function is work.sleep else ()
        stack = (await late(pool, function, *args)).stack
        assert stack.count(" in ") == stack.count(f"in {function.__name__}") == 1
        assert await pool.run(work.pid) == first


@pytest.mark.parametrize("function", [work.count_in_c, work.swallow])
async def test_out_of_time_and_deaf(impatient: OffloadPool, function: Any) -> None:
    pool = impatient
    first = await pool.run(work.pid)
    assert f"in {function.__name__}" in (await late(pool, function)).stack
    second = await pool.run(work.pid)
    assert second != first
    assert not is_alive(first)
    assert pool.stats.kills == 1


async def test_a_regular_expression_that_does_not_end(pool: OffloadPool) -> None:
    """Python looks for signals in the middle of a match: it need not be killed."""
    first = await pool.run(work.pid)
    assert "in match" in (await late(pool, work.match)).stack
    assert await pool.run(work.pid) == first


async def test_cancelled(pool: OffloadPool, tmp_path: Path) -> None:
    first = await pool.run(work.pid)
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    async with anyio.create_task_group() as group:
        group.start_soon(pool.run, work.loop, str(begun), str(ended))
        await exists(begun)
        group.cancel_scope.cancel()
    await exists(ended)
    assert await pool.run(work.pid) == first
    assert (pool.stats.cancelled, pool.stats.kills) == (1, 0)


async def test_cancelled_and_killed(pool: OffloadPool, tmp_path: Path) -> None:
    first = await pool.run(work.pid)
    begun, ended = tmp_path / "begun", tmp_path / "ended"

    async def run() -> None:
        await call(pool, work.loop, str(begun), str(ended), on_cancel="kill")

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await exists(begun)
        group.cancel_scope.cancel()
    assert await pool.run(work.pid) != first
    assert not ended.exists()


async def test_cancelled_and_abandoned(pool: OffloadPool, tmp_path: Path) -> None:
    first = await pool.run(work.pid)
    begun, ended = tmp_path / "begun", tmp_path / "ended"

    async def run() -> None:
        await call(pool, work.sleep, 0.5, str(begun), str(ended), on_cancel="abandon")

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await exists(begun)
        group.cancel_scope.cancel()
    assert await pool.run(work.pid) == first
    assert ended.exists()  # it was waited for


async def test_a_function_that_outlives_its_interruption(pool: OffloadPool) -> None:
    with pytest.raises(OffloadTimeout):
        await call(pool, work.outlive, timeout=0.2)
    assert await pool.run(work.add, 1) == 1


# -- the queue ---------------------------------------------------------------------------------------


async def test_calls_that_wait(tmp_path: Path) -> None:
    async with OffloadPool(1, max_queue=2) as pool:
        await pool.run(work.add, 1)
        begun, go_on = tmp_path / "begun", tmp_path / "go_on"
        order: list[str] = []

        async def run(name: str, priority: int) -> None:
            await call(pool, work.same, name, priority=priority)
            order.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, work.hold, str(begun), str(go_on))
            await exists(begun)
            group.start_soon(run, "low", -1)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(run, "high", 1)
            await anyio.wait_all_tasks_blocked()
            assert pool.stats.queued == 2
            with pytest.raises(
                OffloadQueueFull, match=r"all workers \(1\) are busy, and the queue is full \(2\)"
            ) as caught:
                await pool.run(work.add, 1)
            assert caught.value.retry_after > 0
            go_on.touch()
        assert order == ["high", "low"]
        assert (pool.stats.refused, pool.stats.queued) == (1, 0)


async def test_calls_that_run_out_of_time_in_the_queue_never_run(tmp_path: Path) -> None:
    async with OffloadPool(1) as pool:
        await pool.run(work.add, 1)
        begun, go_on, never = tmp_path / "begun", tmp_path / "go_on", tmp_path / "never"
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, work.hold, str(begun), str(go_on))
            await exists(begun)
            with pytest.raises(OffloadTimeout, match="was not begun"):
                await call(pool, work.sleep, 0, str(never), timeout=0.1)
            with anyio.move_on_after(0.05):
                await pool.run(work.sleep, 0, str(never))
            go_on.touch()
        await pool.run(work.add, 1)
        assert not never.exists()


# -- workers that die --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (work.leave, (3,), 3),
        (work.leave, (0,), 0),
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
    assert pool.stats.crashes == 1


async def test_a_worker_that_closes_its_socket(pool: OffloadPool) -> None:
    with pytest.raises(WorkerCrashed):
        await pool.run(work.close_everything)
    assert await pool.run(work.add, 1) == 1


async def test_an_idle_worker_that_is_killed_is_replaced(pool: OffloadPool) -> None:
    first = await pool.run(work.pid)
    os.kill(first, signal.SIGKILL)
    await has_ended(first)
    assert await pool.run(work.pid) != first
    assert (pool.stats.crashes, pool.stats.respawns) == (0, 1)


async def test_recycling() -> None:
    async with OffloadPool(1, max_calls=2) as pool:
        pids = [await pool.run(work.pid) for _ in range(4)]
        assert (pool.stats.recycled, pool.stats.respawns) == (2, 0)
    assert pids[0] == pids[1] != pids[2] == pids[3]
    async with OffloadPool(1, max_rss=1) as pool:
        assert await pool.run(work.pid) != await pool.run(work.pid)


async def test_what_the_request_has_left_counts(pool: OffloadPool) -> None:
    with request_with(0.3):
        with pytest.raises(OffloadTimeout, match=r"0\.3 s"):
            await call(pool, work.sleep, 60, timeout=PATIENCE)


# -- the end -----------------------------------------------------------------------------------------


async def test_closing_stops_what_runs_and_refuses_what_waits(tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    errors: list[str] = []

    async def run(pool: OffloadPool, function: Any, *args: Any) -> None:
        try:
            await pool.run(function, *args)
        except OffloadError as error:
            errors.append(str(error))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            async with OffloadPool(1, nice=0, grace=PATIENCE / 3) as pool:
                pid = await pool.run(work.pid)
                group.start_soon(run, pool, work.sleep, 60, str(begun), str(ended))
                await exists(begun)
                group.start_soon(run, pool, work.add, 1)
                await anyio.wait_all_tasks_blocked()
        await has_ended(pid)
    assert ended.exists()
    assert sorted(error.partition(" was ")[2] for error in errors) == [
        "not begun: its pool was closed",
        "stopped: its pool was closed",
    ]
    with pytest.raises(OffloadError, match="is not open"):
        await pool.run(work.add, 1)


async def test_closing_kills_what_is_deaf() -> None:
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            async with OffloadPool(1, grace=0.1) as pool:
                pid = await pool.run(work.pid)

                async def run() -> None:
                    with pytest.raises(OffloadError):
                        await pool.run(work.swallow)

                group.start_soon(run)
                await anyio.sleep(0.1)
        await has_ended(pid)


async def test_nothing_is_left(tmp_path: Path) -> None:
    async def once() -> None:
        async with OffloadPool(2) as pool:
            await pool.run(work.same, bytes(300_000))
            with pytest.raises(OffloadTimeout):
                await call(pool, work.sleep, 60, timeout=0.1)
            with pytest.raises(WorkerCrashed):
                await pool.run(work.leave, 1)

    children = children_of_this_process()  # other tests' too, such as multiprocessing's resource tracker
    await once()
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        await once()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert threading.active_count() <= threads + 1
    assert children_of_this_process() <= children


async def test_options_are_checked() -> None:
    for options, error in (
        ({"workers": 0}, ValueError),
        ({"workers": "2"}, TypeError),
        ({"max_queue": -1}, ValueError),
        ({"nice": 20}, ValueError),
        ({"grace": 0}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            OffloadPool(**options)
    assert time.monotonic() > 0
