"""A guarded Starlette application for every server and backend: nothing in it is asyncio's alone."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import asyncguard
from asyncguard import BlockReport
from tests.e2e.recording import STALL, THRESHOLD, add_barrier, write

HOOK = os.environ.get("ASYNCGUARD_TEST_HOOK")
"""What is wrong with the hook: it ``fails`` or is ``slow``."""


async def hello(_: Request) -> Response:
    return PlainTextResponse("hello")


async def awaited(_: Request) -> Response:
    await anyio.sleep(0.3)
    return PlainTextResponse("done")


async def sleep(_: Request) -> Response:
    time.sleep(STALL)  # blocks: sleep
    return PlainTextResponse("done")


async def child(_: Request) -> Response:
    async with anyio.create_task_group() as group:
        group.start_soon(child_task)
    return PlainTextResponse("done")


async def child_task() -> None:
    await anyio.sleep(0.001)
    time.sleep(STALL)  # blocks: child


async def read_pipe(request: Request) -> Response:
    size = len(Path(request.query_params["path"]).read_bytes())  # blocks: read
    return PlainTextResponse(str(size))


async def failing(_: Request) -> Response:
    time.sleep(STALL)  # blocks: failing
    raise LookupError("the handler's own error")


def report(found: BlockReport) -> None:
    if HOOK == "slow":
        time.sleep(0.5)
    write(found)
    if HOOK == "fails":
        raise ValueError("the hook's own error")


app = Starlette(
    routes=[
        Route("/hello", hello),
        Route("/awaited", awaited),
        Route("/sleep/{name}", sleep),
        Route("/child/{name}", child),
        Route("/pipe", read_pipe),
        Route("/failing", failing),
    ]
)
asyncguard.install(app, block_threshold=THRESHOLD, on_block=report)
add_barrier(app)

# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported here, that alone may be a stall.
gc.collect()
gc.freeze()
