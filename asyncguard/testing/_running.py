"""What tests call: `running`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from types import TracebackType

from anyio.from_thread import start_blocking_portal
from starlette.types import ASGIApp

from asyncguard._asgi import checked_app
from asyncguard._options import checked_seconds
from asyncguard.testing._lifespan import Lifespan
from asyncguard.testing._loops import Loop
from asyncguard.testing._served import ServedApp

__all__ = ["running"]


def running(
    app: ASGIApp, *, start_timeout: float | None = 30.0, close_timeout: float | None = 30.0
) -> Running:
    """Run an application for as long as a block is open: ``async with`` or ``with``.

    In the block its lifespan has been entered: shared clients are open, and its state is there. What its
    lifespan raises is raised where the block begins or ends.

    ``async with`` runs it on the test's own event loop. ``with`` runs it on an event loop of asyncio's in a
    thread of its own, where tests reach it from any loop and from none: with Starlette's TestClient and, by
    a fixture of a wider scope, from many tests.

    Args:
        app: The ASGI application.
        start_timeout: In how many seconds it has to have started; `None` for any time.
        close_timeout: In how many seconds it has to have ended; `None` for any time.

    Returns:
        What to open. It gives a `ServedApp`.

    Raises:
        TypeError: If `app` is no ASGI application.
        ValueError: If a limit is out of range.
        TimeoutError: If it did not start or end in time; from the block.
    """
    checked_app(app, called_by="running()")
    return Running(app, _limit("start_timeout", start_timeout), _limit("close_timeout", close_timeout))


def _limit(option: str, seconds: float | None) -> float:
    return math.inf if seconds is None else checked_seconds(option, seconds)


class Running:
    """A block in which an application runs; of both kinds."""

    def __init__(self, app: ASGIApp, start_timeout: float, close_timeout: float) -> None:
        self._app = app
        self._limits = start_timeout, close_timeout
        self._block: AbstractContextManager[ServedApp] | None = None
        self._async_block: AbstractAsyncContextManager[ServedApp] | None = None

    def __enter__(self) -> ServedApp:
        self._block = self._in_a_thread()
        return self._block.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._block is not None
        return self._block.__exit__(kind, error, trace)

    async def __aenter__(self) -> ServedApp:
        self._async_block = self._here(None)
        return await self._async_block.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._async_block is not None
        return await self._async_block.__aexit__(kind, error, trace)

    @contextmanager
    def _in_a_thread(self) -> Iterator[ServedApp]:
        with start_blocking_portal() as portal:
            opened = portal.wrap_async_context_manager
            with opened(Loop.opened()) as home, opened(self._here(home)) as served:
                yield served

    @asynccontextmanager
    async def _here(self, home: Loop | None) -> AsyncIterator[ServedApp]:
        lifespan = Lifespan(self._app, *self._limits)
        await lifespan.start()
        try:
            yield ServedApp(self._app, lifespan, home)
        except BaseException as failure:
            # The test has failed already: that comes first.
            try:
                await lifespan.stop()
            except BaseException as error:
                failure.add_note(f"Then the application did not end well: {error!r}")
            raise
        await lifespan.stop()
