"""The shop: every route once with its pitfall (`/unhealthy`) and once cured (`/healthy`).

An ordinary FastAPI app. It knows nothing of who watches it.
"""

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
from anyio import to_process, to_thread
from fastapi import FastAPI

from shop import healthy, unhealthy, work


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what all requests share, and close it again at shutdown."""
    upstream = os.environ.get("SHOP_UPSTREAM", "http://127.0.0.1:8001")
    limits = httpx.Limits(max_connections=12)
    async with (
        anyio.TemporaryDirectory(prefix="shop-") as folder,
        httpx.AsyncClient(base_url=upstream, limits=limits, timeout=10) as client,
    ):
        catalogue = Path(folder, "catalogue.csv")
        await to_thread.run_sync(work.write_catalogue, catalogue)
        # The first call starts the worker process: let that be now, not in a request.
        await to_process.run_sync(work.warm_up)

        app.state.upstream = upstream
        app.state.client = client
        app.state.catalogue = catalogue
        app.state.price_history = await to_thread.run_sync(work.price_history)

        # What lives as long as the server is not worth a look in every full garbage collection:
        # that alone would stall the loop for 50 ms.
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


app = FastAPI(title="Shop", lifespan=lifespan)
app.include_router(unhealthy.router, prefix="/unhealthy", tags=["unhealthy"])
app.include_router(healthy.router, prefix="/healthy", tags=["healthy"])


@app.get("/ping")
async def ping() -> str:
    """Answer at once, if the loop lets us."""
    return "pong"
