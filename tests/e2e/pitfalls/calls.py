"""What blocks: one endpoint for each kind of call, one line in each of them.

A line that is to blame ends with the comment ``# blocks: NAME``, and its endpoint is at ``/NAME``.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import hashlib
import json
import math
import os
import random
import re
import subprocess
import tempfile
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import requests
from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import create_engine, text

from tests.e2e.pitfalls.timing import timed, timed_until_free, units

__all__ = ["router"]

UPSTREAM = os.environ.get("ASYNCGUARD_TEST_UPSTREAM", "")

router = APIRouter()


# -- waiting -------------------------------------------------------------------------------------


@router.get("/sleep")
async def sleep(seconds: float) -> None:
    with timed("sleep"):
        time.sleep(seconds)  # blocks: sleep


@router.get("/requests")
async def fetch_by_requests(seconds: float) -> None:
    with timed("requests"):
        requests.get(f"{UPSTREAM}/slow/{seconds}", timeout=30)  # blocks: requests


@router.get("/urllib")
async def fetch_by_urllib(seconds: float) -> None:
    with timed("urllib"):
        urllib.request.urlopen(f"{UPSTREAM}/slow/{seconds}").close()  # blocks: urllib


@router.get("/subprocess")
async def run_program(seconds: float) -> None:
    with timed("subprocess"):
        subprocess.run(["sleep", str(seconds)], check=True)  # blocks: subprocess


LOCK = threading.Lock()


def hold_lock(seconds: float, loop: asyncio.AbstractEventLoop, held: asyncio.Event) -> None:
    with LOCK:
        loop.call_soon_threadsafe(held.set)
        time.sleep(seconds)


@router.get("/lock")
async def wait_for_lock(seconds: float) -> None:
    loop, held = asyncio.get_running_loop(), asyncio.Event()
    holder = loop.run_in_executor(None, hold_lock, seconds, loop, held)
    await held.wait()
    with timed("lock"):
        with LOCK:  # blocks: lock
            pass
    await holder


@router.get("/event")
async def wait_for_event(seconds: float) -> None:
    event = threading.Event()
    timer = threading.Timer(seconds, event.set)
    timer.start()
    with timed("event"):
        event.wait()  # blocks: event


# -- files ---------------------------------------------------------------------------------------

FOLDER = tempfile.TemporaryDirectory(prefix="asyncguard-test-")
FILE = Path(FOLDER.name, "file")
PIPE = Path(FOLDER.name, "pipe")
BLOCK = bytes(4 << 20)
FILE.write_bytes(BLOCK)
os.mkfifo(PIPE)


@router.get("/read")
async def read_file(seconds: float) -> None:
    count = units("read", seconds, first=5)
    with timed("read", count):
        sum(len(FILE.read_bytes()) for _ in range(count))  # blocks: read


def feed_pipe(seconds: float) -> None:
    with PIPE.open("wb"):
        time.sleep(seconds)


@router.get("/pipe")
async def read_slow_file(seconds: float) -> None:
    """Nothing comes for a while, as from a network's file system."""
    writer = asyncio.get_running_loop().run_in_executor(None, feed_pipe, seconds)
    with timed("pipe"):
        PIPE.read_bytes()  # blocks: pipe
    await writer


@router.get("/fsync")
async def sync_file(seconds: float) -> None:
    with tempfile.TemporaryFile() as file:
        number, until = file.fileno(), time.perf_counter() + seconds
        with timed("fsync"):
            while time.perf_counter() < until:
                os.pwrite(number, BLOCK, 0), os.fsync(number)  # type: ignore[func-returns-value]  # blocks: fsync


# -- Python that computes ------------------------------------------------------------------------


@router.get("/loop")
async def count_in_loop(seconds: float) -> int:
    total, count = 0, units("loop", seconds)
    with timed("loop", count):
        for number in range(count):
            total += number * number % 7  # blocks: loop
    return total


@router.get("/comprehension")
async def count_in_comprehension(seconds: float) -> int:
    count = units("comprehension", seconds)
    with timed("comprehension", count):
        return sum([number * number % 7 for number in range(count)])  # blocks: comprehension


LEVELS = 45
"""Two frames each."""


@router.get("/deep")
async def copy_nested(seconds: float) -> None:
    count = units("deep", seconds)
    nested: list[Any] = [(0.5,)] * count  # few, and each takes long: to gather many would be a stall too
    for _ in range(LEVELS):
        nested = [nested]
    await asyncio.sleep(0)
    with timed("deep", count):
        copy.deepcopy(nested)  # blocks: deep


# -- C that holds the GIL --------------------------------------------------------------------------


@router.get("/regex")
async def match_badly(seconds: float) -> None:
    steps = units("regex", seconds, first=100_000)
    length = math.isqrt(steps)
    with timed("regex", length * length):
        re.match(r"\w*\w*!", "a" * length)  # blocks: regex


NUMBERS = [0.1 + number for number in range(3_000_000)]


@router.get("/json")
async def dump(seconds: float) -> None:
    count = units("json", seconds)
    numbers = NUMBERS[:count]
    await asyncio.sleep(0)
    with timed("json", count):
        json.dumps(numbers)  # blocks: json


NAMES = [f"{'customer':>40}-{number:08}" for number in range(500_000)]
random.Random(1).shuffle(NAMES)


@router.get("/sort")
async def sort(seconds: float) -> None:
    count = units("sort", seconds)
    names = NAMES[:count]
    await asyncio.sleep(0)
    with timed("sort", count):
        sorted(names)  # blocks: sort


class Item(BaseModel):
    id: int
    name: str
    price: float
    tags: list[str]


ITEMS = [Item(id=number, name=f"item {number}", price=number / 7, tags=["a"]) for number in range(300_000)]
ROWS = [{"id": number, "price": number / 7} for number in range(200_000)]


@router.get("/model")
async def answer_with_models(seconds: float) -> list[Item]:  # blocks: model
    count = units("model", seconds)
    timed_until_free("model", count)
    return ITEMS[:count]


@router.get("/rows")
async def answer_with_rows(seconds: float):  # type: ignore[no-untyped-def]  # blocks: rows
    count = units("rows", seconds)
    timed_until_free("rows", count)
    return ROWS[:count]


# -- C that lets the GIL go ------------------------------------------------------------------------


@router.get("/pbkdf2")
async def hash_password(seconds: float) -> None:
    rounds = units("pbkdf2", seconds)
    with timed("pbkdf2", rounds):
        hashlib.pbkdf2_hmac("sha256", b"secret", b"salt", rounds)  # blocks: pbkdf2


BLOB = np.random.default_rng(1).integers(97, 105, 1 << 20, dtype=np.uint8).tobytes() * 40


@router.get("/zlib")
async def compress(seconds: float) -> None:
    size = units("zlib", seconds, first=1 << 16)
    blob = memoryview(BLOB)[:size]
    with timed("zlib", size):
        zlib.compress(blob, 9)  # blocks: zlib


# -- libraries -------------------------------------------------------------------------------------


@router.get("/clients")
async def build_clients(seconds: float) -> None:
    count = units("clients", seconds, first=1)
    with timed("clients", count):
        clients = [httpx.AsyncClient() for _ in range(count)]  # blocks: clients
    for client in clients:
        await client.aclose()


ENGINE = create_engine("sqlite://")
COUNT = text(
    "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)"
    " SELECT sum(n) FROM numbers"
)


@router.get("/sqlalchemy")
async def query(seconds: float) -> None:
    count = units("sqlalchemy", seconds)
    with ENGINE.connect() as connection, timed("sqlalchemy", count):
        connection.execute(COUNT, {"count": count}).scalar_one()  # blocks: sqlalchemy


VALUES = np.random.default_rng(1).permutation(20_000_000)
FRAME = pd.DataFrame({"key": VALUES[:3_000_000] % 1000, "value": VALUES[:3_000_000]})


@router.get("/numpy")
async def sort_array(seconds: float) -> None:
    count = units("numpy", seconds)
    with timed("numpy", count):
        np.sort(VALUES[:count], kind="stable")  # blocks: numpy


@router.get("/pandas")
async def sort_frame(seconds: float) -> None:
    count = units("pandas", seconds)
    frame = FRAME.head(count)
    with timed("pandas", count):
        frame.sort_values(["key", "value"])  # blocks: pandas


# -- nobody's line ---------------------------------------------------------------------------------


class Cycle:
    __slots__ = ("itself",)

    def __init__(self) -> None:
        self.itself = self


def litter(count: int) -> None:
    for _ in range(count):
        Cycle()


@router.get("/gc")
async def collect_garbage(seconds: float) -> None:
    """All of the garbage is made before the stall, by a thread; the next allocations have it collected."""
    count = units("gc", seconds)
    gc.disable()
    try:
        await asyncio.to_thread(litter, count)
        with timed("gc", count):
            gc.enable()
            [[] for _ in range(2000)]  # more than the collector's first threshold
    finally:
        gc.enable()
