"""A guarded FastAPI application that blocks its event loop in every way, and in some ways does not.

A line that is to blame ends with the comment ``# blocks: NAME``; the tests look for it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import anyio.to_thread
import httpx
import requests
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import asyncguard
from tests.e2e.recording import STALL, THRESHOLD, add_barrier, write

UPSTREAM = os.environ.get("ASYNCGUARD_TEST_UPSTREAM", "")

NUMBERS = [0.1 + number for number in range(400_000)]
ROWS = [{"id": number, "price": 0.1} for number in range(50_000)]
BLOCK = bytes(8 << 20)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with httpx.AsyncClient(base_url=UPSTREAM, timeout=60) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
add_barrier(app)


# -- one line in the endpoint --------------------------------------------------------------------


@app.get("/sleep")
async def sleep() -> str:
    time.sleep(STALL)  # blocks: sleep
    return "done"


@app.get("/requests")
async def fetch() -> str:
    return requests.get(f"{UPSTREAM}/slow/{STALL}", timeout=30).text  # blocks: requests


@app.get("/fetch/{gate}")
async def fetch_gate(gate: str) -> str:
    return requests.get(f"{UPSTREAM}/gates/{gate}", timeout=30).text  # blocks: gate


@app.get("/loop/{count}")
async def loop(count: int) -> int:
    return sum([number * number % 7 for number in range(count)])  # blocks: loop


@app.get("/json")
async def dump() -> int:
    return len(json.dumps(NUMBERS))  # blocks: json


@app.get("/serialised")
async def serialised():  # type: ignore[no-untyped-def]  # blocks: serialisation
    return ROWS


@app.get("/pipe")
async def read_pipe(path: str) -> int:
    return len(Path(path).read_bytes())  # blocks: read


@app.get("/fsync")
async def sync_file() -> int:
    # Few and long waits: after each of many short ones, the thread would queue for a core again.
    rounds = 0
    until = time.perf_counter() + STALL
    with tempfile.TemporaryFile() as file:
        number = file.fileno()
        while time.perf_counter() < until:
            os.pwrite(number, BLOCK, 0), os.fsync(number)  # type: ignore[func-returns-value]  # blocks: fsync
            rounds += 1
    return rounds


@app.get("/clients")
async def build_clients() -> int:
    clients = [httpx.AsyncClient() for _ in range(10)]  # blocks: clients
    for client in clients:
        await client.aclose()
    return len(clients)


# -- around the endpoint -------------------------------------------------------------------------


async def nap(name: str) -> str:
    await asyncio.sleep(0)
    if name == "create_task":
        time.sleep(STALL)  # blocks: create_task
    elif name == "gather":
        time.sleep(STALL)  # blocks: gather
    elif name == "task_group":
        time.sleep(STALL)  # blocks: task_group
    return name


@app.get("/create-task")
async def with_task() -> str:
    return await asyncio.create_task(nap("create_task"))


@app.get("/gather")
async def with_gather() -> tuple[str, str, str]:
    return await asyncio.gather(nap("idle"), nap("gather"), nap("idle"))


@app.get("/task-group")
async def with_group() -> str:
    async with asyncio.TaskGroup() as group:
        group.create_task(nap("idle"))
        task = group.create_task(nap("task_group"))
    return task.result()


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


async def look_up() -> str:
    time.sleep(STALL)  # blocks: dependency
    return "found"


@app.get("/dependency/{name}")
async def with_dependency(name: str, found: Annotated[str, Depends(look_up)]) -> str:
    return found + name


# -- where the route template is not all in one place --------------------------------------------


class SlowMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            time.sleep(STALL)  # blocks: asgi_middleware
        await self.app(scope, receive, send)


class SlowBaseMiddleware(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        time.sleep(STALL)  # blocks: base_middleware
        return await call_next(request)


async def nothing(item: int) -> int:
    return item


behind_asgi, behind_base, mounted = FastAPI(), FastAPI(), FastAPI()
behind_asgi.add_middleware(SlowMiddleware)
behind_asgi.add_api_route("/items/{item}", nothing)
behind_base.add_middleware(SlowBaseMiddleware)
behind_base.add_api_route("/items/{item}", nothing)
app.mount("/asgi", behind_asgi)
app.mount("/base", behind_base)


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


@app.get("/items/{item}")
async def item_page(item: int) -> int:
    return item


@app.get("/awaited")
async def awaited() -> str:
    await asyncio.sleep(0.3)
    return "done"


@app.get("/thread")
def in_thread() -> str:
    time.sleep(0.3)
    return "done"


@app.get("/to-thread")
async def to_thread() -> str:
    await anyio.to_thread.run_sync(time.sleep, 0.3)
    return "done"


@app.get("/upstream")
async def ask_slow_upstream(request: Request) -> str:
    return await _ask(request, "/slow/0.3")


@app.get("/wait/{gate}")
async def wait(request: Request, gate: str) -> str:
    return await _ask(request, f"/gates/{gate}")


@app.get("/due/{gate}")
async def due(request: Request, gate: str) -> str:
    return await _ask(request, f"/gates/{gate}")


async def _ask(request: Request, path: str) -> str:
    client: httpx.AsyncClient = request.app.state.client
    return (await client.get(path)).text


# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported and built here, that alone would be a stall.
gc.collect()
gc.freeze()
