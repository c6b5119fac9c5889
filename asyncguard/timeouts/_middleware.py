"""The middleware of request timeouts, and the layer that `install` puts at the router."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from sys import getrefcount

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import _clock
from asyncguard._asgi import ProblemAnswer
from asyncguard._hooks import Hook
from asyncguard._options import (
    checked_answer,
    checked_directory,
    checked_error_status,
    checked_flag,
    checked_hook,
    checked_seconds,
)
from asyncguard._reporter import FLUSH_TIMEOUT, Reporter, until_set
from asyncguard._request import ALONE, SCOPE_KEY, RequestRecord, current_request
from asyncguard.events import TimeoutReport
from asyncguard.timeouts import _limit
from asyncguard.timeouts._header import caller_seconds, checked_header
from asyncguard.timeouts._lookout import Lookout
from asyncguard.timeouts._loops import running_loop
from asyncguard.timeouts._report import Timeout, compose
from asyncguard.timeouts._responder import Responder

__all__ = ["InnerLayer", "TimeoutMiddleware"]

logger = logging.getLogger("asyncguard.timeouts")

_reporter = Reporter("asyncguard-timeouts", logger)


class TimeoutMiddleware:
    """Answers every request by its deadline, whatever its handler does.

    Three clocks, each of which may be off: until the response begins, between two pieces of a response, and
    between two pieces of the client's body. At the deadline the client is answered at once, or cut off if a
    response has begun; then the handler is cancelled, once, so that it can clean up. Nothing counts any more
    once the response is complete: background tasks live.

    `asyncguard.install` puts it around everything, and a second layer at the router, which answers through
    the application's own middlewares. Added with ``add_middleware`` it is a single layer: only the
    middlewares outside it see its answers. One of those that is a ``BaseHTTPMiddleware`` makes a response
    that was cut off look complete, and one inside it cuts off what a cancelled handler awaits to clean up.

    Where another `TimeoutMiddleware` is further out, that one keeps the clocks and gives the answers, and
    this one sets its `timeout`.

    Args:
        app: The ASGI application to guard.
        timeout: In how many seconds the response has to begin. `None` for any time; so with the next two.
        idle_timeout: For how many seconds a response that has begun may be silent. Server-sent events may be
            for ever.
        body_timeout: For how many seconds the client may be silent while the application waits for its body.
            Who sends less than 500 bytes a second counts as partly silent.
        grace: After how many seconds what was cancelled and still runs is cancelled again.
        status_code: The status of the answer.
        answer: An ASGI application, such as a Starlette `Response`, that answers instead.
        deadline_header: The name of a header in which callers say for how many seconds they will wait. It
            never makes a limit longer. Shared HTTP clients tell the services that they call what is left.
        cancel_on_disconnect: Whether to cancel the handler when its client leaves.
        on_timeout: Called with each `TimeoutReport`, on a thread of its own.
        project_root: The directory whose files are yours.
        log: Whether to log to ``asyncguard.timeouts``.

    Raises:
        TypeError: If an option is of the wrong type, or `app` is no ASGI application.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        timeout: float | None = 30.0,
        idle_timeout: float | None = 60.0,
        body_timeout: float | None = 30.0,
        grace: float = 5.0,
        status_code: int = 504,
        answer: ASGIApp | None = None,
        deadline_header: str | None = None,
        cancel_on_disconnect: bool = False,
        on_timeout: Callable[[TimeoutReport], object] | None = None,
        project_root: str | os.PathLike[str] | None = None,
        log: bool = True,
    ) -> None:
        if not callable(app):
            raise TypeError(f"TimeoutMiddleware takes an ASGI application, not {app!r}")
        checked_answer("answer", answer)
        checked_hook("on_timeout", on_timeout)
        self.app: ASGIApp = app
        self.timeout: float = _seconds("timeout", timeout)
        self.idle_timeout: float = _seconds("idle_timeout", idle_timeout)
        self.body_timeout: float = _seconds("body_timeout", body_timeout)
        self.grace: float = checked_seconds("grace", grace)
        self.plain_answer: ASGIApp = ProblemAnswer(
            checked_error_status("status_code", status_code), "The service did not answer in time."
        )
        self.answer: ASGIApp = self.plain_answer if answer is None else answer
        self.cancel_on_disconnect: bool = checked_flag("cancel_on_disconnect", cancel_on_disconnect)
        self.has_inner_layer: bool = False
        self.deadline_header: str | None = deadline_header
        self._deadline_header = checked_header("deadline_header", deadline_header)
        self._hook = Hook("on_timeout", on_timeout, logger) if on_timeout is not None else None
        self._project_root = checked_directory("project_root", project_root)
        self._log = checked_flag("log", log)
        self._shortest = min(self.timeout, self.idle_timeout, self.body_timeout)
        self._here = _Here()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._pass_on(scope, receive, send)
            return
        now, record, token = _clock.monotonic(), scope.get(SCOPE_KEY), None
        if record is None:
            record = scope[SCOPE_KEY] = RequestRecord(scope, now, receive)
            token = current_request.set(record)
        elif record.deadline is not None:
            record.deadline.retune(self.timeout)
            await self.app(scope, receive, send)
            return
        try:
            lookout = self._here.lookout
            if lookout is None or lookout.seconds > _limit.shortest or not lookout.loop.is_here():
                lookout = self._here.lookout = Lookout(running_loop(), min(self._shortest, _limit.shortest))
            caller = caller_seconds(scope, self._deadline_header) if self._deadline_header else None
            await Responder(self, lookout, scope, receive, send, record).run(self.app, caller, now)
        finally:
            if token is not None:
                scope.pop(SCOPE_KEY, None)
                # The server may close us in another context than it began us in.
                try:  # noqa: SIM105 - an object less for each request
                    current_request.reset(token)
                except ValueError:
                    pass
                # What it has left behind may ask for it: a task, or a timer such as the server's own.
                if record.at_end is not None or getrefcount(record) > ALONE:
                    record.finish()

    def tell(self, timeout: Timeout) -> None:
        """Log a request that ran out of time, and hand it to the hook, on another thread."""
        try:
            _reporter.put(partial(self._report, timeout))
        except RuntimeError:
            logger.exception("no thread to be had for the report of %s", timeout.record.label)

    def _report(self, timeout: Timeout) -> None:
        report = compose(timeout, self._project_root)
        if self._log:
            logger.warning("%s", report, extra={"asyncguard_report": report})
        if self._hook is not None:
            self._hook(report)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_after_reports(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                self._here.lookout = None
                # Servers end the process as soon as they have this message.
                await until_set(_reporter.flush())
            await send(message)

        await self.app(scope, receive, send_after_reports if scope["type"] == "lifespan" else send)


class InnerLayer:
    """Stands at the router of an application whose outermost layer is a `TimeoutMiddleware`.

    Its answers go out through the application's own middlewares: their headers are on them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app: ASGIApp = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        record = scope.get(SCOPE_KEY) if scope["type"] == "http" else None
        responder = record.deadline if record is not None else None
        if isinstance(responder, Responder):
            return responder.run_inside(self.app, scope, receive, send)
        return self.app(scope, receive, send)


class _Here(threading.local):
    """What belongs to the running loop: each loop runs in a thread of its own."""

    lookout: Lookout | None = None


def _seconds(option: str, value: float | None) -> float:
    return math.inf if value is None else checked_seconds(option, value)


def _flush_at_exit() -> None:
    _reporter.at_exit = True
    _reporter.flush().wait(FLUSH_TIMEOUT)


def _forget_reporter() -> None:
    """In a forked child: the thread stayed in the parent, and its lock may be held there."""
    global _reporter
    _reporter = Reporter("asyncguard-timeouts", logger)


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_reporter)
