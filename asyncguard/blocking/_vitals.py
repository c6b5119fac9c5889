"""What the system says of the threads of a watched loop: who computed, who queued for a core, who waited.

The CPU clock of a thread is POSIX's ``pthread_getcpuclockid``. How long it queued for a core, and how
often it was given one, are the second and the third number of Linux's ``/proc/PID/task/TID/schedstat``
(https://docs.kernel.org/scheduler/sched-stats.html). Where the system does not tell, the CPU time is
`None` and the others stay 0.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from typing import NamedTuple

from asyncguard import _clock

__all__ = ["LoopVitals", "Reading", "kept_waking"]


class Reading(NamedTuple):
    """All of it at one moment; the difference of two readings is what happened between them.

    Attributes:
        at: The moment, on the monotonic clock.
        cpu: Seconds of CPU that the loop's thread has used; `None` if unknown.
        queued: Seconds for which it was ready to run while others had the cores.
        turns: How often it was given a core.
        process_cpu: Seconds of CPU that all threads of the process have used.
        collecting: Seconds that garbage collections on the loop's thread have taken.
        watchdog_turns: How often the watchdog's thread was given a core.
        overslept: Seconds by which the watchdog woke too late, all together.
        resting_turns: How often the resting thread was given a core, which asks for none.
    """

    at: float
    cpu: float | None
    queued: float
    turns: int
    process_cpu: float
    collecting: float
    watchdog_turns: int
    overslept: float
    resting_turns: int = 0

    def since(self, before: Reading) -> Reading:
        """What happened from `before` to this reading."""
        return Reading(
            at=self.at - before.at,
            cpu=None if self.cpu is None or before.cpu is None else self.cpu - before.cpu,
            queued=self.queued - before.queued,
            turns=self.turns - before.turns,
            process_cpu=self.process_cpu - before.process_cpu,
            collecting=self.collecting - before.collecting,
            watchdog_turns=self.watchdog_turns - before.watchdog_turns,
            overslept=self.overslept - before.overslept,
            resting_turns=self.resting_turns - before.resting_turns,
        )


class LoopVitals:
    """Takes readings of a loop's thread, which is the one that makes this object, and of its watchdog's.

    Readings may be taken from any thread.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._clock = _cpu_clock(self._thread)
        self._loop_stat = _open_schedstat()
        self._watchdog_stat: int | None = None
        self._resting_stat: int | None = None
        self._turns_to_rest = 0
        self._open = threading.Lock()
        self._open.acquire()
        self._collecting = 0.0
        self._collection_began: float | None = None
        gc.callbacks.append(self._on_collection)

    def watchdog_is_here(self) -> None:
        """To be called on the watchdog's thread, once."""
        self._watchdog_stat = _open_schedstat()

    def rest(self) -> None:
        """To be called on a thread with nothing else to do; returns once this object is closed.

        Nothing wakes that thread but a stop of the whole process, and its end: each has every thread
        stop, or go on, by itself.
        """
        stat = _open_schedstat()
        self._turns_to_rest = _read_schedstat(stat)[1]
        self._resting_stat = stat
        self._open.acquire()

    def read(self, overslept: float) -> Reading:
        """Take a reading; `overslept` is for the watchdog to tell."""
        queued, turns = _read_schedstat(self._loop_stat)
        return Reading(
            at=_clock.monotonic(),
            cpu=_read_clock(self._clock),
            queued=queued,
            turns=turns,
            process_cpu=time.process_time(),
            collecting=self._collecting,
            watchdog_turns=_read_schedstat(self._watchdog_stat)[1],
            overslept=overslept,
            resting_turns=max(0, _read_schedstat(self._resting_stat)[1] - self._turns_to_rest),
        )

    def cpu(self) -> float | None:
        """Seconds of CPU that the loop's thread has used; read without letting the GIL go."""
        return _read_clock(self._clock)

    def close(self) -> None:
        """Give everything back. A reading that is being taken elsewhere may lack some of its numbers."""
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)
        descriptors = (self._loop_stat, self._watchdog_stat, self._resting_stat)
        self._clock = self._loop_stat = self._watchdog_stat = self._resting_stat = None
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)
        if self._open.locked():
            self._open.release()

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        now = _clock.monotonic()
        if phase == "start":
            self._collection_began = now
        elif self._collection_began is not None:
            self._collecting += now - self._collection_began
            self._collection_began = None


def kept_waking(turns: int, seconds: float) -> bool:
    """Whether a thread that did not get on was waiting for the GIL, rather than for anything else.

    A thread that waits for the GIL wakes once per switch interval to ask for it; one that sleeps, waits
    for I/O or is stopped does not. Always `False` where the system does not count turns.
    """
    return seconds > 0 and turns >= seconds / sys.getswitchinterval() / 4


def _cpu_clock(thread: int) -> int | None:
    if sys.platform != "win32" and hasattr(time, "pthread_getcpuclockid"):
        return time.pthread_getcpuclockid(thread)
    return None  # pragma: no cover - Windows and macOS


def _read_clock(clock: int | None) -> float | None:
    if clock is None:
        return None
    try:
        return time.clock_gettime(clock)
    except OSError:
        return None  # the thread has ended


def _open_schedstat() -> int | None:
    if sys.platform != "linux":
        return None  # pragma: no cover - not Linux
    try:
        return os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
    except OSError:
        return None


def _read_schedstat(descriptor: int | None) -> tuple[float, int]:
    if descriptor is None:
        return 0.0, 0
    try:
        _, queued, turns = os.pread(descriptor, 96, 0).split()
        return int(queued) / 1e9, int(turns)
    except (OSError, ValueError):
        return 0.0, 0  # the thread has ended, or the kernel was built without it
