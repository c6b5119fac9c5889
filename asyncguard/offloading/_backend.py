"""Where the calls of a pool run: what a pool asks of that, and gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

from asyncguard.offloading._address import Address
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._tally import Tally

__all__ = ["Backend", "Census", "Limits", "StartMethod"]

StartMethod = Literal["forkserver", "spawn"]
"""How worker processes are started: see `OffloadPool`."""


class Limits(Protocol):
    """The options of a pool.

    Attributes:
        workers: How many processes there may be.
        max_queue: How many calls may wait for one.
        start_method: How they are started.
        max_calls: After how many calls a worker is replaced; `None` for never.
        max_rss: From how many bytes of memory on; `None` for never.
        nice: The niceness of the workers.
        grace: How many seconds a function has to end after it was interrupted.
    """

    workers: int
    max_queue: int
    start_method: StartMethod
    max_calls: int | None
    max_rss: int | None
    nice: int
    grace: float


class Census(NamedTuple):
    """How many there are now.

    Attributes:
        workers: Processes, those that start included.
        idle: Those that wait for a call.
        running: Those that run one.
        queued: Calls that wait for a worker.
    """

    workers: int = 0
    idle: int = 0
    running: int = 0
    queued: int = 0


class Backend(Protocol):
    """Where calls run. It belongs to one pool, and is opened, used and closed on the thread of one loop."""

    def open(self, limits: Limits, tally: Tally, *, warm: bool, preload: Iterable[str]) -> None:
        """Begin to take calls, on the running loop; it may be closed and opened again.

        Args:
            limits: The options of the pool.
            tally: Where it is counted what happens.
            warm: Whether to get ready now, not when the first call comes.
            preload: The modules of functions that will be called.
        """

    async def ready(self) -> None:
        """Wait until it is ready, but not for ever. What keeps it from that is for the calls to tell."""

    async def run(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
        seconds: float | None,
        began: float,
    ) -> Any:
        """Run one call; returns what the function returns.

        Args:
            address: Where the function is found.
            function: The function.
            args: Its arguments.
            kwargs: Its keyword arguments.
            options: How it is to be run, but for its timeout.
            seconds: In how many seconds it has to end; `None` for any time.
            began: When those began, by `_clock.monotonic`.

        Raises:
            OffloadError: If there is no result, though the function did not raise.
        """

    def census(self) -> Census:
        """How many there are now."""

    async def aclose(self) -> None:
        """Take no more calls, end those that run, and return when nothing is left."""

    def abandon(self) -> None:
        """The loop was closed before the pool was: end all that runs without it."""

    def disown(self) -> None:
        """In a forked child: let go of what was inherited, and leave the parent's workers alone."""
