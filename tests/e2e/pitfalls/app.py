"""A guarded FastAPI application with every pitfall in it, each of which blocks for as long as it is told.

``/NAME?seconds=0.15`` blocks; ``/taken/NAME`` then tells for how long it really did.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import asyncguard
from tests.e2e.pitfalls import calls, places, timing
from tests.e2e.recording import THRESHOLD, add_barrier, write


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.jobs = asyncio.Queue()
    worker = asyncio.create_task(places.work_off(app.state.jobs))
    yield
    worker.cancel()


app = FastAPI(lifespan=lifespan)
app.include_router(calls.router)
app.include_router(places.router)
app.mount("/asgi_middleware", places.behind_asgi)
app.mount("/base_middleware", places.behind_base)
app.add_api_route("/taken/{name}", timing.taken)
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
add_barrier(app)


@app.get("/excused")
async def excused() -> dict[str, int]:
    """The stalls that nobody was blamed for."""
    guard = app.middleware_stack
    assert isinstance(guard, asyncguard.BlockingMiddleware)
    return dict(guard.monitor.excused)


# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported and built here, that alone would be a stall.
gc.collect()
gc.freeze()
