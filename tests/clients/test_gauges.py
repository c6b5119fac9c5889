"""What pools tell of themselves, against the libraries and servers: two connections, three callers."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import aiohttp
import anyio
import asyncpg
import httpx
import httpx2
import psycopg_pool
import pytest
import redis.asyncio
import sqlalchemy
from anyio.abc import ByteStream, SocketAttribute
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asyncguard.clients._gauges import gauges
from tests.postgres import Postgres, run_postgres
from tests.redis_server import Redis, run_redis
from tests.servers import HOST, eventually

PATIENCE = 30.0
SIZE = 2

Hold = Callable[[], AbstractAsyncContextManager[object]]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Redis]:
    with run_redis() as server:
        yield server


async def until(client: object, expected: tuple[int, int]) -> None:
    with anyio.move_on_after(PATIENCE):
        while gauges(client) != expected:
            await anyio.sleep(0.01)
    assert gauges(client) == expected


async def assert_told(client: object, hold: Hold) -> None:
    """The gauges while two hold on to a connection and one waits, then while one does, then none."""
    entered = 0
    releases = [anyio.Event() for _ in range(SIZE + 1)]

    async def use(release: anyio.Event) -> None:
        nonlocal entered
        async with hold():
            entered += 1
            await release.wait()

    async with anyio.create_task_group() as tasks:
        for number, release in enumerate(releases):
            tasks.start_soon(use, release)
            await until(client, (min(number + 1, SIZE), max(0, number + 1 - SIZE)))
        releases[0].set()
        await until(client, (SIZE, 0))
        with anyio.fail_after(PATIENCE):
            while entered < SIZE + 1:
                await anyio.sleep(0.01)
        releases[1].set()
        await until(client, (SIZE - 1, 0))
        releases[2].set()
        await until(client, (0, 0))


@asynccontextmanager
async def upstream() -> AsyncIterator[str]:
    """A server that leaves each of its answers unfinished: the connection stays in use until it is closed."""

    async def answer(stream: ByteStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n.")
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                await stream.receive()

    async with (
        await anyio.create_tcp_listener(local_host=HOST) as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, answer)
        yield f"http://{HOST}:{listener.extra(SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("library", [httpx, httpx2])
async def test_httpx(library: Any) -> None:
    limits = library.Limits(max_connections=SIZE)
    async with upstream() as url, library.AsyncClient(limits=limits) as client:
        await assert_told(client, lambda: client.stream("GET", url))


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_synchronous_httpx(library: Any) -> None:
    with library.Client() as client:
        assert gauges(client) == (0, 0)


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_httpx_with_a_transport_that_has_no_pool(library: Any) -> None:
    transport = library.MockTransport(lambda request: library.Response(200))
    assert gauges(library.AsyncClient(transport=transport)) == (None, None)


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_httpx_with_a_pool_for_a_proxy(library: Any) -> None:
    assert gauges(library.AsyncClient(proxy="http://127.0.0.1:1")) == (0, 0)


@pytest.mark.asyncio
async def test_aiohttp() -> None:
    connector = aiohttp.TCPConnector(limit=SIZE)
    async with upstream() as url, aiohttp.ClientSession(connector=connector) as session:
        await assert_told(session, lambda: session.get(url))
    assert gauges(session) == (None, None)  # it is closed


@pytest.mark.asyncio
async def test_sqlalchemy(postgres: Postgres) -> None:
    url = postgres.url.replace("://", "+asyncpg://")
    engine = create_async_engine(url, pool_size=1, max_overflow=SIZE - 1)
    await assert_told(engine, engine.connect)
    await engine.dispose()


def test_sqlalchemy_without_a_pool() -> None:
    assert gauges(create_async_engine("postgresql+asyncpg://", poolclass=NullPool)) == (None, None)


def test_synchronous_sqlalchemy(postgres: Postgres) -> None:
    url = postgres.url.replace("://", "+psycopg://")
    engine = sqlalchemy.create_engine(url, pool_size=1, max_overflow=0)
    with engine.connect():
        waiting = threading.Thread(target=lambda: engine.connect().close())
        waiting.start()
        eventually(lambda: gauges(engine) == (1, 1), "one waits", PATIENCE)
    waiting.join()
    assert gauges(engine) == (0, 0)
    engine.dispose()


@pytest.mark.asyncio
async def test_asyncpg(postgres: Postgres) -> None:
    async with asyncpg.create_pool(postgres.url, min_size=1, max_size=SIZE) as pool:
        await assert_told(pool, pool.acquire)
    assert gauges(asyncpg.create_pool(postgres.url)) == (None, None)  # it is not open


@pytest.mark.asyncio
async def test_psycopg(postgres: Postgres) -> None:
    async with psycopg_pool.AsyncConnectionPool(postgres.url, min_size=SIZE, open=False) as pool:
        await pool.wait()
        await assert_told(pool, pool.connection)


@pytest.mark.asyncio
async def test_psycopg_forgets_who_has_given_up(postgres: Postgres) -> None:
    async with psycopg_pool.AsyncConnectionPool(postgres.url, min_size=1, open=False) as pool:
        async with pool.connection():
            with pytest.raises(psycopg_pool.PoolTimeout):
                await pool.getconn(timeout=0.05)
            assert pool.get_stats()["requests_waiting"] == 1
            assert gauges(pool) == (1, 0)


@pytest.mark.asyncio
async def test_redis(redis_server: Redis) -> None:
    pool: Any = redis.asyncio.BlockingConnectionPool.from_url(redis_server.url, max_connections=SIZE)

    @asynccontextmanager
    async def hold() -> AsyncIterator[None]:
        connection = await pool.get_connection()
        try:
            yield
        finally:
            await pool.release(connection)

    async with redis.asyncio.Redis.from_pool(pool) as client:
        await assert_told(client, hold)


@pytest.mark.asyncio
async def test_redis_that_lets_nobody_wait(redis_server: Redis) -> None:
    async with redis.asyncio.from_url(redis_server.url) as client:
        assert await client.ping()
        assert gauges(client) == (0, 0)


def test_nothing_is_known_of_others() -> None:
    assert gauges(object()) == (None, None)


def test_a_library_that_was_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "httpx")
    assert gauges(object()) == (None, None)
