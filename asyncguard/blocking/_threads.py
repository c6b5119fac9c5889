"""The other threads of the process: which of them computed while the loop's thread did not get on.

Only one thread at a time runs Python code, the one that has the global interpreter lock (GIL). If it is in C
code that does not let it go, the loop's thread waits, and no line of its own is to blame.
"""

from __future__ import annotations

import sys

from asyncguard._frames import raw_frames
from asyncguard.blocking._lookups import living_threads, thread_cpu
from asyncguard.blocking._stall import Others, OtherThread

__all__ = ["OtherThreads"]

_MOST = 4
_LITTLE = 0.001


class OtherThreads:
    """Compares what threads have used of the CPU with what they had used before.

    Args:
        apart_from: The identifiers of the threads that are none of the others.
    """

    def __init__(self, apart_from: set[int]) -> None:
        self.apart_from = apart_from
        self._used: dict[int, float] = {}

    def begin_anew(self) -> None:
        """Take down what each has used so far."""
        self._used = {ident: cpu for ident, _, cpu in self._clocks()}

    def computing(self) -> Others:
        """Those that have used CPU since, the busiest first; read with what they are doing now."""
        used = [
            (cpu - self._used.get(ident, 0.0), ident, name)
            for ident, name, cpu in self._clocks()
            if cpu - self._used.get(ident, 0.0) >= _LITTLE
        ]
        if not used:
            return ()
        frames = sys._current_frames()
        return tuple(
            OtherThread(name, raw_frames(frames.get(ident)), cpu)
            for cpu, ident, name in sorted(used, reverse=True)[:_MOST]
        )

    def _clocks(self) -> list[tuple[int, str, float]]:
        return [
            (ident, thread.name, cpu)
            for ident, thread in living_threads().items()
            if ident not in self.apart_from and (cpu := thread_cpu(thread.native)) is not None
        ]
