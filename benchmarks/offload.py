"""What a call in another process costs, next to what is usually used: `scripts/bench offload`.

All of them take turns within one run, with the same number of workers. The floor is what is possible at
all: two processes, a socket pair, `add_reader`, and a pickle each way.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import pickle
import platform
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from multiprocessing import get_context
from typing import Any

import anyio.to_process

from asyncguard import OffloadPool, offload
from benchmarks.offloaded import echo, size, spin
from benchmarks.summary import Budget, Spread, ratios, table

__all__ = ["WAYS", "measure"]

WORKERS = 2
CALLERS = 100
LARGE = 100 << 20
SPIN = 0.5

MOST_TIMES_THE_FLOOR = 1.5
LEAST_TIMES_THE_EXECUTOR = 3.0
MOST_TIMES_A_COPY = 8.0
MOST_STALL = 5.0
MOST_UNTIL_READY = 2.0

TITLES = {
    "one": ("one call after the other: microseconds each", "floor", 1),
    "many": (f"{CALLERS} callers: calls a second", "ProcessPoolExecutor", 0),
    "ready": ("a call is cancelled: milliseconds until its worker has answered another", "asyncguard", 1),
    "large": ("a NumPy array of 100 MB in: milliseconds", "memcpy", 1),
    "stall": ("the longest stall of the loop meanwhile: milliseconds", "asyncguard", 1),
}
"""What is measured: the title of its table, what the others are compared with, and digits."""

Call = Callable[..., Awaitable[Any]]


_FLOOR = """
import pickle, socket, struct, sys
wire = socket.socket(fileno=int(sys.argv[1]))
while data := wire.recv(65536):
    _, value = pickle.loads(data[8:])
    answer = pickle.dumps(value, 5)
    wire.send(struct.pack("<Q", len(answer)) + answer)
"""


@asynccontextmanager
async def floor(_: int) -> AsyncIterator[Call]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    command = [sys.executable, "-c", _FLOOR, str(theirs.fileno())]
    loop, answers = asyncio.get_running_loop(), list[asyncio.Future[Any]]()
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: ASYNC220 - before anything is measured

    def read() -> None:
        answers.pop().set_result(pickle.loads(ours.recv(65536)[8:]))

    async def call(_: Any, value: Any) -> Any:
        answers.append(loop.create_future())
        data = pickle.dumps(("echo", value), 5)
        ours.send(struct.pack("<Q", len(data)) + data)
        return await answers[0]

    loop.add_reader(ours, read)
    try:
        yield call
    finally:
        loop.remove_reader(ours)
        ours.close()
        process.wait()


@asynccontextmanager
async def asyncguards(workers: int) -> AsyncIterator[Call]:
    async with OffloadPool(workers, nice=0):
        offloaded = {function: offload(function) for function in (echo, size, spin)}
        yield lambda function, value: offloaded[function](value)


@asynccontextmanager
async def executor(workers: int) -> AsyncIterator[Call]:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        yield lambda function, value: loop.run_in_executor(pool, function, value)


@asynccontextmanager
async def loky(workers: int) -> AsyncIterator[Call]:
    library = importlib.import_module("loky")
    pool = library.get_reusable_executor(max_workers=workers)
    try:
        yield lambda function, value: asyncio.wrap_future(pool.submit(function, value))
    finally:
        pool.shutdown(wait=True, kill_workers=True)


@asynccontextmanager
async def pebble(workers: int) -> AsyncIterator[Call]:
    library = importlib.import_module("pebble")
    with library.ProcessPool(workers, context=get_context("forkserver")) as pool:
        yield lambda function, value: asyncio.wrap_future(pool.submit(function, None, value))


@asynccontextmanager
async def anyios(workers: int) -> AsyncIterator[Call]:
    limiter = anyio.CapacityLimiter(workers)
    yield lambda function, value: anyio.to_process.run_sync(
        function, value, limiter=limiter, cancellable=True
    )


@asynccontextmanager
async def threads(_: int) -> AsyncIterator[Call]:
    yield lambda function, value: asyncio.to_thread(function, value)


WAYS: dict[str, Callable[[int], AbstractAsyncContextManager[Call]]] = {
    "floor": floor,
    "asyncguard": asyncguards,
    "ProcessPoolExecutor": executor,
    "loky": loky,
    "pebble": pebble,
    "anyio.to_process": anyios,
    "asyncio.to_thread": threads,
}


async def one_after_the_other(call: Call, calls: int) -> float:
    """Microseconds for each of some calls."""
    began = time.perf_counter()
    for number in range(calls):
        await call(echo, number)
    return (time.perf_counter() - began) / calls * 1e6


async def at_once(call: Call, calls: int) -> float:
    """Calls in a second, of many callers."""

    async def caller() -> None:
        for number in range(calls // CALLERS):
            await call(echo, number)

    began = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(CALLERS)])
    return calls / (time.perf_counter() - began)


async def large(call: Call, value: Any) -> tuple[float, float]:
    """Milliseconds for one call with a large argument, and the longest stall of the loop meanwhile."""
    longest, ends = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not ends:
            before = time.perf_counter()
            await asyncio.sleep(0.0005)
            longest = max(longest, time.perf_counter() - before - 0.0005)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.005)
    longest, began = 0.0, time.perf_counter()
    await call(size, value)
    took = time.perf_counter() - began
    ends = True
    await watching
    return took * 1e3, longest * 1e3


async def ready_again(call: Call) -> float:
    """Milliseconds from the cancellation of a call until the only worker has answered another one."""
    await call(echo, 0)
    given_up = asyncio.ensure_future(call(spin, SPIN))
    await asyncio.sleep(SPIN / 5)  # it has begun long ago
    began = time.perf_counter()
    given_up.cancel()
    await call(echo, 0)
    took = time.perf_counter() - began
    await asyncio.wait([given_up])
    return took * 1e3


async def measure(rounds: int, calls: int, size_of_large: int = LARGE) -> dict[str, dict[str, list[float]]]:
    """All figures, by what was measured and by the way, round for round."""
    numpy: Any = importlib.import_module("numpy")
    array = numpy.ones(size_of_large, dtype=numpy.uint8)
    copy = numpy.zeros_like(array)
    numpy.copyto(copy, array)  # so that the system has found the memory before it is timed
    found: dict[str, dict[str, list[float]]] = {what: {} for what in TITLES}
    found["large"]["memcpy"] = []
    for _ in range(rounds):
        began = time.perf_counter()
        numpy.copyto(copy, array)
        found["large"]["memcpy"].append((time.perf_counter() - began) * 1e3)
        for name, way in WAYS.items():
            try:
                async with way(WORKERS) as call:
                    await one_after_the_other(call, 10)
                    if name != "floor":
                        await at_once(call, CALLERS)  # all workers have come up
                    sample = {"one": await one_after_the_other(call, calls)}
                    if name != "floor":
                        sample["many"] = await at_once(call, max(calls, CALLERS))
                        await large(call, array)
                        sample["large"], sample["stall"] = await large(call, array)
                if name not in ("floor", "asyncio.to_thread"):
                    async with way(1) as call:
                        sample["ready"] = await ready_again(call)
            except ModuleNotFoundError:
                continue
            for what, value in sample.items():
                found[what].setdefault(name, []).append(value)
    return found


def report(found: dict[str, dict[str, list[float]]]) -> list[Budget]:
    """Print the tables."""
    for what, (title, base, digits) in TITLES.items():
        rows = [
            [name, Spread.of(samples).show(digits), Spread.of(ratios(samples, found[what][base])).show(2)]
            for name, samples in found[what].items()
        ]
        print(table(f"\n{title}", ["way", "measured", f"ratio to {base}"], rows))
    one, many, large_ = found["one"], found["many"], found["large"]
    ready = Spread.of(found["ready"]["asyncguard"]).median
    times_floor = Spread.of(ratios(one["asyncguard"], one["floor"])).median
    times_executor = Spread.of(ratios(many["ProcessPoolExecutor"], many["asyncguard"])).median
    times_copy = Spread.of(ratios(large_["asyncguard"], large_["memcpy"])).median
    return [
        Budget("a call, to the floor", MOST_TIMES_THE_FLOOR, times_floor, "x"),
        Budget(
            "time per call of 100 callers, to ProcessPoolExecutor",
            1 / LEAST_TIMES_THE_EXECUTOR,
            times_executor,
            "x",
        ),
        Budget("ready again after a cancelled call", MOST_UNTIL_READY, ready, " ms"),
        Budget("100 MB in, to a copy in memory", MOST_TIMES_A_COPY, times_copy, "x"),
        Budget(
            "the loop's stall meanwhile", MOST_STALL, Spread.of(found["stall"]["asyncguard"]).median, " ms"
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    print(f"Python {platform.python_version()} on {platform.machine()}; medians, and quartiles in brackets")
    budgets = report(asyncio.run(measure(options.rounds, options.calls)))
    print("\nbudgets")
    print("\n".join(map(str, budgets)))


if __name__ == "__main__":
    main()
