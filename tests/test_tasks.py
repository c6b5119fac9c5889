"""Which loop runs, tasks at the side, and waiting whatever is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextvars import Context, ContextVar
from typing import Any

import anyio
import anyio.to_thread
import pytest

from asyncguard._tasks import current_loop, leave_behind, outwait, own_task, running_trio, scheduler, start

PATIENCE = 30.0


@pytest.mark.anyio
async def test_each_loop_is_told_from_others() -> None:
    here = current_loop()
    assert here is not None
    assert current_loop() is here
    assert await anyio.to_thread.run_sync(current_loop) is None

    async def elsewhere() -> object:
        return current_loop()

    assert await anyio.to_thread.run_sync(lambda: anyio.run(elsewhere)) not in (here, None)


def test_without_a_loop() -> None:
    assert current_loop() is None
    for ask in (running_trio, scheduler):
        with pytest.raises(RuntimeError, match="no event loop runs in this thread"):
            ask()


@pytest.mark.anyio
async def test_a_task_has_a_name_and_a_context() -> None:
    variable = ContextVar("variable", default="none")
    variable.set("mine")
    seen: list[tuple[str, str | None]] = []
    ended = [anyio.Event(), anyio.Event()]

    async def work() -> None:
        seen.append((variable.get(), anyio.get_current_task().name))

    start(work, ended[0].set, name="its name")
    start(work, ended[1].set, name="its name", context=Context())
    with anyio.fail_after(PATIENCE):
        for event in ended:
            await event.wait()
    assert sorted(seen) == [("mine", "its name"), ("none", "its name")]


@pytest.mark.anyio
async def test_a_task_that_is_called_off_ends() -> None:
    for steps in range(3):  # before it has begun as well
        ended = anyio.Event()
        call_off = start(anyio.sleep_forever, ended.set)
        for _ in range(steps):
            await anyio.sleep(0)
        call_off()
        with anyio.fail_after(PATIENCE):
            await ended.wait()


@pytest.mark.anyio
async def test_outwaiting_ends_with_the_event_or_the_time() -> None:
    event = anyio.Event()
    with anyio.fail_after(PATIENCE):
        assert await outwait(event, 0.01) is None
        event.set()
        assert await outwait(event) is None
        assert await outwait(event, 0) is None


@pytest.mark.anyio
async def test_outwaiting_outwaits_a_cancelled_scope() -> None:
    event = anyio.Event()
    went_on = False

    async def wait() -> None:
        nonlocal went_on
        assert await outwait(event) is None
        went_on = True
        await anyio.sleep(0)
        raise AssertionError("the cancellation was lost")

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
                assert not went_on
                event.set()
    assert went_on


@pytest.mark.asyncio
async def test_outwaiting_hands_a_cancellation_of_its_task_back() -> None:
    waiting = anyio.Event()

    async def wait() -> object:
        return await outwait(waiting, PATIENCE)

    task = asyncio.create_task(wait())
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel("mine")
    await asyncio.sleep(0)
    assert not task.done()
    waiting.set()
    error = await task
    assert isinstance(error, asyncio.CancelledError)
    assert error.args == ("mine",)


def test_a_loop_ends_without_a_task_that_was_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    own: list[asyncio.Task[Any] | None] = []

    async def swallow() -> None:
        own.append(own_task())
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(PATIENCE)

    async def main() -> None:
        call_off = start(swallow, lambda: None)
        await asyncio.sleep(0)
        call_off()
        await asyncio.sleep(0)
        leave_behind(own[0])

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < PATIENCE
    (task,) = own
    assert task is not None
    assert not task.done()
    assert not caplog.records


@pytest.mark.anyio
async def test_on_trio_no_task_is_left_behind(anyio_backend_name: str) -> None:
    assert (own_task() is None) is (anyio_backend_name == "trio")
    leave_behind(None)
