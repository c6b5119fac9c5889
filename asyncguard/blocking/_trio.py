"""The probe for trio: an instrument, which trio itself calls around each poll and each step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

from trio._core._run import unrolled_run
from trio.abc import Instrument
from trio.lowlevel import Task, add_instrument, current_trio_token, remove_instrument

from asyncguard import _clock
from asyncguard._request import RequestRecord

if TYPE_CHECKING:
    from asyncguard.blocking._watch import LoopWatch

__all__ = ["TrioProbe"]

_UNROLLED_RUN = unrolled_run.__code__
"""trio's scheduler: every task's step runs below it."""


class TrioProbe(Instrument):
    """Times each pass of trio's scheduler, and notes which task is running."""

    def __init__(self, watch: LoopWatch) -> None:
        self.outside: int = 0
        self._watch = watch
        self._held_since: float | None = None
        self._polling_since = 0.0
        self._resting = False
        self._task: Task | None = None

    def attach(self) -> None:
        self._held_since = _clock.monotonic()
        add_instrument(self)

    def held_since(self) -> float | None:
        return self._held_since

    def runner(self) -> Any:
        return self._task

    def hold_began(self, turn: float) -> float:
        return max(self._held_since or turn, self._watch.stalled_until)

    def aftermath_began(self) -> None:
        """Nothing to do: it is asked for in each pass."""

    def resumed(self) -> Iterable[RequestRecord]:
        return ()  # each step is told of: see below

    def threshold_changed(self) -> None:
        """Nothing to do: it is asked for in each pass."""

    def mark(self, now: float, cpu: float | None) -> None:
        self._watch.load.mark(now)

    def rest(self) -> bool:
        # In this order: a pass that begins meanwhile sees one or is seen.
        self._resting = True
        self._resting = self._held_since is None
        return self._resting

    def end_rest(self) -> None:
        """Nothing to do: the pass that it begins in has done so."""

    def pause(self) -> None:
        """Nothing to do: trio's runs do not pause."""

    def detach(self) -> None:
        self.forget()
        # Gone already if trio's run has ended.
        with contextlib.suppress(KeyError, RuntimeError):
            remove_instrument(self)

    def forget(self) -> None:
        self._held_since = self._task = None

    # -- called by trio --------------------------------------------------------------------------

    def before_io_wait(self, timeout: float) -> None:
        watch, since, now = self._watch, self._held_since, _clock.monotonic()
        if since is not None:
            watch.load.busy += now - since
            watch.load.delay += (now - since) ** 2 / 2
            if now - max(since, watch.stalled_until) >= watch.threshold:
                watch.stalled(max(since, watch.stalled_until), now)
        if watch.aftermath is not None:
            if timeout <= 0:
                watch.settle()
            elif since is not None and watch.stalled_until > since:
                # Have the coming poll return at once, with whatever became ready during the stall.
                current_trio_token().run_sync_soon(_no_operation)
                watch.settle()
            else:
                watch.close_aftermath()
        # Not before: the watchdog forgets what it saw as soon as nothing holds the loop.
        self._held_since = None
        self._polling_since = now

    def after_io_wait(self, timeout: float) -> None:
        self._held_since = now = _clock.monotonic()
        if now - self._polling_since >= self._watch.threshold:
            self._watch.note_long_poll(self._polling_since, now)
        if self._resting:
            self._resting = False
            self._watch.wake(now)

    def before_task_step(self, task: Task) -> None:
        if self._watch.aftermath is not None:
            self._watch.note_step(task)
        if not self.outside:
            frame: FrameType | None = sys._getframe()
            while frame is not None and frame.f_code is not _UNROLLED_RUN:
                frame = frame.f_back
            self.outside = id(frame)
        self._task = task

    def after_task_step(self, task: Task) -> None:
        self._task = None

    def after_run(self) -> None:
        self._watch.end_from_outside()


def _no_operation() -> None:
    pass
