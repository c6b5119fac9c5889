"""Which pool a call runs in that names none.

That of the application; else the one that was opened last on this loop; else one is opened for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from asyncguard.offloading._loops import running_trio

if TYPE_CHECKING:
    from asyncguard.offloading._pool import OffloadPool

__all__ = ["add", "current", "expect", "expected", "prefer", "remove"]


class Here:
    """The pools of one loop."""

    def __init__(self) -> None:
        self.open: list[OffloadPool] = []
        self.preferred: list[OffloadPool] = []
        self.keeper: AsyncGenerator[None] | None = None


_of_loops: WeakKeyDictionary[Any, Here] = WeakKeyDictionary()


def current() -> OffloadPool:
    """The pool for a call that names none.

    Raises:
        RuntimeError: If no event loop runs in this thread.
    """
    here = _here()
    if here.preferred:
        return here.preferred[-1]
    return here.open[-1] if here.open else _open_default(here)


def add(pool: OffloadPool) -> None:
    """A pool has been opened on this loop."""
    _here().open.append(pool)


def prefer(pool: OffloadPool) -> None:
    """It is the application's, and comes before those that are opened beside it."""
    _here().preferred.append(pool)


def remove(pool: OffloadPool) -> None:
    """It is closed."""
    for here in _of_loops.values():
        for pools in (here.open, here.preferred):
            if pool in pools:
                pools.remove(pool)


_expected: dict[str, None] = {}


def expect(module: str) -> None:
    """A function of that module may be called."""
    _expected[module] = None


def expected() -> list[str]:
    """The modules of functions that may be called, in the order in which they came up."""
    return [*_expected]


def forget() -> None:
    """In a forked child: none of them is ours."""
    _of_loops.clear()


def _here() -> Here:
    loop: Any = asyncio._get_running_loop()
    if loop is None:
        loop = running_trio().lowlevel.current_trio_token()
    here = _of_loops.get(loop)
    if here is None:
        _sweep()
        here = _of_loops[loop] = Here()
    return here


def _sweep() -> None:
    """Close what loops have left that were closed without a word."""
    for loop, here in [*_of_loops.items()]:
        if isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed():
            for pool in here.open:
                pool.abandon()
            del _of_loops[loop]


def _open_default(here: Here) -> OffloadPool:
    from asyncguard.offloading._pool import OffloadPool

    pool = OffloadPool()
    pool.open(warm=False)
    # Loops close the asynchronous generators that were left open on them before they end; nothing else
    # tells of a loop's end.
    here.keeper = _keep(pool, here)
    step = here.keeper.asend(None)
    with contextlib.suppress(StopIteration):
        step.send(None)
    return pool


async def _keep(pool: OffloadPool, here: Here) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        here.keeper = None  # it knows the loop, which nothing here is to keep alive
        if asyncio._get_running_loop() is not None:
            await pool.aclose()
        else:  # trio has ended its system tasks by now: there is nothing left to close it with
            remove(pool)
            pool.abandon()
