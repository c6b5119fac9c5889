"""The pool of an application: open while that is served; and how requests are answered that it failed."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from asyncguard._asgi import ProblemAnswer
from asyncguard._request import current_request
from asyncguard.errors import OffloadQueueFull, OffloadTimeout
from asyncguard.offloading import _pools

if TYPE_CHECKING:
    from asyncguard.offloading._pool import OffloadPool

__all__ = ["ANSWERS", "with_pool"]

logger = logging.getLogger("asyncguard.offloading")

A = TypeVar("A")

Lifespan = Callable[[A], AbstractAsyncContextManager[Mapping[str, Any] | None]]
"""What Starlette calls a lifespan: entered when the application starts, left when it ends."""


def with_pool(lifespan: Lifespan[A], make: Callable[[], OffloadPool]) -> Lifespan[A]:
    """A lifespan with a pool of worker processes around it.

    Args:
        lifespan: The application's own.
        make: Makes the pool; called each time the application starts.
    """

    @asynccontextmanager
    async def spanning(app: A) -> AsyncIterator[Mapping[str, Any] | None]:
        async with opened(make()), lifespan(app) as state:
            yield state

    return spanning


@asynccontextmanager
async def opened(pool: OffloadPool) -> AsyncIterator[None]:
    # The functions are known by now: their imports shall not be the first requests' business.
    pool.open(preload=_pools.expected())
    try:
        _pools.prefer(pool)
        await pool.ready()
        yield
    finally:
        await pool.aclose()


def _log(status: int, error: Exception) -> None:
    record = current_request.get()
    logger.warning("%s was answered %d: %s", "a request" if record is None else record.label, status, error)


async def _answer_full(request: object, error: Exception) -> ProblemAnswer:
    _log(503, error)
    seconds = error.retry_after if isinstance(error, OffloadQueueFull) else 1.0
    retry_after = str(max(1, math.ceil(min(seconds, 3600.0)))).encode()
    return ProblemAnswer(503, "The service is busy.", headers=[(b"retry-after", retry_after)])


async def _answer_late(request: object, error: Exception) -> ProblemAnswer:
    _log(504, error)
    return ProblemAnswer(504, "The service did not answer in time.")


ANSWERS: dict[type[Exception], Callable[[Any, Exception], Any]] = {
    OffloadQueueFull: _answer_full,
    OffloadTimeout: _answer_late,
}
"""How requests are answered that one of these exceptions came out of."""
