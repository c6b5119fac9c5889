"""An application that builds clients for its requests, in every place; and one that does what it should."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import httpx2
from fastapi import Depends, FastAPI, Request, WebSocket
from starlette.middleware.base import RequestResponseEndpoint
from starlette.responses import JSONResponse, Response

import asyncguard
from asyncguard import ClientReport

VERIFY: Any = False
"""Who verifies nothing reads no certificates, which takes most of the time."""
UPSTREAM = os.environ.get("ASYNCGUARD_TEST_UPSTREAM", "") + "/slow/0"

reports: list[dict[str, Any]] = []
kept: dict[str, httpx.AsyncClient] = {}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    async with httpx.AsyncClient() as client:
        yield {"client": client}
    for each in kept.values():
        await each.aclose()


def note(report: ClientReport) -> None:
    reports.append({**dataclasses.asdict(report), "said": str(report)})


app = FastAPI(lifespan=lifespan)


@app.middleware("http")
async def authenticated(request: Request, call_next: RequestResponseEndpoint) -> Response:
    if request.url.path == "/in-a-middleware":
        async with httpx2.AsyncClient(verify=VERIFY) as client:  # builds: in-a-middleware
            await client.get(UPSTREAM)
    return await call_next(request)


@app.get("/async-with")
async def async_with() -> str:
    async with httpx.AsyncClient() as client:  # builds: async-with
        return (await client.get(UPSTREAM)).text


@app.get("/never-closed")
async def never_closed() -> str:
    response = await httpx2.AsyncClient(verify=VERIFY).get(UPSTREAM)  # builds: never-closed
    return response.text


async def dependency() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(verify=VERIFY) as client:  # builds: in-a-dependency
        yield client


@app.get("/in-a-dependency")
async def in_a_dependency(client: Annotated[httpx.AsyncClient, Depends(dependency)]) -> str:
    return (await client.get(UPSTREAM)).text


@app.get("/in-a-thread")
def in_a_thread() -> str:
    with httpx.Client(verify=VERIFY) as client:  # builds: in-a-thread
        return client.get(UPSTREAM).text


@app.get("/shorthand")
def shorthand() -> str:
    return httpx.get(UPSTREAM, verify=VERIFY).text  # builds: shorthand


@app.websocket("/messages")
async def messages(websocket: WebSocket) -> None:
    await websocket.accept()
    async for _ in websocket.iter_text():
        async with httpx.AsyncClient(verify=VERIFY) as client:  # builds: messages
            await websocket.send_text((await client.get(UPSTREAM)).text)


# -- as it should be -----------------------------------------------------------------------------------


@app.get("/shared")
async def shared(request: Request) -> str:
    response: httpx.Response = await request.state.client.get(UPSTREAM)
    return response.text


@app.get("/kept")
async def keep() -> str:
    if "client" not in kept:
        kept["client"] = httpx.AsyncClient(verify=VERIFY)
    return (await kept["client"].get(UPSTREAM)).text


@app.get("/reports")
async def told() -> Response:
    return JSONResponse(reports)


asyncguard.install(app, timeout=30, on_client=note)
