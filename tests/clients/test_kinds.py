"""What is built for single requests, of each library: all of them are real, and none is connected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import aiohttp
import asyncpg
import httpx
import httpx2
import psycopg_pool
import pytest
import redis
import redis.asyncio
import requests
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asyncguard.clients._constructors import Hold
from asyncguard.clients._rebuilt import AGAIN
from tests.clients.requesting import VERIFY, Service, Work

NOWHERE = "postgresql+asyncpg://nobody@localhost:1/nothing"


@pytest.fixture
def service() -> Iterator[Service]:
    hold = Hold()
    yield Service()
    hold.release()


# -- what is thrown away -------------------------------------------------------------------------------


async def httpx_closed() -> None:
    async with httpx.AsyncClient(verify=VERIFY):
        pass


async def httpx_closed_and_kept_hold_of() -> None:
    client = httpx.AsyncClient(verify=VERIFY)
    await client.aclose()
    cache.append(client)


async def httpx_dropped() -> None:
    httpx.AsyncClient(verify=VERIFY)


async def httpx_upon_its_own_transport() -> None:
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(verify=VERIFY, retries=2)):
        pass


async def httpx_synchronous() -> None:
    with httpx.Client(verify=VERIFY):
        pass


async def httpx2_closed() -> None:
    async with httpx2.AsyncClient(verify=VERIFY):
        pass


async def httpx2_synchronous() -> None:
    with httpx2.Client(verify=VERIFY):
        pass


async def aiohttp_closed() -> None:
    async with aiohttp.ClientSession():
        pass


async def aiohttp_upon_its_own_connector() -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2)):
        pass


async def requests_closed() -> None:
    with requests.Session():
        pass


async def redis_closed() -> None:
    async with redis.asyncio.Redis():
        pass


async def redis_from_url() -> None:
    client = redis.asyncio.Redis.from_url("redis://localhost:1")
    await client.aclose()


async def redis_synchronous() -> None:
    redis.Redis().close()


async def redis_synchronous_from_url() -> None:
    redis.Redis.from_url("redis://localhost:1").close()


async def asyncpg_closed() -> None:
    async with asyncpg.create_pool("postgresql://nobody@localhost:1/nothing", min_size=0):
        pass


async def psycopg_closed() -> None:
    async with psycopg_pool.AsyncConnectionPool("port=1", min_size=0, max_size=1, open=False):
        pass


async def psycopg_synchronous() -> None:
    with psycopg_pool.ConnectionPool("port=1", min_size=0, max_size=1, open=False):
        pass


async def sqlalchemy_disposed() -> None:
    engine = create_async_engine(NOWHERE)
    await engine.dispose()


async def sqlalchemy_dropped() -> None:
    create_async_engine(NOWHERE)


async def sqlalchemy_disposed_and_kept_hold_of() -> None:
    engine = create_async_engine(NOWHERE)
    await engine.dispose()
    cache.append(engine)


async def sqlalchemy_synchronous() -> None:
    engine = create_engine("sqlite://")
    engine.dispose()


THROWN_AWAY = {
    httpx_closed: "httpx.AsyncClient",
    httpx_closed_and_kept_hold_of: "httpx.AsyncClient",
    httpx_dropped: "httpx.AsyncClient",
    httpx_synchronous: "httpx.Client",
    httpx2_closed: "httpx2.AsyncClient",
    httpx2_synchronous: "httpx2.Client",
    aiohttp_closed: "aiohttp.ClientSession",
    requests_closed: "requests.Session",
    redis_closed: "redis.asyncio.Redis",
    redis_synchronous: "redis.Redis",
    asyncpg_closed: "asyncpg.Pool",
    psycopg_closed: "psycopg_pool.AsyncConnectionPool",
    psycopg_synchronous: "psycopg_pool.ConnectionPool",
    sqlalchemy_synchronous: "sqlalchemy.Engine",
    httpx_upon_its_own_transport: "httpx.AsyncClient",
    aiohttp_upon_its_own_connector: "aiohttp.ClientSession",
    redis_from_url: "redis.asyncio.Redis",
    redis_synchronous_from_url: "redis.Redis",
    sqlalchemy_disposed: "sqlalchemy.ext.asyncio.AsyncEngine",
    sqlalchemy_dropped: "sqlalchemy.ext.asyncio.AsyncEngine",
    sqlalchemy_disposed_and_kept_hold_of: "sqlalchemy.ext.asyncio.AsyncEngine",
}
ON_ASYNCIO_ONLY = ("aiohttp", "asyncpg", "psycopg_pool", "redis.asyncio")

cache: list[Any] = []
"""Outlives the requests."""


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    yield
    cache.clear()


@pytest.mark.anyio
@pytest.mark.parametrize("work", THROWN_AWAY, ids=lambda work: work.__name__)
async def test_what_is_built_for_one_request_is_reported_once(
    work: Work, service: Service, anyio_backend: tuple[str, object]
) -> None:
    client = THROWN_AWAY[work]  # type: ignore[index]
    if anyio_backend[0] == "trio" and client.startswith(ON_ASYNCIO_ONLY):
        return
    await service.requests(work, AGAIN)
    assert service.reports == []
    await service.requests(work, 5)
    (report,) = service.reports
    assert report.client == client
    assert report.times == AGAIN
    assert report.request == "GET /offers"
    assert report.line is not None
    assert report.line.function == getattr(work, "__name__", "")
    assert report.exact
    assert report.call in report.line.source
    assert "shared" in report.advice.text


# -- what is not ---------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_sessions_upon_a_shared_pool_cost_nothing(service: Service) -> None:
    pool = redis.asyncio.ConnectionPool()
    synchronous_pool = redis.ConnectionPool()
    connector = aiohttp.TCPConnector()
    engine = create_async_engine(NOWHERE)

    async def work() -> None:
        async with redis.asyncio.Redis(connection_pool=pool):
            pass
        with redis.Redis(connection_pool=synchronous_pool) as client:
            client.pipeline()
        async with aiohttp.ClientSession(connector=connector, connector_owner=False):
            pass
        engine.execution_options(isolation_level="AUTOCOMMIT")
        AsyncEngine(engine.sync_engine)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=None)):  # type: ignore[arg-type]
            pass
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(lambda request: httpx2.Response(204))):
            pass

    await service.requests(work, 10)
    assert service.reports == []
    await connector.close()
    await engine.dispose()
