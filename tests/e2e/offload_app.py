"""A FastAPI application that offloads, for real servers.

What it offloads is in this very module, which its workers therefore import as well. All that is to be seen
from outside is written to files in a folder: a line each time, with the id of the process that wrote it.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from fastapi import FastAPI

import asyncguard
from asyncguard import OffloadPool, offload
from asyncguard.offloading import _pools

many: OffloadPool

FOLDER = Path(os.environ["ASYNCGUARD_TEST_FOLDER"])
FAILS = os.environ.get("ASYNCGUARD_TEST_LIFESPAN_FAILS", "")
"""Where the lifespan raises: at ``start`` or at the ``end``."""
WORKERS = int(os.environ.get("ASYNCGUARD_TEST_WORKERS", "2"))
"""How many workers are started with the application; with 0, the first call starts them."""
PATIENCE = 60.0

one = OffloadPool(1, max_queue=1, grace=PATIENCE)
"""Of one worker, which is given all the time that it needs on a busy machine.

It is opened beside the application's own pool, which is known as `many`.
"""


def note(name: str) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(f"{os.getpid()}\n")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    global many
    note("lifespans")
    many = _pools.current()
    async with one:
        if FAILS == "start":
            await one.run(os.getpid)
            raise RuntimeError("the lifespan's own error")
        yield
        if FAILS == "end":
            raise RuntimeError("the lifespan's own error")
    note("lifespan-ends")


app = FastAPI(lifespan=lifespan)
asyncguard.install(
    app,
    block_threshold=None,
    timeout=PATIENCE,
    cancel_on_disconnect=True,
    offload_workers=WORKERS or None,
)


# -- what is offloaded -----------------------------------------------------------------------------


@offload
def pid() -> int:
    return os.getpid()


@offload
def spin(name: str) -> None:
    """A loop of Python's that does not end."""
    note(f"begun-{name}")
    try:
        while True:
            pass
    finally:
        note(f"ended-{name}")


@offload
def count_in_c(name: str) -> int:
    """A loop of C's that holds the GIL, for minutes."""
    note(f"begun-{name}")
    return sum(range(10**10))


@offload
def wait(name: str) -> int:
    """Until there is a file of that name."""
    note(f"begun-{name}")
    while not (FOLDER / name).exists():
        time.sleep(0.01)
    return os.getpid()


# -- endpoints -------------------------------------------------------------------------------------


@app.get("/pids")
async def pids() -> dict[str, int]:
    return {"server": os.getpid(), "worker": await pid.using(pool=many)()}


@app.get("/spin/{name}")
async def spins(name: str) -> None:
    await spin.using(pool=many)(name)


@app.get("/count/{name}")
async def counts(name: str) -> int:
    return await count_in_c.using(pool=many)(name)


@app.get("/wait/{name}")
async def waits(name: str) -> int:
    return await wait.using(pool=many)(name)


@app.get("/one/pid")
async def pid_of_one() -> int:
    return await pid.using(pool=one)()


@app.get("/one/queued")
async def queued_in_one() -> int:
    return one.stats.queued


@app.get("/one/spin/{name}")
async def spins_in_one(name: str) -> None:
    await spin.using(pool=one)(name)


@app.get("/one/late/{name}")
async def has_a_deadline(name: str) -> None:
    await spin.using(timeout=1, pool=one)(name)


@app.get("/one/timeout/{name}")
@asyncguard.timeout(1)
async def has_a_timeout(name: str) -> None:
    try:
        await spin.using(pool=one)(name)
    except asyncguard.OffloadTimeout:
        await anyio.sleep(PATIENCE)  # so that it is the request that is answered, not this exception
