"""Things to share that note what happens to them, and do it as badly as a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from asyncguard import Shared, shared

__all__ = ["Journal", "Thing", "stubborn"]


class Thing:
    """What is shared."""

    def __init__(self, name: str, *inputs: Any) -> None:
        self.name = name
        self.inputs = inputs
        self.is_open = False

    def __repr__(self) -> str:
        return f"Thing({self.name!r})"


class Journal(list[str]):
    """What happens to the things of one test, in order.

    Attributes:
        made: All of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Thing] = []

    def thing(
        self,
        name: str,
        *inputs: Any,
        start: Callable[[], Awaitable[object]] | None = None,
        stop: Callable[[], Awaitable[object]] | None = None,
        **options: Any,
    ) -> Shared[Thing]:
        """Declare one.

        Args:
            name: Its name.
            *inputs: What its factory is called with.
            start: Awaited while it is being opened.
            stop: Awaited while it is being closed.
            **options: For `shared`.
        """

        @asynccontextmanager
        async def live(*inputs: Any) -> AsyncIterator[Thing]:
            self.append(f"+{name}")
            if start is not None:
                await start()
            thing = Thing(name, *inputs)
            self.made.append(thing)
            thing.is_open = True
            try:
                yield thing
            finally:
                self.append(f"-{name}")
                thing.is_open = False
                if stop is not None:
                    await stop()

        return shared(live, *inputs, name=name, **options)


async def stubborn(release: anyio.Event) -> None:
    """Take no notice of being cancelled, on asyncio and trio alike."""
    while not release.is_set():
        try:
            with anyio.CancelScope(shield=True):
                await release.wait()
        except anyio.get_cancelled_exc_class():
            pass
