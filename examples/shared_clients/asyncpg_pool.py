"""One pool of asyncpg's for all requests."""

import logging
import os
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

import asyncguard
from asyncguard import shared

logger = logging.getLogger(__name__)


async def ping(pool: asyncpg.Pool) -> None:
    await pool.execute("select 1", timeout=1)


database = shared(
    asyncpg.create_pool,
    os.environ["DATABASE_URL"],
    min_size=1,
    max_size=10,
    timeout=2,  # seconds to connect
    command_timeout=2,  # seconds for a query
    check=ping,
)
Database = Annotated[asyncpg.Pool, Depends(database)]

app = FastAPI()
asyncguard.install(app, timeout=5, shared=[database])


@app.get("/orders/{number}")
async def order(number: int, pool: Database) -> Any:
    row = await pool.fetchrow("select number, total from orders where number = $1", number)
    if row is None:
        raise HTTPException(404)
    return dict(row)


@app.post("/orders", status_code=201)
async def place_order(total: int, pool: Database) -> int:
    async with pool.acquire(timeout=1) as connection, connection.transaction():
        number: int = await connection.fetchval(
            "insert into orders (total) values ($1) returning number", total
        )
        return number


@app.exception_handler(OSError)  # refused, or out of time
@app.exception_handler(asyncpg.InterfaceError)
@app.exception_handler(asyncpg.InternalClientError)  # the connection was lost at a bad moment
@app.exception_handler(asyncpg.OperatorInterventionError)
@app.exception_handler(asyncpg.PostgresConnectionError)
async def unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.warning("the database is not available: %r", error)
    return JSONResponse({"detail": "The database is not available."}, 503, {"Retry-After": "1"})
