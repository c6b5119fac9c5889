"""Calls in the worker processes of anyio (`anyio.to_process`), where the system allows for none of our own.

Which call gets a worker, and when, is decided here, so that calls wait by priority, and no longer than they
may. How anyio is brought to lend one is `_anyio_workers`' business; what runs there is in `_borrowed`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextvars import Context
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from asyncguard import _clock
from asyncguard._tasks import start
from asyncguard.errors import OffloadError, OffloadQueueFull, OffloadTimeout, PayloadError, WorkerCrashed
from asyncguard.offloading import _borrowed, _main_module
from asyncguard.offloading._address import Address
from asyncguard.offloading._answers import log_here, result_of
from asyncguard.offloading._anyio_workers import AnyioWorkers
from asyncguard.offloading._backend import Census, Limits
from asyncguard.offloading._borrowed import Answer, Portable
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._loops import Outcome, Revocable, running_loop
from asyncguard.offloading._payload import Body, PackError, TooBig, UnpackError, explain
from asyncguard.offloading._summons import pack_call, variables_of
from asyncguard.offloading._tally import Tally
from asyncguard.offloading._wire import INLINE, Frame, Kind

__all__ = ["ToProcessBackend"]

logger = logging.getLogger("asyncguard.offloading")

_MISSING = (
    "offloaded calls run in worker processes of anyio.to_process, since this system cannot pass descriptors "
    "from one process to another. What they lack: a function that is too late or cancelled is killed, and "
    "its `finally` blocks do not run, unless on_cancel='abandon'; OffloadTimeout and WorkerCrashed know "
    "neither stack nor exit code; on_progress is never called; what functions print is lost, and what they "
    "log arrives when they have ended; large arguments and results are copied on the event loop"
)
_READY_WITHIN = 10.0
"""Seconds that an application waits for its workers when it starts."""
_CLOSED_WITHIN = 2.0
"""Seconds that closing takes at most, once all functions have had their grace."""
_is_told = False


class _Job:
    """A call that waits for its turn, or has it."""

    def __init__(
        self,
        label: str,
        request: Portable,
        outcome: Outcome,
        options: CallOptions,
        seconds: float | None,
        began: float,
    ) -> None:
        self.label = label
        self.request = request
        self.outcome = outcome
        self.options = options
        self.seconds = seconds
        self.began = began
        self.started: float | None = None
        self.timer: Revocable | None = None
        self.scope = anyio.CancelScope()  # to be made in a task

    def begin(self) -> None:
        self.started = _clock.monotonic()

    def explained(self, death: WorkerCrashed) -> str:
        if self.started is None:
            return f"{self.label} was not begun: {death}"
        return f"the worker that ran {self.label} {death}"

    def fail(self, error: OffloadError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class ToProcessBackend:
    """Worker processes of anyio's. See `Backend`.

    They are those of the event loop, which other users of `anyio.to_process` share.
    """

    # -- opening and closing -----------------------------------------------------------------------

    def open(self, limits: Limits, tally: Tally, *, warm: bool, preload: Iterable[str]) -> None:
        _main_module.refuse_while_loading()
        if limits.max_rss is not None and not _borrowed.rss():
            raise ValueError("max_rss must be None: this system does not tell how much memory a process has")
        _tell_what_is_missing()
        level = logging.getLogger().getEffectiveLevel()
        settings = limits.nice, level, [*sys.argv], _main_module.of_this_process()
        self._workers = AnyioWorkers(settings, [*preload], limits, tally)
        self._limits = limits
        self._tally = tally
        self._loop = running_loop()
        self._threads = anyio.CapacityLimiter(4)
        self._waiting: dict[int, dict[_Job, None]] = {}
        self._running: set[_Job] = set()
        self._starting = 0
        self._is_ready: anyio.Event | None = None
        self._refusal: str | None = None
        self._when_ready: Callable[[], None] | None = None
        self._when_empty: Callable[[], None] | None = None
        if warm:
            for _ in range(limits.workers):
                self._starting += 1
                self._spawn(self._warm_up, self._warmed_up)

    async def ready(self) -> None:
        if self._starting:
            self._is_ready = anyio.Event()
            with anyio.move_on_after(_READY_WITHIN):
                await self._is_ready.wait()

    async def _warm_up(self) -> None:
        try:
            await self._workers.ready()
        except Exception as error:
            logger.warning("an offload worker could not be started: %s", explain(error))

    def _warmed_up(self) -> None:
        self._starting -= 1
        if not self._starting and self._is_ready is not None:
            self._is_ready.set()
        self._go_on()

    async def aclose(self) -> None:
        self._refuse("its pool was closed")
        empty = anyio.Event()
        self._when_empty = empty.set
        self._go_on()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(self._limits.grace):
                await empty.wait()
            for job in self._running:
                job.scope.cancel()
            with anyio.move_on_after(_CLOSED_WITHIN):
                await empty.wait()
            self._workers.give_up()
            await empty.wait()
            await self._workers.dismiss()

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        while (job := self._next()) is not None:
            _settle(job)
            job.fail(OffloadError(f"{job.label} was not begun: {reason}"))

    def abandon(self) -> None:
        # Anyio has ended its workers with the loop.
        self._refusal = "its event loop was closed"

    def disown(self) -> None:
        self._refusal = "its process was forked"

    def census(self) -> Census:
        running = len(self._running)
        workers = self._workers.count
        queued = sum(map(len, self._waiting.values()))
        return Census(max(workers, running), max(0, workers - running), running, queued)

    # -- calls -------------------------------------------------------------------------------------

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
        label = address.label
        try:
            context = variables_of(options.context, address.module) if options.context else ()
        except LookupError as error:
            raise PayloadError(f"{label} was not begun: {error}") from None
        try:
            try:
                request = _borrowed.portable(pack_call(address, args, kwargs, context, most=INLINE))
            except TooBig:
                request = await self._in_thread(
                    lambda: _borrowed.portable(pack_call(address, args, kwargs, context))
                )
        except PackError as error:
            raise PayloadError(f"{label} was not begun: {error}") from error.__cause__
        job = _Job(label, request, self._loop.outcome(), options, seconds, began)
        del request
        self._submit(job)
        try:
            kind, portable = await job.outcome
        except OffloadError:
            raise
        except BaseException:
            self._withdraw(job)
            raise
        return await result_of(label, Frame(Kind(kind), 0, Body(*portable)), self._in_thread)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    # -- whose turn it is --------------------------------------------------------------------------

    def _submit(self, job: _Job) -> None:
        limits = self._limits
        if self._refusal is not None:
            raise OffloadError(self._refusal)
        queued = sum(map(len, self._waiting.values()))
        is_free = len(self._running) + self._starting < limits.workers
        if not is_free and queued >= limits.max_queue + self._starting:
            self._tally.refused += 1
            raise OffloadQueueFull(
                f"{job.label} was not begun: all workers ({limits.workers}) are busy, and the queue is "
                f"full ({queued}); raise max_queue or workers, or start fewer calls at once",
                self._tally.mean_run * max(1, queued) / limits.workers,
            )
        if job.seconds is not None:
            left = max(0.0, job.began + job.seconds - _clock.monotonic())
            job.timer = self._loop.call_later(left, partial(self._expire, job))
        self._waiting.setdefault(job.options.priority, {})[job] = None
        self._go_on()

    def _go_on(self) -> None:
        """Begin the calls that wait, as far as there are workers for them."""
        while len(self._running) + self._starting < self._limits.workers:
            job = self._next()
            if job is None:
                break
            self._running.add(job)
            self._spawn(partial(self._serve, job), partial(self._served, job))
        if self._when_empty is not None and not self._running and not self._starting:
            self._when_empty()

    def _next(self) -> _Job | None:
        if not self._waiting:
            return None
        job = next(iter(self._waiting[max(self._waiting)]))
        self._forget(job)
        return job

    def _forget(self, job: _Job) -> bool:
        """Wait with it no longer; returns whether it did."""
        priority = job.options.priority
        waiting = self._waiting.get(priority, {})
        if job not in waiting:
            return False
        del waiting[job]
        if not waiting:
            del self._waiting[priority]
        return True

    def _withdraw(self, job: _Job) -> None:
        self._tally.cancelled += 1
        _settle(job)
        if not self._forget(job) and (job.started is None or job.options.on_cancel != "abandon"):
            job.scope.cancel()

    def _expire(self, job: _Job) -> None:
        job.timer = None
        if job.outcome.done():
            return
        self._tally.timeouts += 1
        seconds = f"within {job.seconds:.3g} s"
        if self._forget(job):
            job.fail(OffloadTimeout(f"{job.label} was not begun: no worker was free {seconds}"))
            return
        if job.started is None:
            job.fail(OffloadTimeout(f"{job.label} was not begun: its worker was not ready {seconds}"))
        else:
            unknown = "where it was is not known: worker processes of anyio do not tell"
            job.fail(OffloadTimeout(f"{job.label} did not end {seconds}; {unknown}"))
        if job.started is None or job.options.on_cancel != "abandon":
            job.scope.cancel()

    # -- how it is run -----------------------------------------------------------------------------

    def _spawn(self, work: Any, on_end: Callable[[], None]) -> None:
        # Beside the task that awaits the call: that may leave at any moment, and a worker that is about to
        # start must not be left behind half-way. And in nobody's context.
        Context().run(start, work, on_end)

    async def _serve(self, job: _Job) -> None:
        with job.scope:
            try:
                try:
                    answer = await self._workers.call(job.request, job.begin)
                finally:
                    self._running.discard(job)  # before anybody hears of it, who may have another call
            except WorkerCrashed as error:
                if not job.outcome.done():
                    self._tally.crashes += job.started is not None
                    job.fail(WorkerCrashed(job.explained(error)))
            except Exception as error:  # there was no memory left, on one of the two sides
                job.fail(PayloadError(f"the outcome of {job.label} cannot be had: {explain(error)}"))
            else:
                self._on_answer(job, answer)
        if job.scope.cancelled_caught and job.started is not None:
            self._tally.kills += 1

    def _served(self, job: _Job) -> None:
        self._running.discard(job)
        _settle(job)
        why = self._refusal or "its event loop is about to end"
        job.fail(OffloadError(f"{job.label} was stopped: {why}"))
        self._go_on()

    def _on_answer(self, job: _Job, answer: Answer) -> None:
        kind, portable, records = answer
        assert job.started is not None
        self._tally.ran(job.started - job.began, _clock.monotonic() - job.started)
        for record in records:
            try:
                message: Any = Body(*record).unpack(("the log record",))[0]
            except UnpackError:
                logger.exception("an offload worker sent something that cannot be read")
            else:
                log_here(message)
        if job.outcome.done():
            return
        if kind == Kind.FAULT:
            fault: Any = Body(*portable).unpack(("the reason",))[0]
            reason, code = fault
            if reason == _borrowed.LEFT:
                self._tally.crashes += 1
                job.fail(WorkerCrashed(f"{job.label} called sys.exit: exit code {code}", int(code)))
                return
        job.outcome.set_result((kind, portable))


def _settle(job: _Job) -> None:
    if job.timer is not None:
        job.timer.cancel()
        job.timer = None


def _tell_what_is_missing() -> None:
    global _is_told
    if not _is_told:
        _is_told = True
        logger.warning(_MISSING)
