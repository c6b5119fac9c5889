"""Which pool a call runs in, with pools that start no process."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import uvloop

from asyncguard.offloading import _pool, _pools


class FakePool:
    """Keeps a record of what is done to it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def open(self, *, warm: bool = True) -> None:
        self.done.append("opened warm" if warm else "opened")
        _pools.add(self)  # type: ignore[arg-type]

    async def aclose(self) -> None:
        await asyncio.sleep(0)  # it can wait for its workers
        _pools.remove(self)  # type: ignore[arg-type]
        self.done.append("closed")

    def abandon(self) -> None:
        self.done.append("abandoned")


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakePool]]:
    """The pools that were made for want of an open one."""
    made: list[FakePool] = []

    def make() -> FakePool:
        made.append(FakePool())
        return made[-1]

    monkeypatch.setattr(_pool, "OffloadPool", make)
    yield made
    for pool in made:
        _pools.remove(pool)  # type: ignore[arg-type]


def current() -> Any:
    return _pools.current()


def test_where_no_loop_runs_that_is_said() -> None:
    """Also where trio is not installed."""
    code = """
import sys
sys.modules["trio"] = None
from asyncguard import offload
import json
try:
    offload(json.dumps)(1).send(None)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("no event loop runs in this thread: await the call in a coroutine;")
    with pytest.raises(RuntimeError, match="no event loop runs in this thread"):
        current()


def opened() -> Any:
    pool = FakePool()
    pool.open()
    return pool


@pytest.mark.anyio
async def test_the_innermost_open_pool_is_taken() -> None:
    outer, inner = opened(), opened()
    assert current() is inner
    _pools.remove(inner)
    assert current() is outer
    _pools.remove(outer)


@pytest.mark.anyio
async def test_pools_may_be_closed_in_any_order() -> None:
    outer, inner = opened(), opened()
    _pools.remove(outer)
    assert current() is inner
    _pools.remove(inner)
    _pools.remove(inner)  # twice is harmless


@pytest.mark.anyio
async def test_without_one_a_pool_is_opened_with_the_first_call(made: list[FakePool]) -> None:
    assert made == []
    pool = current()
    assert current() is pool
    assert [made.done for made in made] == [["opened"]]  # no worker is started before it is needed
    opened_later = opened()
    assert current() is opened_later
    _pools.remove(opened_later)
    assert current() is pool


def test_without_a_loop_there_is_none(made: list[FakePool]) -> None:
    with pytest.raises(RuntimeError):
        current()
    assert made == []


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_it_is_closed_with_its_loop(made: list[FakePool], run: Any) -> None:
    async def main() -> Any:
        return current()

    first, second = run(main()), run(main())
    assert first is not second
    assert [pool.done for pool in made] == [["opened", "closed"]] * 2


def test_it_is_ended_with_trio(made: list[FakePool]) -> None:
    """There is nothing to wait with by then."""

    async def main() -> Any:
        return current()

    first, second = trio.run(main), trio.run(main)
    assert first is not second
    assert [pool.done for pool in made] == [["opened", "abandoned"]] * 2


def test_one_that_was_opened_explicitly_is_left_to_who_opened_it() -> None:
    async def main() -> Any:
        return opened()

    pool = asyncio.run(main())
    assert pool.done == ["opened warm"]


def test_each_loop_has_its_own(made: list[FakePool]) -> None:
    async def main() -> tuple[Any, Any]:
        here = opened()

        async def elsewhere() -> Any:
            return current()

        there = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
        assert current() is here
        _pools.remove(here)
        return here, there

    here, there = asyncio.run(main())
    assert here is not there
    assert made == [there]


def test_what_a_loop_left_that_was_closed_without_a_word_is_ended_with_the_next(made: list[FakePool]) -> None:
    async def main() -> Any:
        return current()

    loop = asyncio.new_event_loop()
    left = loop.run_until_complete(main())
    loop.close()
    assert left.done == ["opened"]
    asyncio.run(main())
    assert left.done == ["opened", "abandoned"]


def test_a_loop_that_is_only_not_running_keeps_its_pools() -> None:
    async def main() -> Any:
        return current()

    loop = asyncio.new_event_loop()
    try:
        kept = loop.run_until_complete(main())
        asyncio.run(main())
        assert loop.run_until_complete(main()) is kept
        assert kept.done == ["opened"]
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert kept.done == ["opened", "closed"]


def test_a_loop_is_not_kept_alive() -> None:
    async def main() -> None:
        current()

    loop = asyncio.new_event_loop()
    seen = weakref.ref(loop)
    loop.run_until_complete(main())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    del loop
    gc.collect()
    assert seen() is None


@pytest.mark.anyio
async def test_in_a_forked_child_none_is_ours(made: list[FakePool]) -> None:
    inherited = opened()
    _pools.forget()
    assert current() is not inherited
    assert len(made) == 1
