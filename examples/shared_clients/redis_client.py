"""One client of Redis for all requests."""

import logging
import os
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import asyncguard
from asyncguard import shared

logger = logging.getLogger(__name__)


def connect() -> Redis:
    pool = BlockingConnectionPool.from_url(
        os.environ["REDIS_URL"],
        max_connections=20,
        timeout=1,  # seconds to wait for a connection
        socket_connect_timeout=1,
        socket_timeout=1,  # seconds for an answer
        retry=Retry(NoBackoff(), 1),  # one more attempt, at once
    )
    return Redis.from_pool(pool)


cache = shared(connect, check=Redis.ping)
Cache = Annotated[Redis, Depends(cache)]

app = FastAPI()
asyncguard.install(app, timeout=5, shared=[cache])


@app.get("/visits/{page}")
async def visits(page: str, client: Cache) -> int:
    return int(await client.incr(f"visits:{page}"))


@app.exception_handler(exceptions.ConnectionError)
@app.exception_handler(exceptions.TimeoutError)
async def unavailable(request: Request, error: exceptions.RedisError) -> JSONResponse:
    logger.warning("the cache is not available: %s", error)
    return JSONResponse({"detail": "The cache is not available."}, 503, {"Retry-After": "1"})
