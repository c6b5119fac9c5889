"""One httpx client for all requests: its connections are kept, and its certificates are loaded once."""

import logging
import os
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

import asyncguard
from asyncguard import shared

logger = logging.getLogger(__name__)

api = shared(
    httpx.AsyncClient,
    base_url=os.environ["API_URL"],
    timeout=httpx.Timeout(2, pool=1),  # seconds: to connect, to send and to receive; for a free connection
    limits=httpx.Limits(max_connections=50),
)
Api = Annotated[httpx.AsyncClient, Depends(api)]

app = FastAPI()
asyncguard.install(app, timeout=5, shared=[api])


@app.get("/prices/{article}")
async def price(article: int, client: Api) -> Any:
    response = await client.get(f"/articles/{article}")
    if response.status_code == 404:
        raise HTTPException(404)
    response.raise_for_status()
    return response.json()


@app.exception_handler(httpx.HTTPError)
async def unavailable(request: Request, error: httpx.HTTPError) -> JSONResponse:
    logger.warning("the price service is not available: %r", error)
    return JSONResponse({"detail": "The price service is not available."}, 503, {"Retry-After": "1"})
