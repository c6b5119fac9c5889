"""The application that ``asyncguard run`` has uvicorn serve, in every worker process.

A worker may be started anew (``--workers``, ``--reload``), so what it needs travels in an environment
variable.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from types import FrameType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import _console
from asyncguard._loading import load_app
from asyncguard.blocking import BlockingMiddleware
from asyncguard.events import BlockReport, InFlight

__all__ = ["Settings", "create"]

_VARIABLE = "ASYNCGUARD_RUN"
_Handler = Callable[[int, FrameType | None], object]


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``asyncguard run`` was asked to serve, and how to guard it."""

    target: str
    factory: bool
    threshold: float
    project_root: str | None

    def publish(self) -> None:
        """Leave them to this process and those it starts."""
        os.environ[_VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def published(cls) -> Settings:
        """Read what `publish` left."""
        return cls(**json.loads(os.environ[_VARIABLE]))


def create() -> ASGIApp:
    """Make the guarded application; uvicorn calls this in each worker."""
    settings = Settings.published()
    return _Served(load_app(settings.target, factory=settings.factory), settings)


class _Served:
    """The guarded application, with its reports on standard error."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._guarded = BlockingMiddleware(
            app,
            threshold=settings.threshold,
            project_root=settings.project_root,
            on_block=_show,
            on_busy=lambda report: _write(_console.busy(report)),
            on_hang=lambda report: _write(_console.hang(report)),
            log=False,
        )
        self._in_flight: tuple[InFlight, ...] = ()
        self._closed = False
        # For applications without a lifespan. At the end of worker processes `atexit` does not run.
        Finalize(self, self._close, exitpriority=0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._guarded(scope, receive, send)
            return

        async def send_after_closing(message: Message) -> None:
            # uvicorn ends the process right after this, by the signal that it was ended by.
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                self._close()
            await send(message)

        self._notice_shutdown()
        await self._guarded(scope, receive, send_after_closing)

    def _notice_shutdown(self) -> None:
        """See what is in flight when the signal to stop comes: uvicorn cancels it before the end."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, self._chained(before))

    def _chained(self, before: _Handler) -> _Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                if not self._in_flight:
                    self._in_flight = self._guarded.monitor.in_flight
            except Exception:
                _write("asyncguard: what was in flight could not be seen\n")
            finally:
                before(number, frame)

        return handle

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            _write(_console.closing(self._guarded.monitor.lines, self._in_flight))


def _show(report: BlockReport) -> None:
    if report.starting and report.line is None:
        return  # it blocked nobody, and there is nothing to be done about it
    _write(_console.stall(report))


def _write(text: str) -> None:
    # One write, so that workers do not mix their lines.
    sys.stderr.write("\n" + text)
    sys.stderr.flush()
