"""The scheduler's record of what has been begun, so that nothing is run twice.

Dask runs a task again when its worker has died, or has gone with the result; how often, and whether, is the
scheduler's to say, for all who use it. So a task of ours asks before it begins, and is told "yes" once. The
record of a task lives as long as the scheduler knows the task: until the server has its result, gave it up,
or is gone.
"""

from __future__ import annotations

import contextlib
from typing import Any

from distributed import Scheduler, SchedulerPlugin

__all__ = ["CLAIM", "NAME", "Once"]

NAME = "asyncguard-once-1"
"""What it is called on the scheduler; with a number, for when servers and scheduler differ in version."""
CLAIM = "asyncguard_claim_1"


class Once(SchedulerPlugin):
    """Answers workers that ask whether they may begin."""

    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """See `SchedulerPlugin`."""
        self._scheduler: Any = scheduler
        self._begun: dict[Any, str] = {}
        scheduler.handlers[CLAIM] = self.claim

    async def claim(self, key: str, worker: str) -> list[str]:
        """A worker is about to begin a call.

        Returns:
            Nothing if it may; else where it has been begun, or an empty text if nobody waits for it.
        """
        task = self._scheduler.tasks.get(key)
        if task is None:
            return [""]
        if key in self._begun:
            return [self._begun[key]]
        self._begun[key] = worker
        # So that the scheduler does not try it elsewhere, only to be told no: the next death is one too many.
        with contextlib.suppress(AttributeError):
            task.suspicious = max(task.suspicious, self._scheduler.allowed_failures)
        return []

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """See `SchedulerPlugin`."""
        if finish == "forgotten":
            self._begun.pop(key, None)
