"""A shared resource on one event loop: opened once, replaced by a new object when its own is too old."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from asyncguard import _clock
from asyncguard._request import current_request
from asyncguard._tasks import leave_behind, outwait, own_task, scheduler, start
from asyncguard.clients import _gauges
from asyncguard.clients._checks import run_check
from asyncguard.clients._instance import Instance, told
from asyncguard.errors import SharedNotOpen, SharedStartFailed
from asyncguard.events import SharedState, SharedStatus

if TYPE_CHECKING:
    from asyncguard.clients._shared import Shared

__all__ = ["Chore", "Slot"]

logger = logging.getLogger("asyncguard.clients")

LINGER = 60.0
"""For how many seconds an object that was replaced stays open for code that belongs to no request."""

RETRY_AFTER = 10.0
"""In how many seconds to try again what could not be opened anew."""


class Chore:
    """Work at the side of a slot.

    Attributes:
        ended: Set when it has ended.
    """

    def __init__(
        self, work: Callable[[], Coroutine[Any, Any, None]], on_end: Callable[[Chore], object], name: str
    ) -> None:
        self.ended: anyio.Event = anyio.Event()
        self._work = work
        self._on_end = on_end
        self._task: asyncio.Task[Any] | None = None
        self.call_off: Callable[[], object] = start(self._run, self._end, name=name, context=Context())

    async def outlast(self, seconds: float) -> asyncio.CancelledError | None:
        """Wait for its end, once it has been called off. If it goes on all the same, so does everybody else.

        Returns:
            What `outwait` does.
        """
        cancelled = await outwait(self.ended, seconds)
        if not self.ended.is_set():
            leave_behind(self._task)
        return cancelled

    async def _run(self) -> None:
        self._task = own_task()
        await self._work()

    def _end(self) -> None:
        self._task = None
        self.ended.set()
        self._on_end(self)


class Slot:
    """One resource on one loop.

    All but `take`, `hold` and `status` is for the loop's thread.

    Args:
        shared: The resource.
        live_of: Gives the live object of another resource on the same loop.

    Attributes:
        loop: What stands for the loop.
        opens: How many times it has been opened and not closed yet.
        current: The object in use.
        busy: Set when it has been opened, or closed, while that is going on; else `None`.
    """

    def __init__(self, shared: Shared[Any], loop: object, live_of: Callable[[Shared[Any]], Instance]) -> None:
        self.shared = shared
        self.loop = loop
        self.opens = 0
        self.current: Instance | None = None
        self.busy: anyio.Event | None = None
        self._live_of = live_of
        self._soon = scheduler()
        self._state: SharedState = "closed"
        self._opened: float | None = None
        self._error: str | None = None
        self._renewals = 0
        self._renew_at = math.inf
        self._try_again_at = -math.inf
        self._renewing = False
        self._retired: dict[Instance, None] = {}
        self._chores: dict[Chore, None] = {}
        self._check: Check | None = None

    async def open(self) -> None:
        """Open it for one more.

        Raises:
            SharedStartFailed: If that failed.
        """
        assert self.busy is None
        if self.opens:
            self.opens += 1
            return
        busy = self.busy = anyio.Event()
        self._state = "opening"
        try:
            self._install(await self._new())
            self.opens = 1
        except BaseException:
            self._state = "closed"
            raise
        finally:
            self.busy = None
            busy.set()

    async def close(self) -> asyncio.CancelledError | None:
        """Close it, unless others have it open; within the limits. What goes wrong is logged.

        Returns:
            What `outwait` does.
        """
        self.opens -= 1
        if self.opens:
            return None
        busy = self.busy = anyio.Event()
        self._state = "closing"
        cancelled = None
        try:
            for chore in [*self._chores]:
                chore.call_off()
            for instance in self._instances:
                instance.tell()
            for chore in [*self._chores]:
                cancelled = await chore.outlast(self.shared.close_timeout) or cancelled
                if not chore.ended.is_set():
                    logger.error("what looks after %s was cancelled, and goes on", self.shared)
            for instance in self._instances:
                cancelled = await instance.close() or cancelled
        finally:
            self._state = "closed"
            self.current = None
            self._retired.clear()
            self.busy = None
            busy.set()
        return cancelled

    def take(self) -> Any:
        """The live object, for the running request to keep to its end."""
        instance = self.usable()
        if self.shared.max_age is None:
            return instance.object
        instance.hold_for(current_request.get())
        # In a thread, it may have been replaced before it was held, and be closed therefore.
        return self.take() if instance.retired else instance.object

    def hold(self) -> Instance:
        """The live object, for the caller to keep until it drops it."""
        instance = self.usable()
        instance.hold()
        if instance.retired:  # as above
            instance.drop()
            return self.hold()
        return instance

    def usable(self) -> Instance:
        """The object in use, which is opened anew if it is time for that.

        Raises:
            SharedNotOpen: If there is none, or it has ended by itself.
        """
        shared, instance = self.shared, self.current
        if instance is None:
            why = "is being opened" if self._state == "opening" else "is closed"
            raise SharedNotOpen(f"{shared} {why}", shared.name)
        is_live = instance.is_live
        if self._renew_at != math.inf or not is_live:
            self._look_after(instance)
        if not is_live and self._state != "closing":
            reason = f": {self._error}" if self._error else ""
            raise SharedNotOpen(
                f"{shared} has ended by itself, and is being opened anew{reason}", shared.name
            )
        return instance

    def check(self) -> Check:
        """Begin its check, unless that is going on."""
        running = self._check
        if running is None or running.ended.is_set():
            self._check = running = Check(self)
        return running

    def note(self, error: str | None) -> None:
        """What its check has said: what went wrong, if anything."""
        if error is not None:
            if self._state == "open":
                self._state = "failing"
                logger.warning("%s fails its check: %s", self.shared, error)
            self._error = error
        elif self._state == "failing":
            self._state, self._error = "open", None
            logger.info("%s is well again", self.shared)

    @property
    def status(self) -> SharedStatus:
        """How it is."""
        shared, instance = self.shared, self.current
        if shared.is_replaced:
            return SharedStatus(shared.name, shared.declared, "replaced")
        if instance is None:
            return SharedStatus(shared.name, shared.declared, self._state, last_error=self._error)
        in_use, waiting = _gauges.gauges(instance.object)
        ended = self._state != "closing" and not instance.is_live
        error = told(instance.error) if ended and instance.error is not None else None
        return SharedStatus(
            shared.name,
            shared.declared,
            "ended" if ended else self._state,
            self._opened,
            instance.age,
            self._renewals,
            in_use,
            waiting,
            self._error or error,
        )

    @property
    def _instances(self) -> list[Instance]:
        return [*self._retired, *([] if self.current is None else [self.current])]

    async def _new(self) -> Instance:
        """Another object, open."""
        shared = self.shared
        needs = {needed: self._live_of(needed) for needed in shared.needs if not needed.is_replaced}
        args, kwargs = shared.inputs(
            lambda needed: needs[needed].object if needed in needs else needed.replacement
        )
        instance = Instance(shared, args, kwargs, tuple(needs.values()), self._let_go)
        started = _clock.monotonic()
        await instance.open()
        logger.debug("%s was opened in %.3f s", shared, _clock.monotonic() - started)
        return instance

    def _install(self, instance: Instance) -> None:
        self.current = instance
        self._state = "open"
        self._error = None
        self._try_again_at = -math.inf
        self._opened = _clock.wall()
        max_age = self.shared.max_age
        self._renew_at = math.inf if max_age is None else instance.opened_at + max_age

    def _look_after(self, instance: Instance) -> None:
        """Have it opened anew, if it is time for that."""
        now = _clock.monotonic()
        is_due = (now >= self._renew_at or not instance.is_live) and now >= self._try_again_at
        if is_due and not self._renewing and self._state != "closing":
            self._soon(self._begin_renewal)

    def _begin_renewal(self) -> None:
        if not self._renewing and self.opens:
            self._renewing = True
            self._start(self._renew)

    async def _renew(self) -> None:
        try:
            instance = await self._new()
        except SharedNotOpen:
            return  # what it needs is not there: that is opened anew first
        except SharedStartFailed as error:
            self._try_again_at = _clock.monotonic() + RETRY_AFTER
            self._error = str(error)
            logger.error("%s; it stays as it is for now, and is tried again", error)
            return
        finally:
            self._renewing = False
        old = self.current
        self._install(instance)
        self._renewals += 1
        if old is not None:
            self._retire(old)

    def _retire(self, instance: Instance) -> None:
        instance.retired = True  # first: a thread that takes it now sees either this, or that it is held
        if instance.handed_out:
            instance.hold()
            self._start(partial(self._linger, instance))
        self._retired[instance] = None
        self._close_if_free(instance)

    async def _linger(self, instance: Instance) -> None:
        await anyio.sleep(LINGER)
        instance.drop()

    def _let_go(self, instance: Instance) -> None:
        self._soon(partial(self._close_if_free, instance))

    def _close_if_free(self, instance: Instance) -> None:
        if instance in self._retired and not instance.is_held and self.busy is None:
            self._start(partial(self._close_retired, instance))

    async def _close_retired(self, instance: Instance) -> None:
        cancelled = await instance.close()
        self._retired.pop(instance, None)
        if cancelled is not None:
            raise cancelled

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> Chore:
        async def run() -> None:
            try:
                await work()
            except Exception:
                logger.exception("asyncguard failed to look after %s", self.shared)

        chore = Chore(run, self._forget, f"asyncguard-shared-{self.shared.name}")
        self._chores[chore] = None
        return chore

    def _forget(self, chore: Chore) -> None:
        self._chores.pop(chore, None)


class Check:
    """One run of a resource's check.

    Attributes:
        ended: Set when it has ended.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._stopped = False
        self._chore = slot._start(self._run)
        self.ended = self._chore.ended

    def stop(self, error: str) -> None:
        """Cancel it: it has failed."""
        self._stopped = True
        self._slot.note(error)
        self._chore.call_off()

    async def _run(self) -> None:
        slot = self._slot
        try:
            try:
                instance = slot.usable()
            except SharedNotOpen:
                return  # its status says so
            if slot.shared.check is not None:
                await run_check(slot.shared.check, instance.object)
        except Exception as error:
            slot.note(told(error))
        else:
            if not self._stopped:
                slot.note(None)
