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
        name: The name of its thread.

    Attributes:
        at_exit: Whether the process is ending: no thread can be started then, so that what comes is handed
            over at once if none is running.
    """

    MOST_WAITING = 1000

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Callable[[Stall], None], Stall] | threading.Event | None]
        self._queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.at_exit: bool = False
        self._finished = False
        self._ended = threading.Event()

    def put(self, listener: Callable[[Stall], None], stall: Stall) -> None:
        """Have `listener` called with `stall` soon; never waits.

        Raises:
            RuntimeError: If the system has no thread to give.
        """
        if self._thread is None:
            if self.at_exit:
                self._hand_over(listener, stall)
                return
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        if self._queue.qsize() < self.MOST_WAITING:
            self._queue.put((listener, stall))

    def flush(self) -> threading.Event:
        """What is set once all that was put before has been handed over."""
        if self._finished:
            return self._ended
        done = threading.Event()
        if self._thread is None:
            done.set()
        else:
            self._queue.put(done)
        return done

    def finish(self) -> None:
        """End the thread once it has handed over what was put before."""
        self._finished = True
        if self._thread is None:
            self._ended.set()
        else:
            self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._hand_over(*item)
            del item  # hold no request while waiting for the next stall
        self._ended.set()

    def _hand_over(self, listener: Callable[[Stall], None], stall: Stall) -> None:
        try:
            listener(stall)
        except Exception:
            logger.exception("a stall could not be reported")
