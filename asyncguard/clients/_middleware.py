"""The ASGI side of watching what requests build for themselves: whose request it is, and for how long."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from sys import getrefcount

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import _clock
from asyncguard._hooks import Hook
from asyncguard._options import checked_directory, checked_flag, checked_hook
from asyncguard._reporter import FLUSH_TIMEOUT, Reporter, until_set
from asyncguard._request import ALONE, SCOPE_KEY, RequestRecord, current_request
from asyncguard.clients import _constructors
from asyncguard.clients._rebuilt import Lines
from asyncguard.clients._rebuilt_report import Rebuilding, compose
from asyncguard.events import ClientReport

__all__ = ["WatchClients"]

logger = logging.getLogger("asyncguard.clients")

_reporter = Reporter("asyncguard-clients", logger)


class WatchClients:
    """Reports each line that builds a client for a request and throws it away, again and again.

    That is an HTTP client, a connection pool or a database engine: of httpx, httpx2, aiohttp, requests,
    redis, asyncpg, psycopg and SQLAlchemy, where they are imported. While an application is served, the
    constructors of their classes are wrapped. What is built outside requests is not looked at, and what
    outlives its request is not reported.

    Where another `WatchClients` is further out, that one reports.

    Args:
        app: The ASGI application to watch.
        on_client: Called with each `ClientReport`, on a thread of its own.
        project_root: The directory whose files are yours.
        log: Whether to log to ``asyncguard.clients``.

    Raises:
        TypeError: If an option is of the wrong type, or `app` is no ASGI application.
        ValueError: If `project_root` is no directory.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_client: Callable[[ClientReport], object] | None = None,
        project_root: str | os.PathLike[str] | None = None,
        log: bool = True,
    ) -> None:
        if not callable(app):
            raise TypeError(f"WatchClients takes an ASGI application, not {app!r}")
        checked_hook("on_client", on_client)
        self.app: ASGIApp = app
        self._hook = Hook("on_client", on_client, logger) if on_client is not None else None
        self._project_root = checked_directory("project_root", project_root)
        self._log = checked_flag("log", log)
        self._lines = Lines(self._project_root, self._tell)
        self._hold: _constructors.Hold | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope.get(SCOPE_KEY)
        if record is not None:
            self._watch(record)
            await self.app(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._watch_lifespan(scope, receive, send)
        elif scope["type"] in ("http", "websocket"):
            await self._begin(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _watch(self, record: RequestRecord) -> None:
        if self._hold is None:
            self._hold = _constructors.Hold()
        elif _constructors.modules_seen != len(sys.modules):
            _constructors.look()
        if record.builds is None:
            record.builds = self._lines

    async def _begin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that no other guard has made a record of."""
        record = scope[SCOPE_KEY] = RequestRecord(scope, _clock.monotonic(), receive)
        token = current_request.set(record)
        try:
            self._watch(record)
            await self.app(scope, receive, send)
        finally:
            scope.pop(SCOPE_KEY, None)
            # The server may close us in another context than it began us in.
            try:  # noqa: SIM105 - an object less for each request
                current_request.reset(token)
            except ValueError:
                pass
            # What it has left behind may ask for it: a task, or a timer such as the server's own.
            if record.at_end is not None or getrefcount(record) > ALONE:
                record.finish()

    async def _watch_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_after_reports(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                # Servers end the process as soon as they have this message.
                await until_set(_reporter.flush())
            await send(message)

        hold = _constructors.Hold()
        try:
            await self.app(scope, receive, send_after_reports)
        finally:
            hold.release()
            self._hold = None

    def _tell(self, rebuilding: Rebuilding) -> None:
        """Log it, and hand it to the hook, on another thread."""
        try:
            _reporter.put(partial(self._report, rebuilding))
        except RuntimeError:
            logger.exception("no thread to be had for the report of %s", rebuilding.record.label)

    def _report(self, rebuilding: Rebuilding) -> None:
        report = compose(rebuilding, self._project_root)
        if self._log:
            logger.warning("%s", report, extra={"asyncguard_report": report})
        if self._hook is not None:
            self._hook(report)


def _flush_at_exit() -> None:
    _reporter.at_exit = True
    _reporter.flush().wait(FLUSH_TIMEOUT)


def _forget_reporter() -> None:
    """In a forked child: the thread stayed in the parent, and its lock may be held there."""
    global _reporter
    _reporter = Reporter("asyncguard-clients", logger)


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_reporter)
