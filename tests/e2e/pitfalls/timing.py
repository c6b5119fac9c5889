"""How long a line of the scenarios blocks: chosen beforehand, and measured by the scenario itself."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque

__all__ = ["taken", "timed", "timed_until_free", "units"]

_MARGIN = 1.15
"""A noisy machine may be faster than it was when it was measured: aim a little too high."""

_taken: dict[str, float] = {}
_rates: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=3))


def units(name: str, seconds: float, *, first: int = 1000) -> int:
    """How much work of a kind takes about `seconds`, as the last runs of it have shown.

    Args:
        name: The kind of work.
        seconds: How long it is to take.
        first: What to answer as long as there was no run yet.
    """
    rates = _rates[name]
    return math.ceil(max(rates) * seconds * _MARGIN) if rates else first


class timed:  # noqa: N801 - it reads like a function
    """Measures a ``with`` block; in it is the line that is to blame, and nothing else.

    Args:
        name: The scenario.
        work: How many `units` the block works off, so that the next run can be planned.
    """

    def __init__(self, name: str, work: int = 0) -> None:
        self._name = name
        self._work = work
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self._began
        _taken[self._name] = took
        if self._work:
            _rates[self._name].append(self._work / took)


def timed_until_free(name: str, work: int) -> None:
    """Measure from here to the loop's next callback: what the framework does after an endpoint's return."""
    block = timed(name, work)
    asyncio.get_running_loop().call_soon(block.__exit__)
    block.__enter__()


async def taken(name: str) -> float:
    """How long the scenario blocked, once it has: some do so after their response."""
    while name not in _taken:
        await asyncio.sleep(0.002)
    return _taken.pop(name)
