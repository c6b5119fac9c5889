"""An answer on its way to the client, while the handler that should have given one still runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import Context

import anyio
from starlette.types import ASGIApp, Message, Scope, Send

from asyncguard.timeouts._loops import Loop

__all__ = ["Delivery"]

logger = logging.getLogger("asyncguard.timeouts")


class Delivery:
    """Sends an answer, in a task of its own.

    Args:
        answer: The ASGI application that gives it.
        fallback: What gives it if that one fails or ends before it has sent anything.
        scope: The scope of the request.
        send: What it is sent by.
        loop: The loop of the request.
        context: The context to send it in: middlewares may look for what they have put there.

    Attributes:
        begun: Whether any of it has been sent.
        over: Whether it has been sent, or given up.
    """

    def __init__(
        self, answer: ASGIApp, fallback: ASGIApp, scope: Scope, send: Send, loop: Loop, context: Context
    ) -> None:
        self.begun: bool = False
        self._answer = answer
        self._fallback = fallback
        self._scope = scope
        self._send = send
        self.over: bool = False
        self._has_asked = False
        self._when_over: Callable[[], object] | None = None
        self._task = loop.spawn(self._deliver, context)

    def cancel(self) -> None:
        """Stop sending."""
        self._task.cancel()

    async def wait(self, seconds: float) -> None:
        """Wait until it is over, but no longer than so many seconds; it is stopped then."""
        if not self.over:
            over = anyio.Event()
            self._when_over = over.set
            try:
                with anyio.move_on_after(seconds):
                    await over.wait()
            finally:
                self.cancel()

    async def _deliver(self) -> None:
        try:
            try:
                await self._answer(self._scope, self._receive, self._send_on)
            except Exception:
                logger.exception("the answer to a request that ran out of time failed: %r", self._answer)
            if not self.begun:
                await self._fallback(self._scope, self._receive, self._send_on)
        except Exception:
            logger.exception("a request that ran out of time could not be answered")
        finally:
            self.over = True
            if self._when_over is not None:
                self._when_over()

    async def _receive(self) -> Message:
        """What the answer receives by: an empty body, and then nothing."""
        if self._has_asked:
            await anyio.sleep_forever()
        self._has_asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send_on(self, message: Message) -> None:
        self.begun = True
        if message["type"] == "http.response.start":
            # The answer may be the same object each time, and middlewares add to what they pass on.
            message = {**message, "headers": list(message.get("headers", ()))}
        await self._send(message)
