"""Noticing that the client has left while the application is busy with something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import copy_context

import anyio
from starlette.types import Message, Receive

from asyncguard.timeouts._loops import Loop

__all__ = ["Listener"]


class Listener:
    """Receives ahead of the application: one piece of the body and no more, and what comes after the last.

    What the application has not asked for stays with the server, which stops reading then: a big upload costs
    no memory. While a piece of it waits for the application, the client's leaving is not noticed.

    Args:
        loop: The loop of the request.
        receive: What the server gave for receiving.
        on_leave: Called once when the client has left.
    """

    def __init__(self, loop: Loop, receive: Receive, on_leave: Callable[[], None]) -> None:
        self._loop = loop
        self._receive = receive
        self._on_leave = on_leave
        self._messages: deque[Message] = deque()
        self._failure: Exception | None = None
        self._came = anyio.Event()
        self._taken = anyio.Event()
        self._task = loop.spawn(self._listen, copy_context())

    async def receive(self) -> Message:
        """What the application receives by."""
        while not self._messages:
            if self._failure is not None:
                raise self._failure
            if self._came.is_set():  # others may be waiting for it
                self._came = anyio.Event()
            await self._came.wait()
        message = self._messages[0]
        if message["type"] != "http.disconnect":  # it is the last one, and stays
            self._messages.popleft()
            self._taken.set()
        return message

    def cancel(self) -> None:
        """Stop listening."""
        self._task.cancel()
        self._on_leave = _nothing  # it leads to whom this belongs to

    def _leave(self) -> None:
        self._on_leave()

    async def _listen(self) -> None:
        is_last = False
        try:
            while True:
                message = await self._receive()
                self._taken = anyio.Event()
                self._messages.append(message)
                self._came.set()
                if message["type"] == "http.disconnect":
                    # A task that begins at once is still inside who started it: that cannot be cancelled now.
                    self._loop.call_later(0, self._leave)
                    return
                if is_last or message.get("more_body", False):
                    await self._taken.wait()
                is_last = not message.get("more_body", False)
        except Exception as error:
            self._failure = error
            self._came.set()


def _nothing() -> None: ...
