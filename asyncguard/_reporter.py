"""The thread on which what was seen becomes reports.

Reading source files and calling users' hooks thus never happens on the loop, nor does it hold up the
watchdog's next look.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import anyio

from asyncguard import _clock

__all__ = ["FLUSH_TIMEOUT", "Reporter", "until_set"]

FLUSH_TIMEOUT = 2.0
"""For how many seconds the last reports are waited for: a hook may hang."""


async def until_set(event: threading.Event) -> None:
    """Wait until another thread has set `event`, whatever is cancelled; for `FLUSH_TIMEOUT` at most."""
    with anyio.move_on_after(FLUSH_TIMEOUT, shield=True):
        while not event.is_set():  # noqa: ASYNC110 - it is set by another thread
            await anyio.sleep(0.005)


class Reporter:
    """Makes calls, one after the other, on a thread that starts with the first of them.

    What comes in faster than it can be handled is dropped beyond `MOST_WAITING`: a service with hundreds of
    reports a second gains nothing from a longer list.

    Args:
        name: The name of its thread.
        logger: Where a call that fails is logged.
        each_minute: Called on the thread once a minute. Without it, the thread ends when it has had nothing
            to do for `LINGER` seconds, and another one starts with the next call.

    Attributes:
        at_exit: Whether the process is ending: no thread can be started then, so that what comes is handled
            at once if none is running.
    """

    MOST_WAITING = 1000
    MINUTE = 60.0
    LINGER = 5.0

    def __init__(
        self, name: str, logger: logging.Logger, each_minute: Callable[[], object] | None = None
    ) -> None:
        self._name = name
        self._logger = logger
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
        if self._thread is None and self.at_exit:
            self._make(call)
            return True
        if self._queue.qsize() >= self.MOST_WAITING:
            return False
        with self._starting:  # several threads may be the first, and the thread may be about to end
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            self._queue.put(call)
        return True

    @property
    def running(self) -> bool:
        """Whether its thread runs: there has been something to do."""
        return self._thread is not None

    def flush(self) -> threading.Event:
        """What is set once all calls that were put before have been made."""
        done = threading.Event()
        with self._starting:
            if self._finished:
                return self._ended
            if self._thread is None:
                done.set()
            else:
                self._queue.put(done.set)
        return done

    def finish(self) -> None:
        """End the thread once it has made the calls that were put before."""
        with self._starting:
            self._finished = True
            if self._thread is None:
                self._ended.set()
            else:
                self._queue.put(None)

    def _run(self) -> None:
        next_minute = _clock.monotonic() + self.MINUTE
        while True:
            left = self.LINGER if self._each_minute is None else next_minute - _clock.monotonic()
            if left <= 0 and self._each_minute is not None:
                self._make(self._each_minute)
                next_minute += self.MINUTE
                continue
            try:
                call = self._queue.get(timeout=left)
            except queue.Empty:
                if self._each_minute is None and self._is_idle():
                    return
                continue
            if call is None:
                break
            self._make(call)
            del call  # hold no request while waiting for the next one
        self._ended.set()

    def _is_idle(self) -> bool:
        """Whether the thread may end: from then on `put` starts another."""
        with self._starting:
            idle = self._queue.empty()
            if idle:
                self._thread = None
        return idle

    def _make(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            self._logger.exception("a report could not be made")
