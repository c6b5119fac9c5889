"""The ASGI side of blocking detection: whose request it is, and when to watch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Coroutine

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import _clock
from asyncguard._request import SCOPE_KEY, RequestRecord, current_request
from asyncguard.blocking._monitor import LoopMonitor
from asyncguard.blocking._steps import drive
from asyncguard.events import BlockReport

__all__ = ["BlockingMiddleware"]


class BlockingMiddleware:
    """Reports each line that blocks the event loop, with the request that ran it.

    Watches the loop from the application's start-up to its shutdown, or, where the server runs no
    lifespan, from the first request until the loop is closed. Nothing about requests or responses is
    changed.

    Where another `BlockingMiddleware` is further out, both get their reports, and the loop and the
    request are watched once.

    Args:
        app: The ASGI application to guard.
        threshold: The shortest stall to report, in seconds; at least 0.005.
        on_block: Called with each `BlockReport`, on a thread of its own, soon after the stall. Its
            exceptions are logged once and never reach a request.
        project_root: The directory whose files are yours. By default, everything that is neither in
            the standard library nor in a ``site-packages`` folder.
        log: Whether to log to ``asyncguard.blocking``: each line's first stall at once, then at most
            one record a minute.

    Attributes:
        monitor: The `LoopMonitor` that does the watching.

    Raises:
        TypeError: If an option is of the wrong type, or `app` is no ASGI application.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        threshold: float = 0.1,
        on_block: Callable[[BlockReport], object] | None = None,
        project_root: str | os.PathLike[str] | None = None,
        log: bool = True,
    ) -> None:
        if not callable(app):
            raise TypeError(f"BlockingMiddleware takes an ASGI application, not {app!r}")
        self.app: ASGIApp = app
        self.monitor: LoopMonitor = LoopMonitor(
            threshold=threshold, on_block=on_block, project_root=project_root, log=log
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._watch_lifespan(scope, receive, send)
        elif SCOPE_KEY in scope:
            self.monitor._watch()
            await self.app(scope, receive, send)
        elif scope["type"] in ("http", "websocket"):
            await self._watch_request(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _watch_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_after_reports(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                watch.starting_until = _clock.monotonic()
            else:
                # Servers end the loop as soon as they have this message.
                await self.monitor.stop()
            await send(message)

        watch = self.monitor._watch()
        watch.starting_until = float("inf")
        try:
            await self.app(scope, receive, send_after_reports)
        finally:
            watch.starting_until = float("-inf")
            self.monitor._leave(watch)

    async def _watch_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = self.monitor._watch()
        record = RequestRecord(scope, _clock.monotonic())
        scope[SCOPE_KEY] = record
        token = current_request.set(record)
        watch.in_flight.add(record)
        try:
            running = self.app(scope, receive, send)
            if isinstance(running, Coroutine):
                record.coroutine = running
                await drive(running, record, watch)
            else:
                await running
        finally:
            watch.in_flight.discard(record)
            record.finish()
            scope.pop(SCOPE_KEY, None)
            # The server may close us in another context than it began us in.
            with contextlib.suppress(ValueError):
                current_request.reset(token)
