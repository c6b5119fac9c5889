"""One run of an application's lifespan, in a task of its own as servers have it, and within limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import anyio
from starlette.types import ASGIApp, Message

from asyncguard._frames import await_chain
from asyncguard._source import is_user_code, source_line
from asyncguard._tasks import outwait, start

__all__ = ["Lifespan"]

Phase = Literal["startup", "shutdown"]

_GRACE = 5.0
"""For how many seconds a lifespan that was cancelled is waited for."""


class Lifespan:
    """From the start of an application to its end.

    It may be started in one task and stopped in another, as fixtures do.

    Args:
        app: The application.
        start_timeout: In how many seconds it has to have started.
        close_timeout: In how many seconds it has to have ended.

    Attributes:
        state: What the application put there for its requests.
        is_running: Whether it has started, and is not being stopped.
    """

    def __init__(self, app: ASGIApp, start_timeout: float, close_timeout: float) -> None:
        self.state: dict[str, Any] = {}
        self.is_running: bool = False
        self._app = app
        self._limits: dict[Phase, float] = {"startup": start_timeout, "shutdown": close_timeout}
        self._phases: Iterator[Phase] = iter(("startup", "shutdown"))
        self._closing = anyio.Event()
        self._started = anyio.Event()
        self._ended = anyio.Event()
        self._completed: set[str] = set()
        self._failure = ""
        self._error: BaseException | None = None
        self._called_off = False
        self._coroutine: Any = None

    async def start(self) -> None:
        """Start the application.

        Raises:
            TimeoutError: If it did not start in time.
            Exception: What its lifespan raised.
        """
        self._cancel = start(self._run, self._on_end, name="asyncguard-lifespan")
        try:
            with anyio.move_on_after(self._limits["startup"]):
                await self._started.wait()
        except BaseException:
            await self._abort()
            raise
        await self._check("startup", self._started)
        if "startup" not in self._completed:
            raise RuntimeError(self._failure or f"{self._app!r} ended its lifespan before it had started")
        self.is_running = True

    async def stop(self) -> None:
        """End the application, even if the calling task has been cancelled.

        Raises:
            TimeoutError: If it did not end in time.
            Exception: What its lifespan raised.
        """
        self.is_running = False
        self._closing.set()
        cancelled = await outwait(self._ended, self._limits["shutdown"])
        await self._check("shutdown", self._ended)
        if self._failure:
            raise RuntimeError(self._failure)
        if cancelled is not None:
            raise cancelled

    async def _check(self, phase: Phase, done: anyio.Event) -> None:
        if not done.is_set():
            place = self._place()
            heeded = "" if await self._abort() else ", and does not heed its cancellation"
            limit = self._limits[phase]
            raise TimeoutError(f"the {phase} of {self._app!r} took longer than {limit:g} s{place}{heeded}")
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # or it would keep itself alive, by way of its traceback and this frame

    async def _abort(self) -> bool:
        """Cancel it, and wait for its end; tells whether that came."""
        self._called_off = True
        self._cancel()
        await outwait(self._ended, _GRACE)
        return self._ended.is_set()

    def _place(self) -> str:
        """The user's line that it awaits."""
        places = [place for place in await_chain(self._coroutine) if is_user_code(place[0].co_filename, None)]
        return f"; it is at {source_line(*places[-1])}" if places else ""

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        self._coroutine = self._app(scope, self._receive, self._send)
        try:
            await self._coroutine
        except anyio.get_cancelled_exc_class() as error:
            if self._called_off:
                raise
            self._error = error
        except BaseException as error:  # whatever it is, it is raised in the test
            self._error = error
        finally:
            self._coroutine = None

    def _on_end(self) -> None:
        self._started.set()
        self._ended.set()

    async def _receive(self) -> Message:
        phase = next(self._phases, None)
        if phase is None:
            await anyio.sleep_forever()
        if phase == "shutdown":
            await self._closing.wait()
        return {"type": f"lifespan.{phase}"}

    async def _send(self, message: Message) -> None:
        _, phase, outcome = message["type"].split(".")
        if outcome == "failed":  # now it raises the reason, or just ends
            self._failure = message.get("message") or f"the {phase} of {self._app!r} failed"
            return
        self._completed.add(phase)
        if phase == "startup":
            self._started.set()
