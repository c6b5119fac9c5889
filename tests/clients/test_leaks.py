"""Connections that cancelled requests leave behind in a pool."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import httpx
import httpx2
import pytest

from asyncguard.clients import _leaks
from asyncguard.clients._leaks import LeakGuard, guard_pool
from tests.clients.peer import peer

LIBRARIES = [pytest.param(httpx, id="httpx"), pytest.param(httpx2, id="httpx2")]
ON_ASYNCIO = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)
"""Where a task can be cancelled as such, past every shield."""

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("library", LIBRARIES)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with peer() as url:
        yield url


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_leaks, "_told", set())


@asynccontextmanager
async def guarded(library: ModuleType, url: str, size: int = 1) -> AsyncIterator[tuple[Any, LeakGuard]]:
    """A client, whose pool has so many connections, and that pool's guard."""
    limits = library.Limits(max_connections=size, max_keepalive_connections=size)
    async with library.AsyncClient(base_url=url, limits=limits, verify=False, timeout=20) as client:
        guard = guard_pool(pool_of(client), "upstream")
        assert guard is not None
        yield client, guard
        assert not guard._open
        assert not pool_of(client)._requests


def pool_of(client: Any) -> Any:
    return client._transport._pool


async def works(client: Any) -> bool:
    """Whether a request finds a connection; without a guard it would wait for ever."""
    with anyio.move_on_after(20):
        return bool((await client.get("/")).status_code == 200)
    return False


# -- each way to lose a connection -------------------------------------------------------------------


async def cancelled_as_it_has_connected(client: Any) -> None:
    """Before the first byte is sent on a new connection."""
    with anyio.CancelScope() as scope:

        async def trace(event: str, info: object) -> None:
            if event == "connection.connect_tcp.complete":
                scope.cancel()

        await client.get("/silent", extensions={"trace": trace})
    assert scope.cancelled_caught


async def cancelled_before_it_connects(client: Any) -> None:
    """When a new connection has been made for a request that has waited, and before it knows."""
    with_answer = await client.send(client.build_request("GET", "/close"), stream=True)
    await with_answer.aread()
    holding = await client.send(client.build_request("GET", "/drip/body"), stream=True)
    waiting = asyncio.create_task(client.get("/"))
    while not pool_of(client)._requests[-1].is_queued():
        await asyncio.sleep(0)
    await holding.aclose()
    waiting.cancel()
    await asyncio.wait([waiting])


async def cancelled_as_it_closes(client: Any) -> None:
    """While the response, of which there is more to come, is being closed."""

    async def close() -> None:
        response = await client.send(client.build_request("GET", "/drip/body"), stream=True)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await response.aclose()

    await asyncio.wait([asyncio.create_task(close())])


async def forgotten(client: Any) -> None:
    """By whom it was for."""
    response = await client.send(client.build_request("GET", "/drip/body"), stream=True)
    del response
    gc.collect()


@pytest.mark.parametrize("lose", [cancelled_as_it_has_connected, forgotten])
async def test_a_lost_connection_is_given_back(
    lose: Callable[[Any], Awaitable[None]], url: str, library: ModuleType
) -> None:
    async with guarded(library, url) as (client, _):
        for _ in range(3):
            await lose(client)
        assert await works(client)


@ON_ASYNCIO
@pytest.mark.parametrize("lose", [cancelled_before_it_connects, cancelled_as_it_closes])
async def test_what_a_cancelled_task_has_lost_is_given_back(
    lose: Callable[[Any], Awaitable[None]], url: str, library: ModuleType
) -> None:
    async with guarded(library, url) as (client, _):
        for _ in range(3):
            await lose(client)
        assert await works(client)


@ON_ASYNCIO
@pytest.mark.parametrize(
    "lose",
    [cancelled_as_it_has_connected, cancelled_before_it_connects, cancelled_as_it_closes, forgotten],
)
async def test_a_pool_that_is_not_guarded_loses_it(
    lose: Callable[[Any], Awaitable[None]], url: str, library: ModuleType
) -> None:
    """Why all this is here; once it fails, a new version of the pool has mended something."""
    limits = library.Limits(max_connections=1)
    async with library.AsyncClient(base_url=url, limits=limits, verify=False, timeout=20) as client:
        await lose(client)
        if library is httpx or lose in (cancelled_as_it_has_connected, forgotten):
            with pytest.raises(library.PoolTimeout):
                await client.get("/", timeout=0.1)
        else:
            assert await works(client)


# -- and nothing else --------------------------------------------------------------------------------


async def test_who_waits_gets_the_place_of_a_lost_connection(url: str, library: ModuleType) -> None:
    async with guarded(library, url) as (client, _), anyio.create_task_group() as tasks:
        served: list[int] = []

        async def get() -> None:
            served.append((await client.get("/")).status_code)

        async def trace(event: str, info: object) -> None:
            if event == "connection.connect_tcp.complete":
                for _ in range(3):
                    tasks.start_soon(get)
                while len(pool_of(client)._requests) < 4:
                    await anyio.sleep(0)
                scope.cancel()

        with anyio.CancelScope() as scope:
            await client.get("/silent", extensions={"trace": trace})
        with anyio.fail_after(20):
            while len(served) < 3:
                await anyio.sleep(0.001)


async def test_connections_that_are_in_use_are_left_alone(url: str, library: ModuleType) -> None:
    async with guarded(library, url, size=3) as (client, guard):
        async with client.stream("GET", "/drip/body/30") as response:
            (busy,) = pool_of(client).connections
            await cancelled_as_it_has_connected(client)
            await forgotten(client)
            assert await works(client)
            assert guard.given_back == 2
            assert busy in pool_of(client).connections
            assert len(await response.aread()) == 30


async def test_requests_that_fail_by_themselves_lose_nothing(url: str, library: ModuleType) -> None:
    async with guarded(library, url) as (client, guard):
        for _ in range(3):
            with pytest.raises(library.ReadTimeout):
                await client.get("/silent", timeout=0.05)
            with pytest.raises(library.ConnectError):
                await client.get("http://127.0.0.1:1/")
        assert await works(client)
        assert guard.given_back == 0


async def test_the_log_has_it_once_for_each_client(
    url: str, library: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        async with guarded(library, url, size=2) as (client, guard):
            for _ in range(3):
                await cancelled_as_it_has_connected(client)
            assert guard.given_back == 3
    (message,) = [record.getMessage() for record in caplog.records if record.name == "asyncguard.clients"]
    assert message.startswith("upstream: a request that was cancelled left its connection behind in the pool")
    assert ("httpx2 loses far fewer" in message) == (library is httpx)


async def test_a_pool_is_guarded_once(url: str, library: ModuleType) -> None:
    async with guarded(library, url) as (client, guard):
        assert guard_pool(pool_of(client), "another") is guard


async def test_pools_of_other_kinds_are_left_alone(library: ModuleType) -> None:
    pool = SimpleNamespace(handle_async_request=print, _requests=[])
    assert guard_pool(pool, "upstream") is None
    assert pool.handle_async_request is print


async def test_a_pool_that_changes_its_mind_is_not_broken(
    url: str, library: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asyncguard.clients")
    async with guarded(library, url) as (client, guard):
        entries, pool_of(client)._requests = pool_of(client)._requests, [object()]
        with pytest.raises(library.UnsupportedProtocol):
            await client.get("gopher://127.0.0.1/")
        pool_of(client)._requests = entries
        await guard._give_back()
        assert await works(client)


class Stubborn:
    """A connection that does not close as it should."""

    def __init__(self, error: BaseException | None, closed: list[object]) -> None:
        self._error = error
        self._closed = closed

    async def aclose(self) -> None:
        self._closed.append(self)
        if self._error is not None:
            raise self._error


async def test_a_connection_that_does_not_close_keeps_no_other_from_it(library: ModuleType) -> None:
    closed: list[object] = []
    await _leaks._close_all([Stubborn(error, closed) for error in (None, OSError(), OSError(), None)])
    assert len(closed) == 4
    with pytest.raises(KeyboardInterrupt):
        await _leaks._close_all([Stubborn(error, closed) for error in (None, KeyboardInterrupt(), None)])
    assert len(closed) == 7


# -- all at once -------------------------------------------------------------------------------------


async def storm(client: Any, seconds: float, cancel: Callable[[Any, float], Awaitable[bool]]) -> int:
    """200 callers, most of whose requests are cancelled; returns how many were."""
    cancelled = 0
    until = anyio.current_time() + seconds
    chance = random.Random(0)

    async def call() -> None:
        nonlocal cancelled
        while anyio.current_time() < until:
            patience = chance.choice((0.0, chance.random() * 0.02, chance.random() * 0.1, 20.0))
            was_cancelled = await cancel(client, patience)
            cancelled += was_cancelled

    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(call)
    return cancelled


async def by_scope(client: Any, patience: float) -> bool:
    with anyio.move_on_after(patience):
        await client.get("/storm")
        return False
    return True


async def by_task(client: Any, patience: float) -> bool:
    task = asyncio.create_task(client.get("/storm"))
    if patience:
        await asyncio.wait([task], timeout=patience)
    else:
        for _ in range(random.randint(1, 50)):
            await asyncio.sleep(0)
    if task.done():
        task.result()
        return False
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


async def survives(library: ModuleType, url: str, seconds: float, cancel: Any) -> None:
    async with guarded(library, url, size=10) as (client, _):
        assert await storm(client, seconds, cancel) > 100
        served: list[int] = []

        async def get() -> None:
            served.append((await client.get("/", timeout=20)).status_code)

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(get)
        assert served == [200] * 100
        pool = pool_of(client)
        assert all(connection.is_idle() for connection in pool.connections)
        assert not pool._requests


async def test_a_storm_of_cancelled_scopes(url: str, library: ModuleType) -> None:
    await survives(library, url, 1.0, by_scope)


@ON_ASYNCIO
async def test_a_storm_of_cancelled_tasks(url: str, library: ModuleType) -> None:
    await survives(library, url, 3.0 if library is httpx else 1.0, by_task)


@pytest.mark.slow
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_long_storm(url: str, library: ModuleType) -> None:
    await survives(library, url, 30.0, by_task)
