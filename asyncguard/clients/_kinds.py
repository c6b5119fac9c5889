"""What is costly to build anew for each request: a table, and nothing else.

Some clients have their connections in a part of them, and are cheap once they are given one: many sessions
upon one pool are good practice. So the parts are listed as well, and a client that is given a part counts
only if its request has built that, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from asyncguard.events import Advice

__all__ = ["KINDS", "Kind"]

_PAGE = "cures/#client-per-request"

_HTTP = Advice(
    "Build it once and share it, with `asyncguard.shared(...)`: each new one loads its certificates again, "
    "and shakes hands again for its first request",
    _PAGE,
)
_SESSION = Advice(
    "Share one `httpx.Client` among threads, or an `httpx.AsyncClient` among coroutines, with "
    "`asyncguard.shared(...)`: each new session opens a new connection",
    _PAGE,
)
_POOL = Advice(
    "Build it once and share it, with `asyncguard.shared(...)`: each new one opens its connections anew, "
    "and no pool limits how many there are in all",
    _PAGE,
)


class Kind(NamedTuple):
    """A class of clients.

    Attributes:
        module: Where it is found.
        name: Its name there.
        advice: What to do instead of building it again and again.
        part: The argument of its constructor that brings the costly part of it, if it has one.
        ended: Tells of an instance, and of what `trait` told when it was new, whether it has been closed.
        trait: What is to be remembered of a new instance for that.
    """

    module: str
    name: str
    advice: Advice
    part: str = ""
    ended: Callable[[Any, Any], bool] = lambda thing, trait: False
    trait: Callable[[Any], Any] = lambda thing: None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def _is_closed(thing: Any, _: object) -> bool:
    return bool(thing.is_closed)


def _closed(thing: Any, _: object) -> bool:
    return bool(thing.closed)


def _is_closing(thing: Any, _: object) -> bool:
    return bool(thing.is_closing())


def _pool_of(engine: Any) -> weakref.ref[Any]:
    return weakref.ref(engine.pool)


def _has_another_pool(engine: Any, pool: weakref.ref[Any]) -> bool:
    # An engine that is disposed of gets a new pool.
    return engine.pool is not pool()


KINDS = (
    *(
        kind
        for library in ("httpx", "httpx2")
        for kind in (
            Kind(library, "AsyncClient", _HTTP, "transport", _is_closed),
            Kind(library, "Client", _HTTP, "transport", _is_closed),
            Kind(library, "AsyncHTTPTransport", _HTTP),
            Kind(library, "HTTPTransport", _HTTP),
        )
    ),
    Kind("aiohttp", "ClientSession", _HTTP, "connector", _closed),
    Kind("aiohttp", "BaseConnector", _HTTP, "", _closed),
    Kind("requests", "Session", _SESSION),
    Kind("redis.asyncio", "Redis", _POOL, "connection_pool"),
    Kind("redis.asyncio", "ConnectionPool", _POOL),
    Kind("redis", "Redis", _POOL, "connection_pool"),
    Kind("redis", "ConnectionPool", _POOL),
    Kind("asyncpg", "Pool", _POOL, "", _is_closing),
    Kind("psycopg_pool", "AsyncConnectionPool", _POOL, "", _closed),
    Kind("psycopg_pool", "ConnectionPool", _POOL, "", _closed),
    Kind("sqlalchemy.ext.asyncio", "AsyncEngine", _POOL, "sync_engine", _has_another_pool, _pool_of),
    Kind("sqlalchemy", "Engine", _POOL, "", _has_another_pool, _pool_of),
)
