"""Which call runs on which worker, and what becomes of calls and workers when one of them fails.

Everything here is a callback on the loop's thread and returns at once; `_pool` is what awaits. A call is
given to one worker once: nothing is ever run again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Protocol

from asyncguard import _clock
from asyncguard.errors import OffloadError, OffloadQueueFull, OffloadTimeout, WorkerCrashed
from asyncguard.offloading._backend import Limits
from asyncguard.offloading._job import Job
from asyncguard.offloading._loops import Loop, Revocable
from asyncguard.offloading._process import WorkerProcess
from asyncguard.offloading._tally import Tally
from asyncguard.offloading._wire import Frame, Kind

__all__ = ["Dispatcher", "Starter"]

logger = logging.getLogger("asyncguard.offloading")

_STACK_AFTER = 0.002
"""Seconds after which to look what a late worker has written down; then after twice as many, and so on."""
_STACK_WITHIN = 0.06
"""Seconds that it is given for that: it is a nice process, and the machine may be busy."""
_AGAIN_AFTER = 0.01
"""Seconds after which a function that goes on is interrupted again; then after twice as many, and so on."""
_ENDED_WITHIN = 1.0
"""Seconds within which the exit code of a worker that hung up is known, or not asked for any more."""
_HUNG_UP_FOR = 0.25
"""Seconds after which a worker is killed that has closed its socket in the middle of a call."""
_BAD_STARTS = 3
"""After how many workers in a row that died before they were ready no more are started for a while."""
_NEXT_TRY_AFTER = 1.0
_READY = Kind.READY
_LOG = Kind.LOG
"""This kind and those after it are no answers."""


class Starter(Protocol):
    """What starts worker processes."""

    def start(self, process: WorkerProcess) -> None:
        """Start it; `Dispatcher.on_started` or `on_not_started` follows."""


class Dispatcher:
    """The workers of one pool and the calls in it.

    Args:
        loop: The loop.
        limits: The pool's options.
        tally: Where it is counted what happens.
        on_message: Called with the job that runs, if there is one, and a frame that is no answer.

    Attributes:
        starter: What starts its workers; to be set before anything else.
    """

    def __init__(
        self,
        loop: Loop,
        limits: Limits,
        tally: Tally,
        on_message: Callable[[Job | None, Frame], None],
    ) -> None:
        self.starter: Starter | None = None
        self._loop = loop
        self._limits = limits
        self._tally = tally
        self._on_message = on_message
        self._tokens = 0
        self._processes: dict[int, WorkerProcess] = {}
        self._starting = 0
        self._idle: list[WorkerProcess] = []
        self._running: dict[WorkerProcess, Job] = {}
        self._waiting: dict[int, dict[int, Job]] = {}
        self._queued = 0
        self._bad_starts = 0
        self._lost = 0
        self._next_try: Revocable | None = None
        self._refusal: str | None = None
        self._when_ready: list[Callable[[], None]] = []
        self._when_empty: Callable[[], None] | None = None

    # -- calls ---------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """How many calls wait for a worker."""
        return self._queued

    @property
    def running(self) -> int:
        """How many workers are busy."""
        return len(self._running)

    @property
    def idle(self) -> int:
        """How many workers wait for a call."""
        return len(self._idle)

    @property
    def workers(self) -> int:
        """How many workers there are, those that start included."""
        return len(self._processes)

    def submit(self, job: Job) -> None:
        """Run a call, or have it wait.

        Raises:
            OffloadQueueFull: If too many wait.
            OffloadError: If the pool is closed.
        """
        if self._refusal is not None:
            raise OffloadError(self._refusal)
        if job.seconds is not None:
            left = job.began + job.seconds - _clock.monotonic()
            if left <= 0:
                self._tally.timeouts += 1
                raise OffloadTimeout(
                    f"{job.label} was not begun: its arguments took longer than {job.seconds:.3g} s to pack"
                )
            job.timer = self._loop.call_later(left, lambda: self._expire(job))
        while self._idle:
            if self._give(job, self._idle.pop()):
                return
        # A worker that does not run one will take one, even if it is still to be started.
        most = self._limits.max_queue + self._limits.workers
        if self._queued >= most - len(self._running) and self._queued >= most - self._busy():
            self._tally.refused += 1
            raise OffloadQueueFull(
                f"{job.label} was not begun: all workers ({self._limits.workers}) are busy, and the queue is "
                f"full ({self._queued}); raise max_queue or workers, or start fewer calls at once",
                self._tally.mean_run * max(1, self._queued) / self._limits.workers,
            )
        self._waiting.setdefault(job.options.priority, {})[job.call] = job
        self._queued += 1
        self._hire()

    def _busy(self) -> int:
        """How many workers have no place for another call: one that is being killed will be replaced."""
        return sum(not process.is_doomed for process in self._running)

    def withdraw(self, job: Job) -> None:
        """Nobody waits for a call any more."""
        self._tally.cancelled += 1
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None
        if job.process is None:
            self._forget(job)
        elif self._running.get(job.process) is job and job.options.on_cancel != "abandon":
            self._stop(job, job.process)

    def _forget(self, job: Job) -> None:
        waiting = self._waiting.get(job.options.priority)
        if waiting is not None and waiting.pop(job.call, None) is not None:
            self._queued -= 1
            if not waiting:
                del self._waiting[job.options.priority]
        job.let_go()

    def _next(self) -> Job | None:
        while self._waiting:
            priority = max(self._waiting)
            waiting = self._waiting[priority]
            job = waiting.pop(next(iter(waiting)))
            if not waiting:
                del self._waiting[priority]
            self._queued -= 1
            is_late = job.seconds is not None and _clock.monotonic() >= job.began + job.seconds
            if not is_late and not job.outcome.done():  # else its timer, or `withdraw`, is about to see to it
                return job
        return None

    def _give(self, job: Job, process: WorkerProcess) -> bool:
        """Begin a call; returns whether the worker was there."""
        if not process.send(job.pieces, job.descriptors):
            process.hang_up()
            return False
        job.process = process
        job.started = _clock.monotonic()
        self._running[process] = job
        process.calls += 1
        job.pieces = []
        return True

    # -- calls that are too late -----------------------------------------------------------------

    def _expire(self, job: Job) -> None:
        job.timer = None
        if job.outcome.done():
            return
        self._tally.timeouts += 1
        process = job.process
        if process is None:
            self._forget(job)
            waited = f"no worker was free within {job.seconds:.3g} s"
            job.fail(OffloadTimeout(f"{job.label} was not begun: {waited}"))
            return
        job.expired = True
        process.ask_stack()
        # It is not stopped before it has told, or it would tell of that.
        self._await_stack(job, process, _STACK_AFTER)

    def _await_stack(self, job: Job, process: WorkerProcess, seconds: float) -> None:
        def look() -> None:
            if process.has_stack or 2 * seconds > _STACK_WITHIN:
                self._tell_late(job, process)
            else:
                process.ask_stack_again()  # see `_interrupt`
                self._await_stack(job, process, 2 * seconds)

        job.timer = self._loop.call_later(seconds, look)

    def _tell_late(self, job: Job, process: WorkerProcess) -> None:
        job.let_go()
        job.fail(OffloadTimeout(f"{job.label} did not end within {job.seconds:.3g} s", process.read_stack()))
        if job.options.on_cancel != "abandon" and self._running.get(process) is job:
            self._stop(job, process)

    def _stop(self, job: Job, process: WorkerProcess) -> None:
        if job.options.on_cancel == "kill":
            self._kill(process)
        elif process.patience is None:
            self._interrupt(job, process, _AGAIN_AFTER)
            process.patience = self._loop.call_later(self._limits.grace, lambda: self._kill(process))

    def _interrupt(self, job: Job, process: WorkerProcess, seconds: float) -> None:
        # More than once: of two signals that come at once the system gives the second to any thread there is,
        # such as one of NumPy's; and then the function sleeps on.
        if self._running.get(process) is job and not process.is_doomed:
            process.interrupt(job.call)
            self._loop.call_later(seconds, lambda: self._interrupt(job, process, 2 * seconds))

    def _kill(self, process: WorkerProcess) -> None:
        if not process.is_doomed:
            process.is_doomed = True
            self._tally.kills += 1
            process.kill()

    # -- workers that start ------------------------------------------------------------------------

    def open(self) -> None:
        """Start all workers now, not when they are needed."""
        for _ in range(self._limits.workers - len(self._processes)):
            self._start()

    def _hire(self) -> None:
        """Start a worker, if that would help."""
        if (
            len(self._processes) < self._limits.workers
            and self._queued > self._starting
            and self._next_try is None
            and self._refusal is None
        ):
            self._start()

    def _start(self) -> None:
        assert self.starter is not None
        self._tokens += 1
        try:
            process = WorkerProcess(self._loop, self, self._tokens)
        except OSError as error:  # there are no descriptors left
            self._despair(f"could not be started: {error}", "")
            return
        self._processes[process.token] = process
        self._starting += 1
        if self._lost:
            self._lost -= 1
            self._tally.respawns += 1
        self.starter.start(process)

    def _has_started(self) -> None:
        """One worker fewer starts: it is ready, or will never be."""
        self._starting -= 1
        if not self._starting:
            calls, self._when_ready = self._when_ready, []
            for call in calls:
                call()

    def on_ready(self, call: Callable[[], None]) -> None:
        """Call `call` when no worker is starting any more."""
        if self._starting:
            self._when_ready.append(call)
        else:
            call()

    def on_started(self, token: int, pid: int, pidfd: int | None) -> None:
        """A worker runs, which is not to say that it is ready."""
        process = self._processes.get(token)
        if process is None:  # it has hung up already
            if pidfd is not None:
                os.close(pidfd)
            return
        process.started(pid, pidfd)
        process.let_go()
        if process.is_doomed:
            process.kill()

    def on_not_started(self, token: int, reason: str) -> None:
        """A worker could not be started."""
        process = self._processes.get(token)
        if process is not None:
            process.let_go()
            process.hang_up()
            logger.error("an offload worker could not be started: %s", reason)

    # -- what workers say --------------------------------------------------------------------------

    def on_frame(self, process: WorkerProcess, frame: Frame) -> None:
        """A worker has sent something."""
        kind = frame.kind
        if kind is _READY:
            self._bad_starts = 0
            process.is_ready = True
            self._has_started()
            self._employ(process)
            self._hire()  # another, if more wait
            return
        job = self._running.get(process)
        if kind >= _LOG:  # an enumeration's hash takes longer than all of this
            self._on_message(job, frame)
            return
        if job is None or frame.call != job.call:
            logger.error("offload worker %s answered a call that it was not given", process.pid)
            process.hang_up()
            return
        del self._running[process]
        if process.patience is not None:
            process.patience.cancel()
            process.patience = None
        self._tally.ran(job.started - job.began, _clock.monotonic() - job.started)
        if job.expired:
            if job.timer is not None:
                self._tell_late(job, process)
        else:
            job.let_go()
            if not job.outcome.done():
                job.outcome.set_result(frame)
        self._employ(process)

    def _employ(self, process: WorkerProcess) -> None:
        """Give a worker that is free the next call, unless it has had its share."""
        limits = self._limits
        # What it answered may have crossed the signal that kills it, or come after its end was told.
        if self._refusal is not None or process.is_doomed or process.exit_code is not None:
            process.hang_up()
            return
        # One call each: a limit that is too small for what they import must not keep all calls from running.
        if process.calls and (
            (limits.max_calls is not None and process.calls >= limits.max_calls)
            or (limits.max_rss is not None and process.resident > limits.max_rss)
        ):
            self._tally.recycled += 1
            process.is_recycled = True
            process.hang_up()
            return
        job = self._next()
        if job is None:
            self._idle.append(process)
        elif not self._give(job, process):
            self._waiting[job.options.priority] = {
                job.call: job,
                **self._waiting.get(job.options.priority, {}),
            }
            self._queued += 1
            self._hire()

    # -- workers that end --------------------------------------------------------------------------

    def on_hangup(self, process: WorkerProcess) -> None:
        """A worker's socket is closed, from either side."""
        if not process.is_ready:
            self._bad_starts += self._refusal is None
            self._has_started()
        if process in self._idle:
            self._idle.remove(process)
        if process.patience is not None:
            process.patience.cancel()
            process.patience = None
        if process.exit_code is None and process.pid is not None:
            # It has ended, or closed its socket and lives: that would be of no use to anybody.
            process.patience = self._loop.call_later(_ENDED_WITHIN, lambda: self._bury(process))
            if process in self._running:
                self._loop.call_later(_HUNG_UP_FOR, process.kill)
            elif not process.is_ready:
                process.kill()
        else:
            self._bury(process)

    def on_exit(self, pid: int, exit_code: int) -> None:
        """A worker has ended."""
        for process in self._processes.values():
            if process.pid == pid:
                process.exit_code = exit_code
                if process.has_hung_up:
                    self._bury(process)
                else:
                    process.drain()
                return

    def _bury(self, process: WorkerProcess) -> None:
        if self._processes.pop(process.token, None) is None:
            return
        job = self._running.pop(process, None)
        how = process.ending
        stack = process.read_stack() if job is not None and job.expired else process.read_crash()
        if job is not None:
            job.let_go()
            if job.expired:
                job.fail(OffloadTimeout(f"{job.label} did not end within {job.seconds:.3g} s", stack))
            elif self._refusal is not None:
                job.fail(OffloadError(f"{job.label} was stopped: {self._refusal}"))
            elif not job.outcome.done():
                self._tally.crashes += 1
                job.fail(WorkerCrashed(f"the worker that ran {job.label} {how}", process.exit_code, stack))
        process.close()
        self._lost += not process.is_recycled
        if self._refusal is not None:
            if not self._processes and self._when_empty is not None:
                self._when_empty()
        elif self._bad_starts >= _BAD_STARTS:
            self._despair(f"{how} before it was ready", stack)
        else:
            self._hire()
        if job is None and self._refusal is None and process.calls == 0 and process.exit_code != 0:
            logger.warning("an offload worker %s before its first call%s", how, f"\n{stack}" if stack else "")

    def _despair(self, how: str, stack: str) -> None:
        """Workers do not come up: tell those who wait, and try again when a moment has passed."""
        # If there are others, they will take them; when the last of those has ended we are here again.
        is_hopeless = not any(process.is_ready for process in self._processes.values())
        while is_hopeless and (job := self._next()) is not None:
            job.let_go()
            job.fail(WorkerCrashed(f"{job.label} was not begun: a new worker {how}", None, stack))
        if self._next_try is None:
            self._next_try = self._loop.call_later(_NEXT_TRY_AFTER, self._try_again)

    def _try_again(self) -> None:
        self._next_try = None
        self._hire()

    # -- the end -----------------------------------------------------------------------------------

    def refuse(self, reason: str) -> None:
        """Take no more calls: those that wait fail, those that run are interrupted, idle workers end."""
        if self._refusal is not None:
            return
        self._refusal = reason
        while (job := self._next()) is not None:
            job.let_go()
            job.fail(OffloadError(f"{job.label} was not begun: {reason}"))
        for process in [*self._processes.values()]:
            running = self._running.get(process)
            if running is None:
                process.hang_up()
            elif process.patience is None:
                self._interrupt(running, process, _AGAIN_AFTER)
                process.patience = self._loop.call_later(self._limits.grace, partial(self._kill, process))

    def on_empty(self, call: Callable[[], None]) -> None:
        """Call `call` when no worker is left."""
        self._when_empty = call
        if not self._processes:
            call()

    def abandon(self) -> None:
        """The loop is gone: end all workers without it."""
        for process in self._processes.values():
            process.kill()
            process.disown()
        self._processes.clear()
        self._running.clear()

    def disown(self) -> None:
        """In a forked child: none of this is ours."""
        for process in self._processes.values():
            process.disown()
        self._running.clear()

    def close(self) -> None:
        """End everything now."""
        self.refuse("its pool was closed")
        if self._next_try is not None:
            self._next_try.cancel()
        for process in [*self._processes.values()]:
            self._bury(process)
