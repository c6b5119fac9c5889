"""What a pool counts."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["BOUNDS", "Tally"]

BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""The upper bounds of the classes of the histograms, in seconds."""


class Tally:
    """How often what has happened.

    Attributes:
        calls: Calls that a worker has answered, with a result or an exception.
        refused: Calls that found the queue full.
        timeouts: Calls that ran out of time.
        cancelled: Calls that nobody waited for any more.
        crashes: Calls whose worker died by itself.
        kills: Workers that were ended, since they did not stop when told to.
        respawns: Workers that were started in place of one that had died.
        recycled: Workers that were replaced after `max_calls`, or for their memory.
        waits: How many calls waited for a worker for how long, in the classes of `BOUNDS` and one above.
        runs: How many calls ran for how long.
        waited: The seconds that calls have waited, in all.
        ran_for: The seconds that they have run.
    """

    def __init__(self) -> None:
        self.calls: int = 0
        self.refused: int = 0
        self.timeouts: int = 0
        self.cancelled: int = 0
        self.crashes: int = 0
        self.kills: int = 0
        self.respawns: int = 0
        self.recycled: int = 0
        self.waits: list[int] = [0] * (len(BOUNDS) + 1)
        self.runs: list[int] = [0] * (len(BOUNDS) + 1)
        self.waited: float = 0.0
        self.ran_for: float = 0.0

    def ran(self, wait: float, run: float) -> None:
        """A call was answered after so many seconds of waiting and of running."""
        self.calls += 1
        self.waits[bisect_left(BOUNDS, wait)] += 1
        self.runs[bisect_left(BOUNDS, run)] += 1
        self.waited += wait
        self.ran_for += run

    @property
    def mean_run(self) -> float:
        """For how many seconds a call runs; 1 before the first has ended."""
        return self.ran_for / self.calls if self.calls else 1.0
