"""An application on PostgreSQL, some of whose queries take longer than a request may.

The database is the one that libpq's environment variables name. ``/state`` tells what became of the
sessions and of their connections.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import asyncguard
from asyncguard import abandoned, timeout

LIMIT = 0.5
"""In how many seconds each response has to begin."""
POOL = 10
PATIENCE = 30.0
"""Seconds in which everything else is done, on the busiest machine."""

# A driver that closes a connection in mid-query may leave its server process to that query, as if there still
# were somebody to wait for it: unless the server looks now and then.
CHECKED = {"server_settings": {"client_connection_check_interval": "500"}}
engine = create_async_engine("postgresql+asyncpg://", pool_size=POOL, max_overflow=0, connect_args=CHECKED)
counted: Counter[str] = Counter()
barrier = asyncio.Barrier(POOL)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def open_session() -> AsyncIterator[AsyncSession]:
    counted["entered"] += 1
    session = AsyncSession(engine)
    try:
        yield session
    except BaseException as error:
        counted[type(error).__name__] += 1
        raise
    finally:
        await session.close()
        counted["left"] += 1


Session = Annotated[AsyncSession, Depends(open_session)]


@app.get("/order")
async def order(session: Session) -> None:
    stage = "waiting"
    try:
        await session.connection()  # awaits: connection
        stage = "querying"
        await session.execute(text("insert into orders default values"))
        await session.execute(text(f"select pg_sleep({10 * PATIENCE})"))  # awaits: query
        await session.commit()
    finally:
        counted[stage] += 1


@app.get("/together")
@timeout(PATIENCE)
async def together(session: Session) -> int | None:
    """Answers as soon as every connection of the pool is held by a request like this one."""
    pid: int | None = await session.scalar(text("select pg_backend_pid()"))
    await barrier.wait()
    return pid


@app.get("/state")
@timeout(PATIENCE)
async def state() -> dict[str, Any]:
    gc.collect()  # a connection that was forgotten says so on standard error
    pool = engine.pool
    assert isinstance(pool, AsyncAdaptedQueuePool)
    return {
        "counted": counted,
        "abandoned": abandoned(),
        "checked out": pool.checkedout(),
        "checked in": pool.checkedin(),
    }


asyncguard.install(app, block_threshold=None, timeout=LIMIT, timeout_grace=PATIENCE)
