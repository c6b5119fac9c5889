"""A guarded application that holds its event loop in small pieces.

A line that is to blame ends with the comment ``# blocks: NAME``; the tests look for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict

from fastapi import FastAPI, WebSocket

import asyncguard
from tests.e2e.recording import THRESHOLD, add_barrier, write

PIECE = 0.005
PIECES = 40

app = FastAPI()


def write_busy(report: asyncguard.BusyReport) -> None:
    with open(os.environ["ASYNCGUARD_TEST_BUSY"], "a") as file:
        file.write(json.dumps(asdict(report)) + "\n")


asyncguard.install(app, block_threshold=THRESHOLD, busy_threshold=0.15, on_block=write, on_busy=write_busy)
add_barrier(app)


def compute(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:  # blocks: loop
        pass


@app.get("/pieces/{kind}")
async def pieces(kind: str) -> float:
    began = time.perf_counter()
    for _ in range(PIECES):
        if kind == "waiting":
            time.sleep(PIECE)
        else:
            compute(PIECE)
        await asyncio.sleep(0)  # blocks: pieces
    return time.perf_counter() - began


@app.get("/few-pieces")
async def few_pieces() -> str:
    for _ in range(10):
        compute(PIECE)
        await asyncio.sleep(0)
    return "done"


@app.get("/slow-pieces")
async def slow_pieces() -> str:
    """As much as `pieces`, but over so long a time that nobody minds."""
    for _ in range(PIECES):
        compute(PIECE)
        await asyncio.sleep(0.06)
    return "done"


@app.get("/stall-and-pieces")
async def stall_and_pieces() -> str:
    """A stall is told as such, and does not count again as a small piece."""
    time.sleep(0.2)  # blocks: stall
    for _ in range(10):
        compute(PIECE)
        await asyncio.sleep(0)
    return "done"


@app.websocket("/chat")
async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        compute(float(text))
        await websocket.send_text("done")


@app.get("/burst")
async def burst() -> float:
    """Many callbacks that are all ready in the same iteration."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    spent = 0.0

    def piece(last: bool) -> None:
        nonlocal spent
        began = time.perf_counter()
        compute(PIECE)  # blocks: burst
        spent += time.perf_counter() - began
        if last:
            done.set()

    for number in range(PIECES):
        loop.call_soon(piece, number == PIECES - 1)
    await done.wait()
    return spent
