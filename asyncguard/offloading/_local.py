"""Worker processes of this machine: how a call gets to one of them, and its outcome back.

`_dispatcher` decides what runs where, `_spawner` or `_exec_spawner` starts the processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any

import anyio
import anyio.to_thread

from asyncguard.errors import OffloadError, PayloadError
from asyncguard.offloading._address import Address
from asyncguard.offloading._answers import log_here, result_of
from asyncguard.offloading._backend import Census, Limits
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._dispatcher import Dispatcher
from asyncguard.offloading._exec_spawner import ExecSpawner
from asyncguard.offloading._job import Job
from asyncguard.offloading._loops import running_loop
from asyncguard.offloading._nameless import Descriptor
from asyncguard.offloading._payload import PackError, TooBig, UnpackError
from asyncguard.offloading._process import Piece, close_all
from asyncguard.offloading._scratch import ScratchFiles
from asyncguard.offloading._spawner import Spawner
from asyncguard.offloading._summons import pack_call, variables_of
from asyncguard.offloading._tally import Tally
from asyncguard.offloading._wire import INLINE, Frame, Kind, encode

__all__ = ["LocalBackend"]

logger = logging.getLogger("asyncguard.offloading")

_READY_WITHIN = 10.0
"""Seconds that an application waits for its workers when it starts."""
_CLOSED_WITHIN = 2.0
"""Seconds that closing takes at most, once all functions have had their grace."""


class LocalBackend:
    """Worker processes of this machine, each with a socket of its own. See `Backend`."""

    def open(self, limits: Limits, tally: Tally, *, warm: bool, preload: Iterable[str]) -> None:
        self._grace = limits.grace
        self._loop = running_loop()
        self._dispatcher = Dispatcher(self._loop, limits, tally, _on_message)
        kind = ExecSpawner if limits.start_method == "spawn" else Spawner
        self._spawner: Spawner | ExecSpawner = kind(self._loop, self._dispatcher, nice=limits.nice)
        self._dispatcher.starter = self._spawner
        self._limiter = anyio.CapacityLimiter(4)
        self._files = ScratchFiles(self._loop)
        self._calls = 0
        self._modules: set[str] = set()
        for module in preload:
            self._spawner.preload(module)
        if warm:
            self._dispatcher.open()

    async def ready(self) -> None:
        ready = anyio.Event()
        self._dispatcher.on_ready(ready.set)
        with anyio.move_on_after(_READY_WITHIN):
            await ready.wait()
            return
        logger.warning(
            "the offload workers are not ready after %g s, and the first calls will have to wait for them: "
            "they import what the offloaded functions need",
            _READY_WITHIN,
        )

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
        label, loop, dispatcher = address.label, self._loop, self._dispatcher
        self._calls = call = self._calls + 1
        if address.module not in self._modules:
            self._modules.add(address.module)
            self._spawner.preload(address.module)
        try:
            context = variables_of(options.context, address.module) if options.context else ()
        except LookupError as error:
            raise PayloadError(f"{label} was not begun: {error}") from None
        try:
            try:
                packed = pack_call(address, args, kwargs, context, most=INLINE)
                pieces, descriptors = encode(Kind.CALL, call, packed)
            except TooBig:
                pieces, descriptors = await self._in_thread(
                    lambda: _closed_if_dropped(
                        *encode(
                            Kind.CALL, call, pack_call(address, args, kwargs, context), file=self._files.take
                        )
                    )
                )
        except PackError as error:
            raise PayloadError(f"{label} was not begun: {error}") from error.__cause__
        except OSError as error:
            text = f"there is no room for its arguments: {error}"
            raise PayloadError(f"{label} was not begun: {text}") from error
        file = _kept(descriptors[0]) if descriptors else None
        job = Job(call, label, loop.outcome(), pieces, descriptors, options, seconds, began)
        try:
            dispatcher.submit(job)
            frame = await job.outcome
        except BaseException as error:
            if isinstance(error, OffloadError):
                job.let_go()
            else:
                dispatcher.withdraw(job)
            if file is not None:  # now, not when the traceback goes
                file.close()
            raise
        if file is not None:
            if frame.body.is_free:
                self._files.give(file)
            else:
                file.close()
        return await result_of(label, frame, self._in_thread)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        # Of its own: those who hold all of the application's threads may be waiting for us.
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    def census(self) -> Census:
        dispatcher = self._dispatcher
        return Census(dispatcher.workers, dispatcher.idle, dispatcher.running, dispatcher.queued)

    async def aclose(self) -> None:
        dispatcher, spawner = self._dispatcher, self._spawner
        self._files.close()
        dispatcher.refuse("its pool was closed")
        empty = anyio.Event()
        dispatcher.on_empty(empty.set)
        try:
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(self._grace + _CLOSED_WITHIN):
                    await empty.wait()
                dispatcher.close()
                await spawner.aclose()
        finally:
            dispatcher.close()
            spawner.close()

    def abandon(self) -> None:
        self._files.disown()  # the loop is gone, and its timer with it
        self._spawner.abandon()
        self._dispatcher.abandon()

    def disown(self) -> None:
        self._files.disown()
        self._spawner.disown()
        self._dispatcher.disown()


class _Descriptors(list[int]):
    """Closed when nobody has them: a task that is cancelled gets nothing of what its thread returns."""

    def __del__(self) -> None:
        close_all(self)


def _closed_if_dropped(pieces: list[Piece], descriptors: list[int]) -> tuple[list[Piece], list[int]]:
    return pieces, _Descriptors(descriptors)


def _kept(fd: int) -> Descriptor | None:
    """The file that an argument travels in, to be written to again."""
    try:
        return Descriptor(os.dup(fd))
    except OSError:  # there are no descriptors left
        return None


def _on_message(job: Job | None, frame: Frame) -> None:
    message: Any
    try:
        (message,) = frame.body.unpack(("the message",))
    except UnpackError:
        logger.exception("an offload worker sent something that cannot be read")
        return
    if frame.kind is Kind.LOG:
        # As if it had been logged by whoever made the call: filters may want to know the request.
        (Context() if job is None else job.context).run(log_here, message)
        return
    if frame.kind is not Kind.PROGRESS or job is None or job.call != frame.call or job.outcome.done():
        return
    if job.options.on_progress is not None:
        try:
            job.context.run(job.options.on_progress, message)
        except Exception:
            logger.exception("the on_progress callback of %s raised", job.label)
