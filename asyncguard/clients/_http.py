"""Clients of httpx and httpx2: they give up when the request that they work for has no time left.

They keep their own limits too. Both libraries have the same parts, so that what is here serves both; neither
is imported. All of it happens in the client's transports: what is around them, redirects and authentication
included, sees what it always does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from functools import cache
from types import ModuleType
from typing import Any

from asyncguard.clients._deadline import OUT_OF_TIME, limited, onward, remaining
from asyncguard.clients._leaks import guard_pool

__all__ = ["fit_async", "fit_sync", "pools"]

logger = logging.getLogger("asyncguard.clients")

_NESTED = 4
"""How deep transports may be wrapped into each other for the innermost one's pool to be found."""

_SHORTEST = 0.001
"""A socket whose time limit is 0 does not wait, but fails with another error."""
_LATE = {
    "connect": "ConnectTimeout",
    "pool": "PoolTimeout",
    "read": "ReadTimeout",
    "write": "WriteTimeout",
}
"""What is raised when a request is too late in each of its phases."""


def fit_async(client: Any, library: ModuleType, name: str) -> None:
    """Have an ``AsyncClient`` keep to the deadlines of requests, and its pools lose no connections.

    Args:
        client: The client.
        library: ``httpx`` or ``httpx2``.
        name: What the log calls the client.
    """
    for pool in pools(client):
        guard_pool(pool, name)
    _stand_before(client, _transport_class(library))


def fit_sync(client: Any, library: ModuleType) -> None:
    """Have a ``Client`` keep to the deadlines of requests, where a `def` endpoint uses it.

    Nothing can be cancelled in a worker thread: what is left limits each phase of a call, and each piece of
    its response.

    Args:
        client: The client.
        library: ``httpx`` or ``httpx2``.
    """
    _stand_before(client, _blocking_transport_class(library))


def pools(client: Any) -> list[Any]:
    """The pools of connections of a client's transports, and of those that these are made of."""
    transports = [client._transport, *(each for each in client._mounts.values() if each is not None)]
    return list({id(pool): pool for transport in transports for pool in _pools(transport, _NESTED)}.values())


def _stand_before(client: Any, guarded: type[Any]) -> None:
    """Put a guarded transport before each of a client's."""
    if not isinstance(client._transport, guarded):
        client._transport = guarded(client._transport)
    for pattern, transport in client._mounts.items():
        if transport is not None and not isinstance(transport, guarded):
            client._mounts[pattern] = guarded(transport)


def _pools(transport: Any, depth: int) -> Iterator[Any]:
    parts = getattr(transport, "__dict__", {})
    if hasattr(parts.get("_pool"), "handle_async_request"):
        yield parts["_pool"]
    elif depth:
        for part in parts.values():
            if hasattr(type(part), "handle_async_request"):
                yield from _pools(part, depth - 1)


class _Phases(dict[str, Any]):
    """The time limits of a request, which remember what was asked for last: that is what was going on."""

    late = "ReadTimeout"
    """The exception for what is going on."""

    def get(self, key: str, default: Any = None) -> Any:
        self.late = _LATE.get(key, self.late)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.late = _LATE.get(key, self.late)
        return super().__getitem__(key)


class _Capped(dict[str, Any]):
    """The time limits of a request, none of which is longer than what is left when it is asked for."""

    def get(self, key: str, default: Any = None) -> Any:
        own, left = super().get(key, default), max(remaining(), _SHORTEST)
        return own if math.isinf(left) else left if own is None else min(own, left)


class _StandIn:
    """A transport that is in all else the one that it stands for."""

    library: ModuleType

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        if name == "_transport":  # of what is just being copied
            raise AttributeError(name)
        return getattr(self._transport, name)

    def _left(self) -> float:
        """Seconds that are left; plus infinity if there is no limit.

        Raises:
            PoolTimeout: If there are none; that of the library.
        """
        left = remaining()
        if left <= 0:
            raise self.library.PoolTimeout(f"{OUT_OF_TIME}; nothing was sent")
        return left

    def _bounded(self, request: Any, limits: dict[str, Any]) -> Any:
        """What is sent instead of a request: that itself may be sent again, by then with more time left."""
        headers, rest = request.headers, onward()
        if rest is not None and rest[0] not in headers:
            headers = headers.copy()
            headers[rest[0]] = rest[1]
        return self.library.Request(
            request.method,
            request.url,
            headers=headers,
            stream=request.stream,
            extensions={**request.extensions, "timeout": limits},
        )


class _Guarded(_StandIn):
    """One that gives up in time."""

    async def handle_async_request(self, request: Any) -> Any:
        left = self._left()
        if math.isinf(left):
            return await self._transport.handle_async_request(request)
        phases = _Phases(request.extensions.get("timeout", {}))
        with limited(left):
            response = await self._transport.handle_async_request(self._bounded(request, phases))
            response.stream = _stream_class(self.library)(response.stream)
            return response
        raise getattr(self.library, phases.late)(f"{OUT_OF_TIME}: {left:.3g} s were left when it began")

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Any:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._transport.__aexit__(*error)


class _GuardedInThread(_StandIn):
    """One that is called in a worker thread, and gives up in time as well as it can there."""

    def handle_request(self, request: Any) -> Any:
        if math.isinf(self._left()):
            return self._transport.handle_request(request)
        limits = _Capped(request.extensions.get("timeout", {}))
        return self._transport.handle_request(self._bounded(request, limits))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Any:
        self._transport.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._transport.__exit__(*error)


class _Stream:
    """The body of a response, of which each piece has to come in time."""

    library: ModuleType

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._stream)
        try:
            while True:
                yield await self._next(pieces)
        except StopAsyncIteration:
            return
        finally:
            # Who stops half-way leaves nothing to the garbage collector.
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def _next(self, pieces: AsyncIterator[bytes]) -> bytes:
        left = remaining()
        if math.isinf(left):
            return await anext(pieces)
        with limited(left):
            return await anext(pieces)
        raise self.library.ReadTimeout(f"{OUT_OF_TIME}: its response began, but did not end")

    async def aclose(self) -> None:
        await self._stream.aclose()


@cache
def _transport_class(library: ModuleType) -> type[_Guarded]:
    base: Any = library.AsyncBaseTransport
    return type("GuardedTransport", (_Guarded, base), {"library": library})


@cache
def _blocking_transport_class(library: ModuleType) -> type[_GuardedInThread]:
    base: Any = library.BaseTransport
    return type("GuardedTransport", (_GuardedInThread, base), {"library": library})


@cache
def _stream_class(library: ModuleType) -> type[_Stream]:
    base: Any = library.AsyncByteStream
    return type("GuardedStream", (_Stream, base), {"library": library})
