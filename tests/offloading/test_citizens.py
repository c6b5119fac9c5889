"""Functions do what functions do to a process: each gets its answer, and the calls after it get theirs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from asyncguard.errors import OffloadTimeout, PayloadError, WorkerCrashed
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import chores_citizens as chores

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

PATIENCE = 60.0
"""Seconds after which a test has failed."""
METHODS = ["fork", "spawn", "forkserver"]


async def call(pool: OffloadPool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await pool.run_call(address_of(function), function, args, {}, CallOptions(**options))


@pytest.fixture
async def pool(anyio_backend: object) -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=0, grace=PATIENCE) as pool:
            yield pool


@pytest.fixture
async def impatient_pool(anyio_backend: object) -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=0, grace=0.1) as pool:
            yield pool


async def is_whole(pool: OffloadPool, *, worker: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """Results come, large ones, log records, stops; from that worker, if it is still to be the one."""
    for value in (1, "text", np.arange(300_000)):
        assert np.array_equal(await pool.run(chores.same, value), value)
    with pytest.raises(TypeError, match="can't multiply"):
        await pool.run(chores.square, "text")  # type: ignore[arg-type]
    caplog.clear()
    await pool.run(chores.log, "it still can be heard")
    assert "it still can be heard" in caplog.messages
    with pytest.raises(OffloadTimeout):
        await call(pool, chores.sleep, timeout=0.05)
    if worker is not None:
        assert await pool.run(chores.pid) == worker
        assert (pool.stats.crashes, pool.stats.kills) == (0, 0)


HARMLESS: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
    (chores.read_lines, (), []),
    (chores.child_that_talks, (), 0),
    (chores.child_that_is_heard, (), b"heard\n"),
    (chores.shell, (), 0),
    (chores.write_to_the_descriptors, (), 34),
    (chores.write_megabytes, (), 2_000_000),
    *[(chores.process, (method,), (7, 0)) for method in METHODS],
    *[(chores.process_pool, (method,), [0, 1, 4, 9, 16]) for method in METHODS],
    *[(chores.executor, (method,), [0, 1, 4, 9, 16]) for method in METHODS],
    (chores.fork, ("returns",), 0),
    (chores.fork, ("raises",), 1),
    (chores.fork, ("exits",), 5),
    (chores.fork, ("leaves",), 6),
    (chores.fork_and_return_much, (), 0),
    (chores.thread_that_is_left, (60,), 2),
    (chores.thread_that_exits, (), False),
    (chores.thread_that_raises, (), None),
    (chores.run_loop, (), 9),
    (chores.run_loop_with_a_child, (), b"heard\n"),
    (chores.alarm, (), 1),
    (chores.terminate_the_group, (), None),
    (chores.change_directory, (), "/"),
    (chores.change_mask, (), 0o777),
    (chores.change_locale, (), "C"),
    (chores.clear_environment, (), 0),
    *[(chores.close_descriptors, descriptors, None) for descriptors in [(0,), (1,), (2,), (0, 1, 2)]],
    *[(chores.replace_streams, (kind,), None) for kind in chores.STREAMS],
    (chores.close_streams, (), None),
    *[(chores.set_handler, (name, how), None) for name in ("SIGTERM", "SIGCHLD") for how in chores.HANDLERS],
    (chores.set_handler, ("SIGUSR2", "handled"), None),
    (chores.set_default_timeout, (0.01,), None),
    (chores.disable_faulthandler, (), None),
    (chores.forget_modules, (), None),
    (chores.trace, (), None),
]


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    HARMLESS,
    ids=["-".join([function.__name__, *map(str, args)]) for function, args, _ in HARMLESS],
)
async def test_what_harms_nobody(
    pool: OffloadPool, function: Any, args: Any, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    here = Path.cwd(), os.umask(0o022), dict(os.environ)
    os.umask(here[1])
    first = await pool.run(chores.pid)
    assert await pool.run(function, *args) == expected
    await is_whole(pool, worker=first, caplog=caplog)
    mask = os.umask(0o022)
    os.umask(mask)
    assert (Path.cwd(), mask, dict(os.environ)) == here


async def test_there_is_nobody_to_answer(pool: OffloadPool, caplog: pytest.LogCaptureFixture) -> None:
    first = await pool.run(chores.pid)
    with pytest.raises(EOFError):
        await pool.run(chores.ask)
    await is_whole(pool, worker=first, caplog=caplog)


@pytest.mark.parametrize("configure", [chores.basic_config, chores.dict_config])
async def test_logging_that_is_configured_in_a_function(
    pool: OffloadPool, configure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The next call's records come all the same."""
    options = {"force": True} if configure is chores.basic_config else {}
    await pool.run(configure, **options)
    with caplog.at_level(logging.WARNING):
        await pool.run(chores.log, "now")
    assert "now" in caplog.messages
    await is_whole(pool, worker=None, caplog=caplog)


async def test_what_is_printed_to_a_closed_descriptor_gets_into_no_payload(pool: OffloadPool) -> None:
    """A file that is opened next has its number: one that an argument came in, for instance."""
    await pool.run(chores.close_descriptors, 1)
    for value in (np.ones(1_000_000, int), bytes([1]) * 1_000_000):
        for _ in range(3):
            assert await pool.run(chores.write_to_standard_output, value) == 1_000_000
            assert sum(await pool.run(chores.same, value)) == 1_000_000


async def sleep_too_long(pool: OffloadPool) -> None:
    """Have a call be out of time that has begun, however busy the machine is."""
    seconds, begun = 0.1, list[float]()
    while not begun:
        with pytest.raises(OffloadTimeout):
            await call(pool, chores.sleep, timeout=seconds, on_progress=begun.append)
        seconds *= 2


@pytest.mark.parametrize("how", chores.HANDLERS)
async def test_a_function_that_takes_the_signal_that_stops_it(
    impatient_pool: OffloadPool, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stopped by its death then."""
    pool = impatient_pool
    first = await pool.run(chores.pid)
    await pool.run(chores.set_handler, "SIGUSR1", how)
    assert await pool.run(chores.pid) == first
    await sleep_too_long(pool)
    assert await pool.run(chores.pid) != first
    await is_whole(pool, worker=None, caplog=caplog)


async def test_a_function_that_blocks_all_signals(
    impatient_pool: OffloadPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = impatient_pool
    first = await pool.run(chores.pid)
    await pool.run(chores.block_signals)
    await sleep_too_long(pool)
    assert await pool.run(chores.pid) != first
    await is_whole(pool, worker=None, caplog=caplog)


async def test_a_loop_in_a_function_is_stopped(pool: OffloadPool, tmp_path: Path) -> None:
    """And what its coroutines clean up is cleaned up."""
    first = await pool.run(chores.pid)
    assert await pool.run(chores.run_loop) == 9
    ended = tmp_path / "ended"
    seconds = 0.3
    while not ended.exists():
        with pytest.raises(OffloadTimeout):
            await call(pool, chores.run_loop, 60, str(ended), timeout=seconds)
        assert await pool.run(chores.run_loop) == 9
        seconds *= 2
    assert await pool.run(chores.pid) == first


async def test_a_worker_whose_functions_left_processes_behind_ends() -> None:
    """By itself; and so do those."""
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=0, grace=PATIENCE / 4) as pool:
            children = await pool.run(chores.executor_that_is_left)
            assert len(children) == 2
        try:
            end = time.monotonic() + PATIENCE / 3
            while any(Path(f"/proc/{child}/exe").exists() for child in children):
                assert time.monotonic() < end, "they are left"
                await asyncio.sleep(0.05)
        finally:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


async def test_a_result_for_which_there_is_no_room(pool: OffloadPool) -> None:
    first = await pool.run(chores.pid)
    await pool.run(chores.limit_files, 200_000)
    with pytest.raises(PayloadError, match=r"the result cannot be sent: OSError: .*too large"):
        await pool.run(chores.same, bytes(1_000_000))
    assert await pool.run(chores.same, bytes(150_000)) == bytes(150_000)
    assert await pool.run(chores.pid) == first


async def test_a_function_that_takes_all_descriptors(
    pool: OffloadPool, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes with one fails with its worker, and a new worker has them again."""
    first = await pool.run(chores.pid)
    assert await pool.run(chores.use_up_descriptors)
    assert await pool.run(chores.pid) == first
    with pytest.raises((WorkerCrashed, PayloadError)):
        await pool.run(chores.same, bytes(1_000_000))
    await is_whole(pool, worker=None, caplog=caplog)


async def test_a_function_that_writes_on_the_wire(
    pool: OffloadPool, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WorkerCrashed):
        await pool.run(chores.write_to_sockets)
    await is_whole(pool, worker=None, caplog=caplog)


async def test_a_server_with_a_default_timeout_for_its_sockets(caplog: pytest.LogCaptureFixture) -> None:
    """Ours are none of its business: workers wait for calls for as long as it takes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        with anyio.fail_after(PATIENCE):
            async with OffloadPool(1, nice=0, grace=PATIENCE) as pool:
                first = await pool.run(chores.pid)
                await pool.run(chores.set_default_timeout, 0.05)
                await asyncio.sleep(0.3)
                await is_whole(pool, worker=first, caplog=caplog)
    finally:
        socket.setdefaulttimeout(before)


async def test_a_module_that_sets_a_default_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a process that has imported it."""
    (tmp_path / "impatient.py").write_text(
        "import os, socket\n\nsocket.setdefaulttimeout(0.05)\n\ndef pid():\n    return os.getpid()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = socket.getdefaulttimeout()
    try:
        import impatient  # type: ignore[import-not-found]

        socket.setdefaulttimeout(before)
        with anyio.fail_after(PATIENCE):
            async with OffloadPool(1, max_calls=2) as pool:
                first = await pool.run(impatient.pid)
                assert await pool.run(impatient.pid) == first
                second = await pool.run(impatient.pid)  # it was imported before this one was forked
                await asyncio.sleep(0.3)
                assert await pool.run(impatient.pid) == second != first
    finally:
        sys.modules.pop("impatient", None)
        socket.setdefaulttimeout(before)


async def test_a_thread_that_is_left_keeps_no_worker_alive() -> None:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1, nice=0, grace=PATIENCE / 4) as pool:
            pid = await pool.run(chores.pid)
            assert await pool.run(chores.thread_that_is_left, 600) == 2
            before = time.monotonic()
        assert time.monotonic() - before < PATIENCE / 2
        assert not Path(f"/proc/{pid}/exe").exists()
