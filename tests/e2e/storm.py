"""A loop that stalls hundreds of times a second, with and without a monitor by turns: what does that cost?

``python -m tests.e2e.storm LOOP HOOK`` prints what came of it as a line of JSON. The hook is ``quick``, or
``slow`` as long as the storm lasts.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import threading
import time

import uvloop

from asyncguard import BlockReport, LoopMonitor

_SECONDS = 10.0
"""Of stalls under watch, all together; as many again without."""

_ROUNDS = 4
_STALL = 0.0015
_PERIOD = 0.002
"""500 a second, as far as the machine sleeps on time."""

_THRESHOLD = 0.001


class Counting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


async def stall(seconds: float) -> tuple[int, float]:
    """Stall again and again; returns how often, and how many times a second."""
    count = 0
    began = due = time.perf_counter()
    while time.perf_counter() - began < seconds:
        time.sleep(_STALL)
        count += 1
        due += _PERIOD
        while True:
            await asyncio.sleep(0)
            if time.perf_counter() >= due:
                break
        due = max(due, time.perf_counter() - _PERIOD)
    return count, count / (time.perf_counter() - began)


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def main(hook: str) -> None:
    hooked = 0
    over = threading.Event()

    def on_block(report: BlockReport) -> None:
        nonlocal hooked
        hooked += 1
        if hook == "slow":
            over.wait(0.05)

    handler = Counting()
    logger = logging.getLogger("asyncguard.blocking")
    logger.addHandler(handler)
    logger.propagate = False
    monitor = LoopMonitor(threshold=_THRESHOLD, on_block=on_block)
    stalls, bare, guarded = 0, list[float](), list[float]()
    memory: list[int] = []
    for _ in range(_ROUNDS):
        bare.append((await stall(_SECONDS / _ROUNDS))[1])
        async with monitor:
            over.clear()
            count, rate = await stall(_SECONDS / _ROUNDS)
            over.set()
        stalls += count
        guarded.append(rate)
        gc.collect()
        memory.append(resident())
    # What the reporter has not got to yet.
    deadline = time.monotonic() + 60
    while (seen := told(monitor)) < stalls and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    print(
        json.dumps(
            {
                "stalls": stalls,
                "bare": bare,
                "guarded": guarded,
                "reported": hooked,
                "told": seen,
                "excused": dict(monitor.excused),
                "dropped": monitor.dropped,
                "lines": len(monitor.lines),
                "logged": handler.count,
                "growth": memory[-1] - memory[0],
            }
        )
    )


def told(monitor: LoopMonitor) -> int:
    """How many stalls were reported, excused or dropped."""
    reported = sum(line.count for line in monitor.lines)
    return reported + sum(monitor.excused.values()) + monitor.dropped


if __name__ == "__main__":
    factory = uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(sys.argv[2]))
