"""One aiohttp session for all requests. It is made in the running event loop, without which it cannot be."""

import logging
import os
from typing import Annotated, Any

import aiohttp
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

import asyncguard
from asyncguard import shared

logger = logging.getLogger(__name__)


def open_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        os.environ["API_URL"],
        connector=aiohttp.TCPConnector(limit=50),
        timeout=aiohttp.ClientTimeout(total=2, connect=1),  # seconds: for all; until it has a connection
    )


api = shared(open_session)
Api = Annotated[aiohttp.ClientSession, Depends(api)]

app = FastAPI()
asyncguard.install(app, timeout=5, shared=[api])


@app.get("/prices/{article}")
async def price(article: int, session: Api) -> Any:
    async with session.get(f"/articles/{article}") as response:
        if response.status == 404:
            raise HTTPException(404)
        response.raise_for_status()
        return await response.json()


@app.exception_handler(aiohttp.ClientError)
@app.exception_handler(TimeoutError)
async def unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.warning("the price service is not available: %r", error)
    return JSONResponse({"detail": "The price service is not available."}, 503, {"Retry-After": "1"})
