"""A guarded application that stops for good, in one way or another."""

from __future__ import annotations

import os
import threading
import time
from typing import Literal, cast

from fastapi import FastAPI

import asyncguard
from tests.e2e.recording import THRESHOLD, add_barrier, write

app = FastAPI()
asyncguard.install(
    app,
    block_threshold=THRESHOLD,
    hang_after=0.5,
    on_hang=cast(Literal["log", "abort"], os.environ.get("ASYNCGUARD_TEST_ON_HANG", "log")),
    on_block=write,
)
add_barrier(app)

lock = threading.Lock()
let_go = threading.Event()


def keep_the_lock() -> None:
    with lock:
        let_go.wait(30)  # blocks: holder


@app.get("/pid")
async def pid() -> int:
    return os.getpid()


@app.get("/let-go-soon")
def let_go_soon(seconds: float) -> str:
    threading.Timer(seconds, let_go.set).start()
    return "soon"


@app.get("/deadlock/{name}")
async def deadlock(name: str) -> str:
    let_go.clear()
    holder = threading.Thread(target=keep_the_lock, name="holder-of-the-lock")
    holder.start()
    while not lock.locked():
        time.sleep(0.001)
    with lock:  # blocks: deadlock
        return name


@app.get("/short")
async def short() -> str:
    time.sleep(0.3)
    return "done"
