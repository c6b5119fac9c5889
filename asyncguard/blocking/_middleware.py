"""The ASGI side of blocking detection: whose request it is, and when to watch."""

from __future__ import annotations

import os
from asyncio import _get_running_loop
from collections.abc import Callable, Coroutine
from sys import getrefcount
from types import CoroutineType
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import _clock
from asyncguard._request import ALONE, SCOPE_KEY, RequestRecord, current_request
from asyncguard.blocking._monitor import LoopMonitor
from asyncguard.blocking._steps import DONE, begin, drive
from asyncguard.blocking._watch import LoopWatch
from asyncguard.events import BlockReport, BusyReport, HangReport

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
        threshold: The shortest stall to report, in seconds; this and all others as for `LoopMonitor`.
        busy_threshold: For how many seconds a request may hold the loop in small pieces.
        hang_after: After how many seconds a stall that goes on is logged.
        on_hang: ``"log"``, ``"abort"``, or a function that is called with the `HangReport`.
        on_block: Called with each `BlockReport`. Its exceptions never reach a request.
        on_busy: Called with each `BusyReport`, in the same way.
        project_root: The directory whose files are yours.
        log: Whether to log to ``asyncguard.blocking``.

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
        busy_threshold: float | None = 1.0,
        hang_after: float | None = 10.0,
        on_hang: Literal["log", "abort"] | Callable[[HangReport], object] = "log",
        on_block: Callable[[BlockReport], object] | None = None,
        on_busy: Callable[[BusyReport], object] | None = None,
        project_root: str | os.PathLike[str] | None = None,
        log: bool = True,
    ) -> None:
        if not callable(app):
            raise TypeError(f"BlockingMiddleware takes an ASGI application, not {app!r}")
        self.app: ASGIApp = app
        self._watch: LoopWatch | None = None
        self.monitor: LoopMonitor = LoopMonitor(
            threshold=threshold,
            busy_threshold=busy_threshold,
            hang_after=hang_after,
            on_hang=on_hang,
            on_block=on_block,
            on_busy=on_busy,
            project_root=project_root,
            log=log,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or SCOPE_KEY in scope:
            await self._pass_on(scope, receive, send)
            return
        watch, loop = self._watch, _get_running_loop()
        if watch is None or loop is None or watch.loop() is not loop:
            watch = self._watch = self.monitor._watch()
        if watch.resting:
            watch.probe.end_rest()
        record = RequestRecord(scope, _clock.monotonic(), receive)
        scope[SCOPE_KEY] = record
        token = current_request.set(record)
        watch.in_flight.add(record)
        try:
            running = self.app(scope, receive, send)
            if type(running) is CoroutineType or isinstance(running, Coroutine):
                record.coroutine = running
                # The first turn, which is most often the only one.
                steps = running.__await__()
                outer, watch.turn = watch.turn, record
                if watch.aftermath is not None:
                    watch.note_turn(record)
                try:
                    awaited = next(steps, DONE)
                finally:
                    watch.end_turn(record, outer)
                if awaited is not DONE:
                    await drive(steps, awaited, record, watch)
            else:
                await running
        finally:
            watch.in_flight.discard(record)
            if watch.busy:
                watch.end_busy(record)
            # The scope holds the record and the record the scope, until here.
            scope.pop(SCOPE_KEY, None)
            # The server may close us in another context than it began us in.
            try:  # noqa: SIM105 - an object less for each request
                current_request.reset(token)
            except ValueError:
                pass
            # What it has left behind may ask for it: a task, or a timer such as the server's own.
            if record.at_end is not None or getrefcount(record) > ALONE:
                record.finish()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._watch_lifespan(scope, receive, send)
            return
        record = scope.get(SCOPE_KEY)
        if record is None:
            await self.app(scope, receive, send)
            return
        watch = self.monitor._watch()
        if record in watch.in_flight:
            await self.app(scope, receive, send)
        else:
            await self._join(record, watch, scope, receive, send)

    async def _join(
        self, record: RequestRecord, watch: LoopWatch, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Watch a request that has a record already: a guard of another kind is further out."""
        watch.in_flight.add(record)
        try:
            running: Any = self.app(scope, receive, send)
            record.coroutine = running
            await begin(running.__await__(), record, watch)
        finally:
            record.coroutine = None
            watch.in_flight.discard(record)
            watch.end_busy(record)

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
