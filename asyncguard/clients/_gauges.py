"""How many connections of a known client's pool are in use, and how many callers wait for one.

Some libraries tell, and of the others their insides are read. Each reading has a test against the library
itself that fails loudly when a new version changes it; it is left out then, and does no harm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

__all__ = ["gauges"]


def gauges(client: object) -> tuple[int | None, int | None]:
    """Read the gauges of a client's pool, on the thread of its loop.

    Returns:
        How many of its connections are in use or being made, and how many callers wait for one. `None` for
        what is not known.
    """
    for known in _KNOWN:
        if isinstance(client, known.classes()):
            return _read(known.in_use, client), _read(known.waiting, client)
    return None, None


class _Known(NamedTuple):
    module: str
    names: tuple[str, ...]
    in_use: Callable[[Any], int]
    waiting: Callable[[Any], int]

    def classes(self) -> tuple[type, ...]:
        """Its classes, if anybody has imported them."""
        module = sys.modules.get(self.module)
        found = (getattr(module, name, None) for name in self.names)
        return tuple(thing for thing in found if isinstance(thing, type))


def _read(gauge: Callable[[Any], int], client: object) -> int | None:
    try:
        return gauge(client)
    except Exception:  # it is another version, or a pool of another kind
        return None


def _undone(futures: Iterable[Any]) -> int:
    """How many still wait: one that has been served stays in its queue until its task runs."""
    return sum(not future.done() for future in futures)


def _http_pools(client: Any) -> Iterator[Any]:
    """The pools of an HTTP client: of its own transport, and of those for proxies."""
    transports = [client._transport, *(transport for transport in client._mounts.values() if transport)]
    pools = [transport._pool for transport in transports if hasattr(transport, "_pool")]
    if not pools:
        raise LookupError("its transports have no pools")
    yield from pools


def _http_in_use(client: Any) -> int:
    connections = (connection for pool in _http_pools(client) for connection in pool.connections)
    return sum(not (connection.is_idle() or connection.is_closed()) for connection in connections)


def _http_waiting(client: Any) -> int:
    return sum(request.is_queued() for pool in _http_pools(client) for request in pool._requests)


def _asyncpg_in_use(pool: Any) -> int:
    # Its own `get_size` leaves out those that are being made: all that a frozen server leaves.
    return int(pool.get_max_size() - pool._queue.qsize())


def _psycopg_in_use(pool: Any) -> int:
    stats = pool.get_stats()
    return int(stats["pool_size"] - stats["pool_available"])


def _psycopg_waiting(pool: Any) -> int:
    # Its statistics go on counting those that have given up.
    return sum(client.conn is None and client.error is None for client in tuple(pool._waiting))


_KNOWN = (
    *(
        _Known(library, ("AsyncClient", "Client"), in_use=_http_in_use, waiting=_http_waiting)
        for library in ("httpx", "httpx2")
    ),
    _Known(
        "aiohttp",
        ("ClientSession",),
        in_use=lambda session: len(session.connector._acquired),
        waiting=lambda session: sum(_undone(queue) for queue in session.connector._waiters.values()),
    ),
    _Known(
        "sqlalchemy.ext.asyncio",
        ("AsyncEngine",),
        in_use=lambda engine: engine.pool.checkedout(),
        waiting=lambda engine: _undone(engine.pool._pool._queue._getters),
    ),
    _Known(
        "sqlalchemy",
        ("Engine",),
        in_use=lambda engine: engine.pool.checkedout(),
        waiting=lambda engine: len(engine.pool._pool.not_empty._waiters),
    ),
    _Known(
        "asyncpg",
        ("Pool",),
        in_use=_asyncpg_in_use,
        waiting=lambda pool: _undone(pool._queue._getters),
    ),
    _Known(
        "psycopg_pool",
        ("AsyncConnectionPool", "ConnectionPool"),
        in_use=_psycopg_in_use,
        waiting=_psycopg_waiting,
    ),
    _Known(
        "redis.asyncio",
        ("Redis",),
        in_use=lambda client: len(client.connection_pool._in_use_connections),
        waiting=lambda client: _redis_waiting(client.connection_pool),
    ),
)
"""The libraries whose pools are known."""


def _redis_waiting(pool: Any) -> int:
    """Only a `BlockingConnectionPool` has callers wait; another one refuses them."""
    condition = getattr(pool, "_condition", None)
    return 0 if condition is None else _undone(condition._waiters)
