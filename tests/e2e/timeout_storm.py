"""Two applications for thousands of requests that run out of time, and what is left of those.

``/storm/KIND/MILLISECONDS/NUMBER`` does what `HANDLERS` has under that kind.
``/race/KIND/MICROSECONDS/NUMBER`` answers so many microseconds after its deadline, or before it, and so does
``/race-single``, behind a single layer. Every whole response of a handler is `body_of` the number. The paths
of `ADMIN` are outside the guards: they tell what there is.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import AsyncGeneratorType, CoroutineType
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Receive, Scope, Send

import asyncguard
from asyncguard import TimeoutMiddleware, TimeoutReport, abandoned

LIMIT = 0.5
"""In the storm, for those whose caller sets none."""
IDLE = 0.3
GRACE = 0.2
LONG = 5.0
"""What takes that long is never waited for."""
TICK = 0.05
"""The limit that the race is about."""
HEADER = "X-Timeout"
PIECES = 4

begun: Counter[str] = Counter()
"""Of each kind of handler, and of each thing that must come to its end once it has begun."""
ended: Counter[str] = Counter()
planned: Counter[str] = Counter()
"""The exceptions that were logged as they should be."""
reports: list[tuple[str, str]] = []
"""The path and the clock of each."""


def body_of(number: int) -> str:
    return piece_of(number) * PIECES


def piece_of(number: int) -> str:
    return f"this is for {number}\n" * 5


class Planned(Exception):
    """What a handler of the storm raises."""


@contextmanager
def counted(kind: str) -> Iterator[None]:
    begun[kind] += 1
    try:
        yield
    finally:
        ended[kind] += 1


def note_report(report: TimeoutReport) -> None:
    reports.append((report.path, report.clock))


# -- handlers of the storm -------------------------------------------------------------------------


async def quick(seconds: float, number: int) -> Response:
    await anyio.sleep(0)
    return PlainTextResponse(body_of(number))


async def asleep(seconds: float, number: int) -> Response:
    await anyio.sleep(LONG)
    return PlainTextResponse("too late")


async def thread(seconds: float, number: int) -> Response:
    def work() -> None:
        with counted("work in a thread"):
            time.sleep(seconds)
            begun["whole work in a thread"] += 1
            ended["whole work in a thread"] += 1

    await anyio.to_thread.run_sync(work)
    return PlainTextResponse(body_of(number))


async def shielded(seconds: float, number: int) -> Response:
    with anyio.CancelScope(shield=True):
        begun["whole shielded section"] += 1
        await anyio.sleep(seconds / 2)
        await anyio.sleep(seconds / 2)
        ended["whole shielded section"] += 1
    await anyio.sleep(LONG)
    return PlainTextResponse("too late")


async def swallowing(seconds: float, number: int) -> Response:
    try:
        await anyio.sleep(LONG)
    except asyncio.CancelledError:
        await anyio.sleep(seconds)
    await anyio.sleep(LONG)
    return PlainTextResponse("too late")


async def raising(seconds: float, number: int) -> Response:
    await anyio.sleep(seconds)
    raise Planned(f"instead of {number}")


async def failing_cleanup(seconds: float, number: int) -> Response:
    try:
        await anyio.sleep(LONG)
    finally:
        await anyio.sleep(0)
        raise Planned(f"while cleaning up {number}")


async def pieces(seconds: float, number: int, *, stall: bool) -> AsyncIterator[str]:
    with counted("stream"):
        for count in range(PIECES):
            yield piece_of(number)
            await anyio.sleep(LONG if stall and count == 1 else seconds / 10)


async def streaming(seconds: float, number: int) -> Response:
    await anyio.sleep(seconds / 4)
    return StreamingResponse(pieces(seconds, number, stall=False), media_type="text/plain")


async def stalling(seconds: float, number: int) -> Response:
    await anyio.sleep(seconds / 4)
    return StreamingResponse(pieces(seconds, number, stall=True), media_type="text/plain")


async def work_afterwards(seconds: float) -> None:
    begun["whole background task"] += 1
    await anyio.sleep(seconds)
    ended["whole background task"] += 1


async def background(seconds: float, number: int) -> Response:
    await anyio.sleep(seconds / 4)
    return PlainTextResponse(body_of(number), background=BackgroundTask(work_afterwards, seconds))


Handler = Callable[[float, int], Awaitable[Response]]

HANDLERS: dict[str, Handler] = {
    "quick": quick,
    "asleep": asleep,
    "thread": thread,
    "shielded": shielded,
    "swallowing": swallowing,
    "raising": raising,
    "failing-cleanup": failing_cleanup,
    "streaming": streaming,
    "stalling": stalling,
    "background": background,
}

storm = FastAPI()


@storm.get("/storm/{kind}/{milliseconds}/{number}")
async def in_storm(kind: str, milliseconds: int, number: int) -> Response:
    with counted(kind):
        return await HANDLERS[kind](milliseconds / 1000, number)


class Passing(BaseHTTPMiddleware):
    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        return await call_next(request)


storm.add_middleware(GZipMiddleware, minimum_size=1)
asyncguard.install(
    storm,
    timeout=LIMIT,
    idle_timeout=IDLE,
    timeout_grace=GRACE,
    block_threshold=0.1,
    cancel_on_disconnect=True,
    deadline_header=HEADER,
    on_timeout=note_report,
)
storm.add_middleware(Passing)


# -- handlers of the race --------------------------------------------------------------------------

racers = APIRouter()


@racers.get("/asleep/{microseconds}/{number}")
async def asleep_until_the_deadline(microseconds: int, number: int) -> Response:
    await anyio.sleep(TICK + microseconds / 1e6)
    return PlainTextResponse(body_of(number))


@racers.get("/thread/{microseconds}/{number}")
def in_thread_until_the_deadline(microseconds: int, number: int) -> Response:
    time.sleep(TICK + microseconds / 1e6)
    return PlainTextResponse(body_of(number))


@racers.get("/quick/{microseconds}/{number}")
async def long_before_the_deadline(microseconds: int, number: int) -> Response:
    return PlainTextResponse(body_of(number))


race = FastAPI()
race.include_router(racers, prefix="/race")
asyncguard.install(race, timeout=TICK, idle_timeout=None, block_threshold=None, log=False)

race_single = FastAPI()
race_single.include_router(racers, prefix="/race-single")
race_single.add_middleware(TimeoutMiddleware, timeout=TICK, idle_timeout=None, log=False)


# -- what is left ----------------------------------------------------------------------------------


class Unplanned(logging.Filter):
    """Keeps what a server logs of planned exceptions from its log, and counts it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, Planned):
            return True
        planned["logged"] += 1
        return False


def settle_in() -> None:
    """What is done in the server's process, and in no other that imports this."""
    logging.getLogger("uvicorn.error").addFilter(Unplanned())
    # A machine that is busy with other things stalls the loop; that is another test's matter.
    logging.getLogger("asyncguard.blocking").setLevel(logging.ERROR)
    # What lives as long as the server need not be looked at each time.
    gc.collect()
    gc.freeze()


def tasks() -> Counter[str]:
    """The tasks of the running loop, by their coroutines."""
    return Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())


def timers() -> Counter[str]:
    """The timers of the running loop that have not been cancelled, by what they call; where that is not told,
    all of them together.
    """
    scheduled = getattr(asyncio.get_running_loop(), "_scheduled", None)
    if scheduled is None:  # uvloop
        handles = (each for each in gc.get_objects() if type(each).__name__ == "TimerHandle")
        return Counter("uvloop" for handle in handles if not handle.cancelled())
    calls = [handle._callback for handle in scheduled if not handle.cancelled()]
    return Counter(f"{call.__module__}.{call.__qualname__}" for call in calls)


def objects() -> Counter[str]:
    """What there is of all that the guard makes for a request, and of what that would keep alive."""
    found: Counter[str] = Counter()
    for each in gc.get_objects():
        kind = type(each)
        if str(kind.__module__).startswith("asyncguard.timeouts"):
            found[kind.__name__] += 1
        elif kind is CoroutineType or kind is AsyncGeneratorType:
            found[each.__qualname__] += 1
        elif kind is dict and each.get("type") == "http" and "headers" in each:
            found["scope"] += 1
    return found


def resident() -> int:
    """The memory of this process, in bytes."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def counts() -> Any:
    gc.collect()
    return {
        "abandoned": abandoned(),
        "borrowed": anyio.to_thread.current_default_thread_limiter().borrowed_tokens,
        "unfinished": {kind: begun[kind] - ended[kind] for kind in begun if begun[kind] != ended[kind]},
        "tasks": tasks(),
        "timers": timers(),
        "objects": objects(),
        "threads": Counter(re.sub(r"[-\d]+$", "", each.name) for each in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "planned": planned["logged"],
        "begun": begun,
        "resident": resident(),
    }


async def gauge() -> Any:
    return abandoned()


async def reports_so_far() -> Any:
    """Those that have not been told yet."""
    told = list(reports)
    del reports[: len(told)]
    return told


ADMIN = {"/counts": counts, "/gauge": gauge, "/reports": reports_so_far}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope.get("path", "")
    if scope["type"] == "lifespan":
        settle_in()
    if path in ADMIN:
        await JSONResponse(await ADMIN[path]())(scope, receive, send)
    elif path.startswith("/race/"):
        await race(scope, receive, send)
    elif path.startswith("/race-single/"):
        await race_single(scope, receive, send)
    else:
        await storm(scope, receive, send)
