"""One live object of a shared resource: made, entered and left by a task of its own.

A cancel scope or a task group has to be left by the task that entered it; whoever opens a resource, and
whoever closes it, may be any.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any

import anyio

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard._tasks import leave_behind, outwait, own_task, start
from asyncguard.clients import _fittings
from asyncguard.clients._checks import run_check
from asyncguard.clients._factory import made, opened
from asyncguard.clients._hung import awaiting
from asyncguard.errors import SharedStartFailed

if TYPE_CHECKING:
    from asyncguard.clients._shared import Shared

__all__ = ["GRACE", "Instance", "told"]

logger = logging.getLogger("asyncguard.clients")

GRACE = 1.0
"""For how many seconds a task that has been cancelled is waited for."""

LAST_WORD = 2.0
"""For how many seconds an object whose loop is about to end waits for those who opened it to close it."""

_LONGEST_TIMER = 3600.0

_lock = threading.Lock()
"""Held while holds are counted: worker threads hold on to objects as well."""


def _renew_lock() -> None:
    """In a forked child: another thread of its parent may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Instance:
    """A live object.

    Args:
        shared: What it is declared by.
        args: What to call its factory with.
        kwargs: The same, by name.
        needs: The live objects among these; they are held until this one is closed.
        on_free: Called, in any thread, when it is retired and nobody holds on to it any more.

    Attributes:
        object: What users get, once it is open.
        opened_at: When it was opened, on asyncguard's monotonic clock.
        ended: Set when its task has ended.
        error: What ended it, if it was not told to end, or what went wrong in closing it.
        handed_out: Whether it was given to code that nobody can tell the end of.
        retired: Whether another one has taken its place.
    """

    def __init__(
        self,
        shared: Shared[Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        needs: Sequence[Instance] = (),
        on_free: Callable[[Instance], object] | None = None,
    ) -> None:
        self._shared = shared
        self._args = args
        self._kwargs = kwargs
        self._needs = needs
        self._on_free = on_free
        self._holds = 0
        self._settled = anyio.Event()
        self._told = anyio.Event()
        self._told_at = math.inf
        self._is_open = False
        self._called_off = False
        self._call_off: Callable[[], object] = lambda: None
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self._task: asyncio.Task[Any] | None = None
        self.object: Any = None
        self.opened_at: float = math.inf
        self.ended: anyio.Event = anyio.Event()
        self.error: BaseException | None = None
        self.handed_out: bool = False
        self.retired: bool = False

    async def open(self) -> None:
        """Have it made and entered.

        Raises:
            SharedStartFailed: If that failed, or took too long. It is being closed then.
        """
        shared = self._shared
        for needed in self._needs:
            needed.hold()
        # In a context of its own: it outlives the request, or the test, that happens to open it.
        self._call_off = start(
            self._begin, self._end, name=f"asyncguard-shared-{shared.name}", context=Context()
        )
        try:
            with anyio.move_on_after(shared.start_timeout):
                await self._settled.wait()
        except BaseException:
            await self._give_up()
            raise
        if not self._settled.is_set():
            message = f"{shared} did not start within {shared.start_timeout:g} s{awaiting(self._coroutine)}"
            cancelled = await self._give_up()
            raise cancelled or SharedStartFailed(message, shared.name)
        error = self.error
        if self._is_open and error is None:
            return
        if isinstance(error, Exception | asyncio.CancelledError):
            raise SharedStartFailed(f"{shared} could not be opened: {told(error)}", shared.name) from error
        raise error or SharedStartFailed(f"{shared} could not be opened: it has ended", shared.name)

    def tell(self) -> None:
        """Tell it to close; `close` waits until it has."""
        if not self._told.is_set():
            self._told.set()
            self._told_at = anyio.current_time()

    async def close(self) -> asyncio.CancelledError | None:
        """Close it, within its limit. What goes wrong is logged.

        Returns:
            What `outwait` does.
        """
        self.tell()
        shared = self._shared
        left = max(0.0, self._told_at + shared.close_timeout - anyio.current_time())
        cancelled = await outwait(self.ended, left)
        if not self.ended.is_set():
            if not self._called_off:
                place = awaiting(self._coroutine)
                logger.error("%s was not closed within %g s%s", shared, shared.close_timeout, place)
            cancelled = await self._give_up() or cancelled
        return cancelled

    def hold(self) -> None:
        """Keep it open until `drop` is called as often."""
        with _lock:
            self._holds += 1

    def drop(self) -> None:
        """Do so no longer; from any thread."""
        with _lock:
            self._holds -= 1
            is_free = not self._holds
        if is_free and self.retired and self._on_free is not None:
            self._on_free(self)

    def hold_for(self, record: RequestRecord | None) -> None:
        """Keep it open until that request ends; where there is none, it is known to be somewhere."""
        with _lock:
            calls = record.endings if record is not None else None
            if record is None or calls is None:
                self.handed_out = True
                return
            if self in calls:
                return
            self._holds += 1
            calls[self] = self.drop
            # It may have ended just now, where this is a thread: then nobody calls what has come too late.
            if record.finished_at != math.inf and calls.pop(self, None) is not None:
                self._holds -= 1
                self.handed_out = True

    @property
    def is_held(self) -> bool:
        """Whether somebody holds on to it."""
        return self._holds > 0

    @property
    def is_live(self) -> bool:
        """Whether it is open, and goes on, as do those that it was made with."""
        return self._is_open and not self.ended.is_set() and all(needed.is_live for needed in self._needs)

    @property
    def age(self) -> float:
        """For how many seconds it has been open."""
        return _clock.monotonic() - self.opened_at

    def _begin(self) -> Coroutine[Any, Any, None]:
        self._coroutine = coroutine = self._live()
        return coroutine

    async def _live(self) -> None:
        """Its whole life, in a task of its own."""
        shared = self._shared
        self._task = own_task()
        try:
            kwargs = await _fittings.prepare(shared.factory, tuple(self._args), dict(self._kwargs))
            thing = await made(shared.factory, self._args, kwargs)
            self._fit(thing)
            async with opened(thing) as self.object:
                if self.object is not thing:
                    self._fit(self.object)
                await self._check()
                self.opened_at = _clock.monotonic()
                self._is_open = True
                self._settled.set()
                await self._word()
        except BaseException as error:
            self._note(error)
            # What is to end the process, and came before it was open, is raised by who opens it.
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
            if self._is_open and isinstance(error, KeyboardInterrupt | SystemExit):
                raise

    async def _check(self) -> None:
        check = self._shared.check
        if check is None:
            return
        try:
            await run_check(check, self.object)
        except Exception as error:
            self.error = error  # the object may keep to itself what it is left by
            raise

    def _fit(self, thing: Any) -> None:
        try:
            _fittings.fit(thing, self._shared.name)
        except Exception:  # the client is as good as its library has made it
            logger.exception("%s could not be fitted", self._shared)

    async def _word(self) -> None:
        """Wait until it is to be closed."""
        try:
            await self._told.wait()
        except asyncio.CancelledError:
            if self._called_off:
                raise
            # A loop that ends cancels every task at once. Those who opened this one may be about to close
            # it in its turn; what depends on it is to be closed first. If it is a scope inside the object
            # that was cancelled, waiting is cancelled again at once.
            with anyio.move_on_after(LAST_WORD):
                await self._told.wait()
            task = asyncio.current_task()
            assert task is not None
            if not self._told.is_set():
                limit = min(self._shared.close_timeout, _LONGEST_TIMER)
                asyncio.get_running_loop().call_later(limit, task.cancel)
                raise
            task.uncancel()

    def _note(self, error: BaseException) -> None:
        shared, self.error = self._shared, error
        if not self._is_open or self._called_off:
            return  # who opens it, or gives it up, says so
        if self._told.is_set():
            logger.error("%s could not be closed: %s", shared, told(error), exc_info=error)
        else:
            logger.error("%s ended by itself: %s", shared, told(error), exc_info=error)

    def _end(self) -> None:
        self._coroutine = self._task = None
        self._settled.set()
        self.ended.set()
        for needed in self._needs:
            needed.drop()

    async def _give_up(self) -> asyncio.CancelledError | None:
        """Cancel its task; should that go on all the same, it closes as soon as it comes to it."""
        self.tell()
        self._called_off = True
        self._call_off()
        cancelled = await outwait(self.ended, GRACE)
        if not self.ended.is_set():
            logger.error("%s was cancelled, and goes on", self._shared)
            leave_behind(self._task)
        return cancelled


def told(error: BaseException) -> str:
    """What an exception is, and says."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
