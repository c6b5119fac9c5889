"""Gives back to an HTTP client's pool the connections that cancelled requests have left behind in it.

The pool of httpcore 1.x, and so that of httpx 0.28, loses a connection when the request that it was meant for
is cancelled at the wrong moment: before it has begun to connect, before it has sent its first byte, or while
it closes its response (https://github.com/encode/httpcore/issues/1093). The connection then counts as busy
for ever. When all of them do, every request waits until its own timeout and fails, until the process is
restarted. The pool of httpx2 has mended most of this, but not all of it.

A connection is lost if it is busy and no request is in flight on it. This is looked for whenever a request
has ended by an exception, which is the only way to lose one, and when a response has been forgotten:
collected as garbage, never closed.

What is private to the pool is used with care: should it look otherwise than expected, the pool is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from weakref import ref

import anyio

__all__ = ["LeakGuard", "guard_pool"]

logger = logging.getLogger("asyncguard.clients")

_USED = ("_assign_requests_to_connections", "_connections", "_requests", "handle_async_request")
"""What has to be there of a pool."""
_SWITCHING_PROTOCOLS = 101
"""The connection then belongs to who talks on it, whatever becomes of the response."""

_told: set[str] = set()
"""The clients of which the log has it."""


def guard_pool(pool: Any, name: str) -> LeakGuard | None:
    """Guard a pool of httpcore's kind from now on; once for each pool.

    Args:
        pool: The pool.
        name: What the log calls its client.

    Returns:
        Its guard; `None` if the pool is of no known kind.
    """
    guard = vars(pool).get("handle_async_request")
    if isinstance(guard, LeakGuard):
        return guard
    if not all(hasattr(pool, attribute) for attribute in _USED):
        logger.debug("the pool of %s is of no known kind: %r", name, pool)
        return None
    # On the object, not its class: other clients are none of our business.
    pool.handle_async_request = guard = LeakGuard(pool, name)
    return guard


class LeakGuard:
    """What a pool handles its requests by.

    Args:
        pool: The pool, an ``httpcore.AsyncConnectionPool`` or ``httpcore2``'s.
        name: What the log calls its client.

    Attributes:
        given_back: How many connections had been lost so far.
    """

    def __init__(self, pool: Any, name: str) -> None:
        self.given_back: int = 0
        self._pool = pool
        self._name = name
        self._open: dict[ref[Any], Any] = {}
        """The responses that have not been closed, each with what the pool has of its request."""
        self._forgotten: list[Any] = []

    async def __call__(self, request: Any) -> Any:
        """Send a request and return its response, as the pool does."""
        pool = self._pool
        if self._forgotten:
            await self._give_back()
        try:
            response = await type(pool).handle_async_request(pool, request)
        except BaseException:
            await self._give_back()
            raise
        stream = response.stream
        entry = getattr(stream, "_pool_request", None)
        if entry is not None and response.status != _SWITCHING_PROTOCOLS:
            key = ref(stream, self._forget)
            self._open[key] = entry
            stream.aclose = _Closing(key, self._close)
        return response

    async def _close(self, key: ref[Any], stream: Any) -> None:
        """Close the body of a response."""
        entry = self._open.pop(key, None)
        try:
            await type(stream).aclose(stream)
        except BaseException:
            await self._give_back(entry)
            raise

    def _forget(self, key: ref[Any]) -> None:
        # Garbage is collected anywhere, in the middle of the pool's own work too: it is only noted here.
        entry = self._open.pop(key, None)
        if entry is not None:
            self._forgotten.append(entry)

    async def _give_back(self, entry: Any = None) -> None:
        """Give back what is lost, `entry` being that of a request whose response could not be closed."""
        ended, self._forgotten = [entry, *self._forgotten], []
        try:
            lost, closing = self._collect(ended)
        except Exception:
            logger.debug("the pool of %s is not as it was expected", self._name, exc_info=True)
            return
        if lost:
            self.given_back += len(lost)
            self._tell()
        await _close_all([*lost, *closing])

    def _collect(self, ended: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Take what is lost out of the pool, and let those who wait have its place.

        Returns:
            The connections that were lost, and others that the pool has no more use for; all to be closed.
        """
        pool = self._pool
        requests, connections = pool._requests, pool._connections
        stale = [entry for entry in ended if entry in requests]
        for entry in stale:
            requests.remove(entry)
        in_use = {id(entry.connection) for entry in requests}
        lost = [
            connection
            for connection in connections
            if id(connection) not in in_use and not connection.is_idle() and not connection.is_closed()
        ]
        for connection in lost:
            connections.remove(connection)
        return lost, pool._assign_requests_to_connections() if lost or stale else []

    def _tell(self) -> None:
        if self._name in _told:
            return
        _told.add(self._name)
        library = type(self._pool).__module__.partition(".")[0]
        logger.warning(
            "%s: a request that was cancelled left its connection behind in the pool, where it would have "
            "counted as busy for ever. It has been given back; so will be others, without another word%s",
            self._name,
            "; httpx2 loses far fewer of them" if library == "httpcore" else "",
        )


class _Closing:
    """Closes a response through its guard, without keeping it alive."""

    __slots__ = ("_close", "_key")

    def __init__(self, key: ref[Any], close: Callable[[ref[Any], Any], Awaitable[None]]) -> None:
        self._key = key
        self._close = close

    def __call__(self) -> Awaitable[None]:
        return self._close(self._key, self._key())


async def _close_all(connections: list[Any]) -> None:
    """Close connections, all of them even if this is cancelled."""
    try:
        # Against a scope's cancellation; a task's own passes through, once.
        with anyio.CancelScope(shield=True):
            while connections:
                await connections.pop().aclose()
    except Exception:
        logger.debug("a connection could not be closed", exc_info=True)
    finally:
        if connections:
            await _close_all(connections)
