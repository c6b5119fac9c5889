"""One engine of SQLAlchemy's for all requests, and a session for each."""

import logging
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

import asyncguard
from asyncguard import shared

logger = logging.getLogger(__name__)


async def ping(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("select 1"))


database = shared(
    create_async_engine,
    os.environ["DATABASE_URL"],  # postgresql+asyncpg://...
    pool_size=5,
    max_overflow=5,
    pool_timeout=1,  # seconds to wait for a connection
    pool_pre_ping=True,  # each is tried before it is given out
    connect_args={"timeout": 2, "command_timeout": 2},  # seconds to connect, and for a query
    check=ping,
)


async def open_session(engine: Annotated[AsyncEngine, Depends(database)]) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        yield session


# It ends with the function: its connection is back, and an error is answered, before the response is sent.
Session = Annotated[AsyncSession, Depends(open_session, scope="function")]

app = FastAPI()
asyncguard.install(app, timeout=5, shared=[database])


@app.get("/orders/{number}")
async def order(number: int, session: Session) -> Any:
    rows = await session.execute(
        text("select number, total from orders where number = :number"), {"number": number}
    )
    row = rows.mappings().first()
    if row is None:
        raise HTTPException(404)
    return dict(row)


@app.post("/orders", status_code=201)
async def place_order(total: int, session: Session) -> int:
    async with session.begin():
        statement = text("insert into orders (total) values (:total) returning number")
        number: int = (await session.execute(statement, {"total": total})).scalar_one()
        return number


@app.exception_handler(OSError)  # refused, or out of time
@app.exception_handler(exc.DBAPIError)
@app.exception_handler(exc.TimeoutError)  # no connection was free
async def unavailable(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, exc.DataError | exc.IntegrityError | exc.ProgrammingError):
        raise error  # the database is there; it is the statement
    logger.warning("the database is not available: %r", error)
    return JSONResponse({"detail": "The database is not available."}, 503, {"Retry-After": "1"})
