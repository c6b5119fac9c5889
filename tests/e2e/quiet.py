"""A guarded FastAPI application in which requests take long, or use threads, and none blocks the loop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI, Request

import asyncguard
from tests.e2e.recording import THRESHOLD, add_barrier, write

UPSTREAM = os.environ.get("ASYNCGUARD_TEST_UPSTREAM", "")

ROWS = [{"id": 1, "price": 0.1}] * 600_000
ROUNDS = 3_000_000


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=UPSTREAM, timeout=60) as client:
        yield {"client": client}


app = FastAPI(lifespan=lifespan)
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
add_barrier(app)


@app.get("/hello")
async def hello() -> str:
    return "hello"


@app.get("/sleep")
async def sleep() -> str:
    await asyncio.sleep(0.3)
    return "done"


@app.get("/def")
def slow_in_thread_pool() -> str:
    time.sleep(0.3)
    return "done"


@app.get("/to-thread")
async def to_thread() -> str:
    await asyncio.to_thread(time.sleep, 0.3)
    return "done"


@app.get("/upstream")
async def ask_slow_upstream(request: Request) -> str:
    client: httpx.AsyncClient = request.state.client
    return (await client.get("/slow/0.3")).text


@app.get("/file")
async def read_small_file() -> int:
    return len(Path(__file__).read_bytes())


# -- in threads that share the GIL with the loop -------------------------------------------------


@app.get("/compute")
def compute_in_thread_pool() -> int:
    return sum(number * number % 7 for number in range(ROUNDS))  # blocks: compute


@app.get("/encode")
async def encode_in_thread(pipe: str | None = None) -> float:
    return await asyncio.to_thread(encode, pipe)


def encode(pipe: str | None) -> float:
    """Tells when it begins, if somebody listens; returns for how long it has held the GIL."""
    if pipe is not None:
        Path(pipe).write_text("now")
    began = time.perf_counter()
    json.dumps(ROWS)  # blocks: encode
    return time.perf_counter() - began


# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported and built here, that alone would be a stall.
gc.collect()
gc.freeze()
