"""A guarded FastAPI application that blocks its event loop in some ways.

A line that is to blame ends with the comment ``# blocks: NAME``; the tests look for it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, WebSocket
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import asyncguard
from tests.e2e.recording import STALL, THRESHOLD, add_barrier, write

ROWS = [{"id": number, "price": 0.1} for number in range(50_000)]


app = FastAPI()
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
add_barrier(app)


# -- one line in the endpoint --------------------------------------------------------------------


@app.get("/sleep")
async def sleep() -> str:
    time.sleep(STALL)  # blocks: sleep
    return "done"


# -- around the endpoint -------------------------------------------------------------------------


async def little_work() -> None:
    time.sleep(STALL / 20)  # blocks: fan_out


@app.get("/fan-out")
async def with_many_tasks() -> int:
    return len(await asyncio.gather(*(little_work() for _ in range(40))))


async def tidy_up() -> None:
    time.sleep(STALL)  # blocks: background


@app.get("/background")
async def with_background() -> Response:
    return PlainTextResponse("sent before", background=BackgroundTask(tidy_up))


@app.websocket("/rooms/{room}")
async def chat(websocket: WebSocket, room: str) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        time.sleep(STALL)  # blocks: websocket
        await websocket.send_text(f"{room}: {text}")


async def chunks() -> AsyncIterator[str]:
    yield "first "
    await asyncio.sleep(0)
    time.sleep(STALL)  # blocks: stream
    yield "last"


@app.get("/stream")
async def stream() -> Response:
    return StreamingResponse(chunks())


# -- where the route template is not all in one place --------------------------------------------


mounted = FastAPI()


class QuickMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


behind_quick = FastAPI()
behind_quick.add_middleware(QuickMiddleware)


@behind_quick.get("/rows")
async def rows_behind_middleware():  # type: ignore[no-untyped-def]  # blocks: serialisation_behind
    return ROWS


app.mount("/quick", behind_quick)


@mounted.get("/items/{item}")
async def mounted_item(item: int) -> int:
    time.sleep(STALL)  # blocks: mounted
    return item


app.mount("/mounted/{tenant}", mounted)

inner, outer = APIRouter(prefix="/items"), APIRouter(prefix="/{tenant}")


@inner.get("/{item}")
async def nested_item(tenant: str, item: int) -> int:
    time.sleep(STALL)  # blocks: nested
    return item


outer.include_router(inner)
app.include_router(outer, prefix="/nested")


# -- what blocks nobody --------------------------------------------------------------------------


@app.get("/hello")
async def hello() -> str:
    return "hello"


# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported and built here, that alone would be a stall.
gc.collect()
gc.freeze()
