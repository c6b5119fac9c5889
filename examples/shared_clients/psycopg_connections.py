"""One pool of psycopg's for all requests."""

import logging
import os
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from psycopg import OperationalError
from psycopg_pool import AsyncConnectionPool

import asyncguard
from asyncguard import shared

logger = logging.getLogger(__name__)


def open_pool() -> AsyncConnectionPool:
    return AsyncConnectionPool(
        os.environ["DATABASE_URL"],
        kwargs={"connect_timeout": 2},  # seconds
        min_size=1,
        max_size=10,
        timeout=2,  # seconds to wait for a connection
        reconnect_timeout=2,  # so that the pause between two attempts stays short
        check=AsyncConnectionPool.check_connection,  # each is tried before it is given out
        open=False,  # that is done when it is shared
    )


async def ping(pool: AsyncConnectionPool) -> None:
    async with pool.connection() as connection:
        await connection.execute("select 1")


database = shared(open_pool, check=ping)
Database = Annotated[AsyncConnectionPool, Depends(database)]

app = FastAPI()
asyncguard.install(app, timeout=5, shared=[database])


@app.get("/orders/{number}")
async def order(number: int, pool: Database) -> Any:
    async with pool.connection() as connection:
        cursor = await connection.execute("select number, total from orders where number = %s", [number])
        row = await cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return {"number": row[0], "total": row[1]}


@app.post("/orders", status_code=201)
async def place_order(total: int, pool: Database) -> int:
    async with pool.connection() as connection:  # a transaction, which is committed at the end
        cursor = await connection.execute("insert into orders (total) values (%s) returning number", [total])
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])


@app.exception_handler(OperationalError)  # a pool that has no connection raises one, too
async def unavailable(request: Request, error: OperationalError) -> JSONResponse:
    logger.warning("the database is not available: %r", error)
    return JSONResponse({"detail": "The database is not available."}, 503, {"Retry-After": "1"})
