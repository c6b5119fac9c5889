"""Loops that end, tasks that are cancelled from outside, and processes that are forked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from typing import Any

import anyio
import pytest

from asyncguard import SharedNotOpen, SharedStartFailed, open_shared
from asyncguard.clients import _instance, _slots
from tests.clients.things import Journal, stubborn
from tests.conftest import TurnedClock

PATIENCE = 30.0


@pytest.fixture
def journal() -> Journal:
    return Journal()


async def take_time() -> None:
    await asyncio.sleep(0.01)


def test_asyncio_run_closes_all_in_order_when_it_is_interrupted(journal: Journal) -> None:
    """As at a second Ctrl-C: every task is cancelled at once, those that objects live in as well."""

    async def note() -> None:
        await asyncio.sleep(0.01)
        journal.append("done")

    a = journal.thing("a", stop=note)
    b = journal.thing("b", a, stop=note)

    async def serve() -> None:
        try:
            async with open_shared(b):
                try:
                    await asyncio.sleep(PATIENCE)
                finally:
                    await take_time()
                    assert b.get().is_open
                    journal.append("left")
        finally:
            assert not _slots._homes

    async def main() -> None:
        task = asyncio.ensure_future(serve())
        await asyncio.sleep(0.01)
        assert not task.done()

    asyncio.run(main())  # which cancels what is left
    assert journal == ["+a", "+b", "left", "-b", "done", "-a", "done"]


def test_what_nobody_closes_is_closed_with_the_loop(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_instance, "LAST_WORD", 0.05)
    a = journal.thing("a")

    async def main() -> None:
        await open_shared(a).__aenter__()

    asyncio.run(main())
    assert journal == ["+a", "-a"]
    asyncio.run(main())  # on another loop
    assert journal == ["+a", "-a"] * 2
    _slots._homes.clear()


def test_a_loop_that_was_closed_without_a_word_is_forgotten(journal: Journal) -> None:
    loop = asyncio.new_event_loop()
    a = journal.thing("a")
    loop.run_until_complete(open_shared(a).__aenter__())
    tasks = asyncio.all_tasks(loop)
    loop.close()
    assert len(_slots._homes) == 1

    async def main() -> None:
        with pytest.raises(SharedNotOpen):
            a.get()
        async with open_shared(journal.thing("b")):
            assert len(_slots._homes) == 1

    asyncio.run(main())
    assert not _slots._homes
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


@pytest.mark.asyncio
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_task_that_is_cancelled_while_it_closes_goes_on(times: int, journal: Journal) -> None:
    reached, release = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await release.wait()

    async def serve() -> None:
        async with open_shared(journal.thing("a"), journal.thing("b", stop=wait)):
            pass

    task = asyncio.create_task(serve())
    await reached.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert journal == ["+a", "+b", "-b", "-a"]


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_at_any_step_leaves_nothing_open(journal: Journal) -> None:
    async def few() -> None:
        for _ in range(2):
            await asyncio.sleep(0)

    resources = [journal.thing(name, start=few, stop=few) for name in "abc"]

    async def serve() -> None:
        async with open_shared(*resources):
            await few()

    cancelled = 0
    for moment in range(80):
        task = asyncio.create_task(serve())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            cancelled += 1
        assert not _slots._homes
        assert not any(thing.is_open for thing in journal.made)
    assert 0 < cancelled < 80
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.asyncio
async def test_an_object_whose_task_alone_is_cancelled_ends_by_itself(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_instance, "LAST_WORD", 0.01)
    a = journal.thing("a")
    async with open_shared(a):
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "asyncguard-shared-a"]
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(SharedNotOpen, match="has ended by itself"):
            a.get()
        while a.status.state != "open":
            await asyncio.sleep(0.001)
        assert a.get() is journal.made[1]
    assert journal == ["+a", "-a", "+a", "-a"]
    assert "ended by itself: CancelledError" in caplog.text


@pytest.mark.asyncio
async def test_a_start_that_ends_the_process_does(journal: Journal) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await open_shared(journal.thing("a"), journal.thing("b", start=leave)).__aenter__()
    assert journal == ["+a", "+b", "-a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_nothing_of_its_parents() -> None:
    script = """
        import asyncio, os, sys, warnings
        from asyncguard import SharedNotOpen, open_shared, shared

        class Thing:
            def close(self):
                print("closed in", "child" if os.getpid() != parent else "parent", flush=True)

        thing = shared(Thing)
        parent = os.getpid()

        async def child():
            try:
                thing.get()
            except SharedNotOpen:
                print("not open", flush=True)
            async with open_shared(thing):
                print(type(thing.get()).__name__, flush=True)

        async def main():
            async with open_shared(thing):
                pid = os.fork()
                if not pid:
                    asyncio._set_running_loop(None)
                    try:
                        asyncio.new_event_loop().run_until_complete(child())
                    finally:
                        os._exit(0)
                os.waitpid(pid, 0)
                thing.get()

        warnings.simplefilter("ignore")
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split("\n")[:-1] == ["not open", "Thing", "closed in child", "closed in parent"]
    assert done.stderr == ""


@pytest.mark.anyio
async def test_what_was_never_left_ends_with_its_loop(anyio_backend: Any, journal: Journal) -> None:
    """On trio, system tasks are cancelled with the run."""
    name, _ = anyio_backend
    script = f"""
        import anyio
        from contextlib import asynccontextmanager
        from asyncguard import open_shared, shared
        from asyncguard.clients import _instance

        _instance.LAST_WORD = 0.05

        @asynccontextmanager
        async def live():
            try:
                yield 1
            finally:
                print("closed", flush=True)

        async def main():
            await open_shared(shared(live)).__aenter__()

        anyio.run(main, backend={name!r})
    """
    done = await anyio.run_process([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert done.stdout == b"closed\n"


@pytest.mark.asyncio
async def test_a_start_that_hangs_and_is_cancelled_then_is_cancelled(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, reached = anyio.Event(), asyncio.Event()

    async def start() -> None:
        reached.set()
        await stubborn(release)

    async def serve() -> None:
        async with open_shared(journal.thing("a", start=start, start_timeout=0.01)):
            raise AssertionError

    task = asyncio.create_task(serve())
    await reached.wait()
    await asyncio.sleep(0.05)  # it is out of time, and given its grace
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert journal == ["+a", "-a"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks begin at once from 3.12 on")
def test_tasks_that_begin_at_once(journal: Journal, clock: TurnedClock) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        a = journal.thing("a", max_age=60)
        b = journal.thing("b", a)
        async with open_shared(b):
            clock.turn(60)
            with a.use():
                pass
            while len(journal.made) < 3:
                await asyncio.sleep(0.001)
        failing = journal.thing("c", start=fail)
        with pytest.raises(SharedStartFailed):
            await open_shared(failing).__aenter__()

    asyncio.run(main(), debug=True)
    assert journal == ["+a", "+b", "+a", "-b", "-a", "-a", "+c"]


async def fail() -> None:
    raise OSError("no")
