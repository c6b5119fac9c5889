"""The probe for trio: an instrument, which trio itself calls around each poll and each step."""

from __future__ import annotations

import contextlib
import sys
from types import FrameType
from typing import TYPE_CHECKING

from trio._core._run import unrolled_run
from trio.abc import Instrument
from trio.lowlevel import Task, add_instrument, current_trio_token, remove_instrument

from asyncguard import _clock
from asyncguard.blocking._lookups import RunningTask

if TYPE_CHECKING:
    from asyncguard.blocking._watch import LoopWatch

__all__ = ["TrioProbe"]

_UNROLLED_RUN = unrolled_run.__code__
"""trio's scheduler: every task's step runs below it."""


class TrioProbe(Instrument):
    """Times each pass of trio's scheduler, and notes whose context is running."""

    def __init__(self, watch: LoopWatch) -> None:
        self.outside = 0
        self._watch = watch
        self._held_since: float | None = _clock.monotonic()
        add_instrument(self)

    def held_since(self) -> float | None:
        return self._held_since

    def long_turn(self, since: float, until: float) -> None:
        """Nothing to do: the pass that it belongs to is timed as a whole."""

    def detach(self) -> None:
        self._held_since = None
        # Gone already if trio's run has ended.
        with contextlib.suppress(KeyError, RuntimeError):
            remove_instrument(self)

    def before_io_wait(self, timeout: float) -> None:
        since, self._held_since = self._held_since, None
        now = _clock.monotonic()
        if since is not None and now - since >= self._watch.threshold:
            self._watch.stalled(since, now)
            # Have the coming poll return at once, with whatever became ready during the stall.
            current_trio_token().run_sync_soon(_no_operation)
        elif self._watch.aftermath is not None:
            self._watch.settle()
            if timeout > 0:
                self._watch.close_aftermath()

    def after_io_wait(self, timeout: float) -> None:
        self._held_since = _clock.monotonic()

    def before_task_step(self, task: Task) -> None:
        if not self.outside:
            frame: FrameType | None = sys._getframe()
            while frame is not None and frame.f_code is not _UNROLLED_RUN:
                frame = frame.f_back
            self.outside = id(frame)
        self._watch.trio_task = RunningTask(id(task), task.context)

    def after_task_step(self, task: Task) -> None:
        self._watch.trio_task = None


def _no_operation() -> None:
    pass
