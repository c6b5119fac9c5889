"""What the operating system says of a thread: how long it computed, and how long it queued for a core."""

from __future__ import annotations

import os
import sys
import time
from typing import NamedTuple

__all__ = ["ThreadVitals", "Vitals"]


class Vitals(NamedTuple):
    """A reading, in seconds since the thread began.

    Attributes:
        cpu: Time on a core.
        queued: Time ready to run while others had the core; 0 where the system does not tell.
    """

    cpu: float
    queued: float


class ThreadVitals:
    """Reads one thread's vitals from any thread.

    The CPU clock is POSIX's ``pthread_getcpuclockid``. The queueing time is the second number of
    Linux's ``/proc/PID/task/TID/schedstat``
    (https://docs.kernel.org/scheduler/sched-stats.html). Where the system offers neither, the
    readings stay 0.

    Args:
        ident: The thread's `threading.get_ident()`.
        native_id: Its `threading.get_native_id()`.
    """

    def __init__(self, ident: int, native_id: int) -> None:
        self._clock: int | None = None
        self._schedstat: int | None = None
        if sys.platform != "win32" and hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(ident)
        if sys.platform == "linux":
            try:
                self._schedstat = os.open(f"/proc/self/task/{native_id}/schedstat", os.O_RDONLY)
            except OSError:
                self._schedstat = None

    def read(self) -> Vitals:
        """Read both; a thread that has ended reads as 0."""
        return Vitals(self._read_cpu(), self._read_queued())

    def close(self) -> None:
        """Give the descriptor back; further readings are 0."""
        descriptor, self._schedstat, self._clock = self._schedstat, None, None
        if descriptor is not None:
            os.close(descriptor)

    def _read_cpu(self) -> float:
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0

    def _read_queued(self) -> float:
        if self._schedstat is None:
            return 0.0
        try:
            return int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0
