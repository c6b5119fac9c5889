"""A guarded FastAPI application in which one request blocks the loop while others wait, each for a reason
of its own.

All of it is there twice: as it is, and below ``/behind`` three `BaseHTTPMiddleware`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import requests
from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

import asyncguard
from tests.e2e.recording import THRESHOLD, add_barrier, write

UPSTREAM = os.environ.get("ASYNCGUARD_TEST_UPSTREAM", "")

_asleep: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=UPSTREAM, timeout=60) as client:
        yield {"client": client}


router = APIRouter()


# -- who blocks ----------------------------------------------------------------------------------


@router.get("/block/{gate}")
async def block(gate: str) -> str:
    return requests.get(f"{UPSTREAM}/gates/{gate}", timeout=30).text  # blocks: gate


@router.get("/first/{seconds}")
async def first(seconds: float) -> str:
    time.sleep(seconds)  # blocks: first
    return "done"


@router.get("/second/{seconds}")
async def second(seconds: float) -> str:
    time.sleep(seconds)  # blocks: second
    return "done"


# -- who waits -----------------------------------------------------------------------------------


@router.get("/answered/{gate}")
async def await_answer(request: Request, gate: str) -> float:
    """Returns when it could go on."""
    await _ask(request, f"/gates/{gate}")
    return time.monotonic()


@router.get("/bystander/{gate}")
async def stand_by(request: Request, gate: str) -> str:
    return await _ask(request, f"/gates/{gate}")


@router.get("/timer/{name}/{seconds}")
async def await_timer(name: str, seconds: float) -> tuple[float, float]:
    """Returns when it was due, and when it could go on."""
    _asleep[name].set()
    due = time.monotonic() + seconds
    await asyncio.sleep(seconds)
    return due, time.monotonic()


@router.get("/asleep/{name}")
async def until_asleep(name: str) -> str:
    await _asleep[name].wait()
    return "asleep"


@router.get("/new/{item}")
async def newcomer(item: int) -> float:
    """Returns when it began."""
    return time.monotonic()


@router.get("/open/{item}")
async def on_open_connection(item: int) -> float:
    """Returns when it began."""
    return time.monotonic()


async def _ask(request: Request, path: str) -> str:
    client: httpx.AsyncClient = request.state.client
    return (await client.get(path)).text


# -- a thousand of them --------------------------------------------------------------------------


@router.get("/parked/{gate}")
async def park(gate: str) -> str:
    return await _ask_cheaply(f"/gates/{gate}")


@router.get("/parked-and-due/{gate}")
async def park_until_due(gate: str) -> str:
    return await _ask_cheaply(f"/gates/{gate}")


async def _ask_cheaply(path: str) -> str:
    # For each request, httpx looks at all connections of its pool: a thousand of them would block.
    address = urlsplit(UPSTREAM)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: upstream\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.decode().rpartition("\r\n")[2]


# -- the application -----------------------------------------------------------------------------


class OuterMiddleware(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


class MiddleMiddleware(OuterMiddleware):
    pass


class InnerMiddleware(OuterMiddleware):
    pass


behind = FastAPI()
for middleware in (InnerMiddleware, MiddleMiddleware, OuterMiddleware):
    behind.add_middleware(middleware)
behind.include_router(router)

app = FastAPI(lifespan=lifespan)
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
app.include_router(router)
app.mount("/behind", behind)
add_barrier(app)

# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported and built here, that alone would be a stall.
gc.collect()
gc.freeze()
