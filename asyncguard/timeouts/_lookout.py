"""One timer for all requests with the same limit, since nearly all of them are answered in time."""

from __future__ import annotations

import logging
import math
from typing import Protocol

from asyncguard import _clock
from asyncguard.timeouts._loops import Loop

__all__ = ["Lookout"]

logger = logging.getLogger("asyncguard.timeouts")


class Overdue(Protocol):
    """A request that was waited for."""

    def look(self) -> None:
        """So many seconds have passed."""


class Lookout:
    """Looks after the requests of one loop that are not over after so many seconds.

    They come in the order in which they will be due: a request costs an entry in a dictionary instead of a
    timer of its own, and there is one timer at most.

    Args:
        loop: The loop.
        seconds: After how many seconds to look; plus infinity for never.
    """

    def __init__(self, loop: Loop, seconds: float) -> None:
        self.loop: Loop = loop
        self.seconds: float = seconds
        self._due: dict[Overdue, float] = {}
        self._waits = seconds == math.inf

    def add(self, request: Overdue, now: float) -> float:
        """Call ``request.look()`` when the seconds have passed, unless it is removed before.

        Returns:
            When that will be.
        """
        self._due[request] = due = now + self.seconds
        if not self._waits:
            self._waits = True
            self.loop.call_later(self.seconds, self._look)
        return due

    def remove(self, request: Overdue) -> None:
        """Forget a request, if it has not been looked after yet."""
        self._due.pop(request, None)

    def _look(self) -> None:
        now = _clock.monotonic()
        while self._due:
            request, due = next(iter(self._due.items()))
            if due > now:
                self.loop.call_later(due - now, self._look)
                return
            del self._due[request]
            try:
                request.look()
            except Exception:
                logger.exception("asyncguard failed at a deadline")
        self._waits = False
