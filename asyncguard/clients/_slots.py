"""The shared resources of each event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from asyncguard._request import current_request
from asyncguard._tasks import current_loop
from asyncguard.errors import SharedNotOpen

if TYPE_CHECKING:
    from asyncguard.clients._instance import Instance
    from asyncguard.clients._shared import Shared
    from asyncguard.clients._slot import Slot

__all__ = ["Home", "close", "find", "home", "open_", "slots"]


class Home:
    """What is open on one loop.

    Attributes:
        loop: What stands for the loop; kept, so that no other one is taken for it.
        slots: Its resources, in the order in which they were opened.
    """

    def __init__(self, loop: object) -> None:
        self.loop = loop
        self.slots: dict[Shared[Any], Slot] = {}

    def live(self, shared: Shared[Any]) -> Instance:
        """The live object of a resource that another one needs.

        Raises:
            SharedNotOpen: If it is not there.
        """
        slot = self.slots.get(shared)
        if slot is None:
            raise SharedNotOpen(f"{shared} is needed by another one, and is not open", shared.name)
        return slot.usable()


_homes: dict[int, Home] = {}
"""By the identity of what stands for the loop."""

_inherited: list[dict[int, Home]] = []
"""What a forked child has of its parent: kept, since to forget a connection may be to end it."""


def home() -> Home:
    """That of the running loop; empty if nothing is open there.

    Raises:
        RuntimeError: If no event loop runs in this thread.
    """
    loop = current_loop()
    if loop is None:
        raise RuntimeError("no event loop runs in this thread")
    return _homes.get(id(loop)) or Home(loop)


async def open_(shared: Shared[Any]) -> Slot:
    """Open a resource on the running loop, for one more.

    Raises:
        SharedStartFailed: If that failed.
    """
    from asyncguard.clients._slot import Slot  # imported by then: see `open_shared`

    while True:
        here = home()
        slot = here.slots.get(shared)
        if slot is None:
            _sweep()
            _homes[id(here.loop)] = here
            slot = here.slots[shared] = Slot(shared, here.loop, here.live)
        if slot.busy is None:
            break
        await slot.busy.wait()  # another lifespan on this loop opens it, or closes it
    try:
        await slot.open()
    finally:
        _forget_if_closed(slot)
    return slot


async def close(slot: Slot) -> asyncio.CancelledError | None:
    """Undo `open_`; it never fails.

    Returns:
        What `outwait` does.
    """
    try:
        return await slot.close()
    finally:
        _forget_if_closed(slot)


def find(shared: Shared[Any]) -> Slot:
    """The slot of a resource, on the loop that this code works for.

    Raises:
        SharedNotOpen: If there is none.
    """
    loop = current_loop()
    if loop is not None:
        here = _homes.get(id(loop))
        slot = here.slots.get(shared) if here is not None else None
        if slot is not None:
            return slot
        raise _missing(shared, "another event loop than this one" if _open(shared) else "")
    return _find_from_thread(shared)


def slots() -> Iterator[Slot]:
    """Those of all loops."""
    for here in [*_homes.values()]:
        yield from [*here.slots.values()]


def _find_from_thread(shared: Shared[Any]) -> Slot:
    found = _open(shared)
    if not found:
        raise _missing(shared, "")
    if len(found) == 1 and current_request.get() is not None:
        return found[0]  # a thread that was given a request's context
    import anyio.from_thread

    try:
        loop = anyio.from_thread.run_sync(current_loop)
    except RuntimeError:  # no worker thread of anyio's
        loop = None
    for slot in found:
        if slot.loop is loop:
            return slot
    name = threading.current_thread().name
    raise _missing(shared, f"an event loop that does not run in this thread ({name!r})")


def _open(shared: Shared[Any]) -> list[Slot]:
    return [slot for slot in slots() if slot.shared is shared and slot.opens]


def _missing(shared: Shared[Any], where: str) -> SharedNotOpen:
    mend = (
        f"pass shared=[{shared.name}] to asyncguard.install(app), which opens it with the application's "
        "lifespan (a test has to run that, too: see asyncguard.testing; that of a mounted application is run "
        "by nobody: see asyncguard.combine_lifespans), or run this code inside "
        f"`async with asyncguard.open_shared({shared.name}):`"
    )
    if where:
        return SharedNotOpen(
            f"{shared} is open on {where}: get it on the loop that opened it, and hand it over only there; "
            f"or open it here as well: {mend}",
            shared.name,
        )
    return SharedNotOpen(f"{shared} is not open: {mend}", shared.name)


def _forget_if_closed(slot: Slot) -> None:
    if slot.opens or slot.busy is not None:
        return
    here = _homes.get(id(slot.loop))
    if here is not None and here.slots.get(slot.shared) is slot:
        del here.slots[slot.shared]
        if not here.slots:
            del _homes[id(slot.loop)]


def _sweep() -> None:
    """Forget loops that were closed without a word: nothing of theirs can be closed any more."""
    for key, here in [*_homes.items()]:
        if isinstance(here.loop, asyncio.AbstractEventLoop) and here.loop.is_closed():
            _homes.pop(key, None)  # another thread may sweep as well


def _forget() -> None:
    global _homes
    _inherited.append(_homes)
    _homes = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
