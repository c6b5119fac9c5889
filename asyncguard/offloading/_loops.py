"""What the pool needs of an event loop: a timer, to be told of a socket, and a result to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, Protocol

from asyncguard import _tasks

__all__ = ["AsyncioLoop", "Channel", "Loop", "Outcome", "Revocable", "running_loop"]


class Revocable(Protocol):
    """Something to come that can be called off."""

    def cancel(self) -> object:
        """Call it off; nothing happens if it is over."""


class Outcome(Awaitable[Any], Protocol):
    """A result to come, for one to wait for. Who waits may be cancelled: it is done then."""

    def done(self) -> bool:
        """Whether it is there, or nobody waits any more."""

    def set_result(self, result: Any, /) -> None:
        """Wake who waits."""

    def set_exception(self, error: BaseException, /) -> None:
        """Raise it where somebody waits."""


class Channel(Protocol):
    """What a loop can watch: a socket, or whatever else has a descriptor."""

    def fileno(self) -> int:
        """Its descriptor; -1 if it is closed."""

    def close(self) -> object:
        """Close it."""


class Loop(Protocol):
    """An event loop. It calls in an empty context: a pool outlives the request that opened it."""

    def is_here(self) -> bool:
        """Whether the calling thread runs the loop."""

    def outcome(self) -> Outcome:
        """A result to come."""

    def call_later(self, delay: float, call: Callable[[], None]) -> Revocable:
        """Call `call` after `delay` seconds."""

    def add_reader(self, channel: Channel, call: Callable[[], None]) -> None:
        """Call `call` whenever something has come in."""

    def add_writer(self, channel: Channel, call: Callable[[], None]) -> None:
        """Call `call` whenever something can be sent."""

    def remove_writer(self, channel: Channel) -> None:
        """Do so no more."""

    def close(self, channel: Channel) -> None:
        """Close what may be watched."""


class AsyncioLoop:
    """A loop of asyncio's kind."""

    __slots__ = ("_loop", "outcome")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.outcome = loop.create_future

    def is_here(self) -> bool:
        return asyncio._get_running_loop() is self._loop

    def call_later(self, delay: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(delay, call, context=Context())

    def add_reader(self, channel: Channel, call: Callable[[], None]) -> None:
        # By the number: uvloop keeps a socket open until it has got round to letting go of it.
        Context().run(self._loop.add_reader, channel.fileno(), call)

    def add_writer(self, channel: Channel, call: Callable[[], None]) -> None:
        Context().run(self._loop.add_writer, channel.fileno(), call)

    def remove_writer(self, channel: Channel) -> None:
        self._loop.remove_writer(channel.fileno())

    def close(self, channel: Channel) -> None:
        if not self._loop.is_closed() and (number := channel.fileno()) >= 0:
            self._loop.remove_reader(number)
            self._loop.remove_writer(number)
        channel.close()


def running_loop() -> Loop:
    """The loop that runs in this thread.

    Raises:
        RuntimeError: If none does.
    """
    loop = asyncio._get_running_loop()
    if loop is not None:
        return AsyncioLoop(loop)
    running_trio()
    from asyncguard.offloading._trio import TrioLoop

    return TrioLoop()


def running_trio() -> Any:
    """Trio, which is optional, and which this thread is in.

    Raises:
        RuntimeError: If it is not.
    """
    try:
        return _tasks.running_trio()
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}: await the call in a coroutine; in a `def` endpoint, use "
            "`anyio.from_thread.run(function, ...)`; or call `.inline(...)` here and now"
        ) from None
