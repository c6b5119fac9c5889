"""The thread on which stalls become reports.

Reading source files and calling users' hooks thus never happens on the loop, nor does it hold up the
watchdog's next look.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from asyncguard import _clock

__all__ = ["Reporter"]

logger = logging.getLogger("asyncguard.blocking")


class Reporter:
    """Makes calls, one after the other, on a thread that starts with the first of them.

    What comes in faster than it can be handled is dropped beyond `MOST_WAITING`: a service that stalls
    hundreds of times a second gains nothing from a longer list.

    Args:
        name: The name of its thread.
        each_minute: Called on the thread once a minute.

    Attributes:
        at_exit: Whether the process is ending: no thread can be started then, so that what comes is handled
            at once if none is running.
    """

    MOST_WAITING = 1000
    MINUTE = 60.0

    def __init__(self, name: str, each_minute: Callable[[], object]) -> None:
        self._name = name
        self._each_minute = each_minute
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.at_exit: bool = False
        self._starting = threading.Lock()
        self._finished = False
        self._ended = threading.Event()

    def put(self, call: Callable[[], object]) -> bool:
        """Have `call` made soon; never waits.

        Returns:
            `False` if it was dropped, since too many are waiting.

        Raises:
            RuntimeError: If the system has no thread to give.
        """
        if self._thread is None:
            if self.at_exit:
                self._make(call)
                return True
            with self._starting:  # the loop's thread and the watchdog may both be the first
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    thread.start()
                    self._thread = thread
                self._queue.put(call)
            return True
        if self._queue.qsize() >= self.MOST_WAITING:
            return False
        self._queue.put(call)
        return True

    @property
    def running(self) -> bool:
        """Whether there has been anything to do so far."""
        return self._thread is not None

    def flush(self) -> threading.Event:
        """What is set once all calls that were put before have been made."""
        if self._finished:
            return self._ended
        done = threading.Event()
        if self._thread is None:
            done.set()
        else:
            self._queue.put(done.set)
        return done

    def finish(self) -> None:
        """End the thread once it has made the calls that were put before."""
        self._finished = True
        if self._thread is None:
            self._ended.set()
        else:
            self._queue.put(None)

    def _run(self) -> None:
        next_minute = _clock.monotonic() + self.MINUTE
        while True:
            left = next_minute - _clock.monotonic()
            if left <= 0:
                self._make(self._each_minute)
                next_minute += self.MINUTE
                continue
            try:
                call = self._queue.get(timeout=left)
            except queue.Empty:
                continue
            if call is None:
                break
            self._make(call)
            del call  # hold no request while waiting for the next one
        self._ended.set()

    def _make(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            logger.exception("a stall could not be reported")
