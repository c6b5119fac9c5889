"""The thread on which stalls become reports.

Reading source files and calling users' hooks thus never happens on the loop, nor does it hold up the
watchdog's next look.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from asyncguard.blocking._stall import Stall

__all__ = ["Reporter"]

logger = logging.getLogger("asyncguard.blocking")


class Reporter:
    """Hands stalls to listeners, one after the other, on a thread that starts with the first of them.

    What comes in faster than listeners take it is dropped beyond `MOST_WAITING`: a service that stalls
    hundreds of times a second gains nothing from a longer list.

    Args:
        name: The name of the loop's thread, for the name of this one.
    """

    MOST_WAITING = 1000

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Callable[[Stall], None], Stall] | None]
        self._queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether there may be something left to hand over."""
        return self._thread is not None and self._thread.is_alive()

    def put(self, listener: Callable[[Stall], None], stall: Stall) -> None:
        """Have `listener` called with `stall` soon; never waits."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"asyncguard-reporter-{self._name}", daemon=True
            )
            self._thread.start()
        if self._queue.qsize() < self.MOST_WAITING:
            self._queue.put((listener, stall))

    def finish(self) -> None:
        """End the thread once it has handed over what was put before."""
        if self._thread is not None:
            self._queue.put(None)

    def join(self, timeout: float) -> None:
        """Wait, in any other thread, until everything was handed over or `timeout` seconds have passed."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            listener, stall = item
            try:
                listener(stall)
            except Exception:
                logger.exception("a stall could not be reported")
            # Hold no request while waiting for the next stall.
            del item, listener, stall
