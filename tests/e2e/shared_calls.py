"""A service that asks another one by its shared clients, for requests that have little time; and that one."""

from __future__ import annotations

import os
import time
from typing import Any

import anyio
import httpx
import httpx2
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import asyncguard
from asyncguard import Shared, remaining, shared

LIMIT = 0.4
"""Seconds that each request has."""
LONG = 60.0
"""The clients' own limit, and how long the other service would take."""
HEADER = "X-Time-Left"


async def told(request: Request) -> Response:
    """How long the caller waits, as it says itself."""
    return PlainTextResponse(request.headers.get(HEADER, ""))


async def slow(request: Request) -> Response:
    await anyio.sleep(LONG)
    return PlainTextResponse("at last")


upstream = Starlette(routes=[Route("/told", told), Route("/slow", slow)])
asyncguard.install(upstream, timeout=2 * LONG, cancel_on_disconnect=True)  # it ends when the test does


def declare(library: str, url: str) -> Shared[Any]:
    if library != "aiohttp":
        client: Any = {"httpx": httpx, "httpx2": httpx2}[library].AsyncClient
        return shared(client, base_url=url, timeout=LONG, name=library)
    import aiohttp  # asyncio's alone

    return shared(aiohttp.ClientSession, url, timeout=aiohttp.ClientTimeout(LONG), name=library)


clients = {
    library: declare(library, os.environ.get("ASYNCGUARD_TEST_URL", "http://127.0.0.1"))
    for library in os.environ.get("ASYNCGUARD_TEST_LIBRARIES", "httpx").split(",")
}
notes: dict[str, dict[str, Any]] = {}

app = FastAPI()
asyncguard.install(app, timeout=LIMIT, deadline_header=HEADER, shared=clients.values())


async def ask(library: str, path: str) -> str:
    client = clients[library].get()
    if library != "aiohttp":
        return str((await client.get(path)).text)
    async with client.get(path) as response:
        return str(await response.text())


@app.get("/told/{library}")
async def what_it_was_told(library: str) -> str:
    return await ask(library, "/told")


@app.get("/slow/{library}/{token}")
async def in_a_shield(library: str, token: str) -> None:
    """Not even its cancellation ends the call."""
    left, began = remaining(), time.monotonic()
    with anyio.CancelScope(shield=True):
        try:
            await ask(library, "/slow")
        except Exception as error:
            seconds = time.monotonic() - began
            notes[token] = {"error": type(error).__name__, "left": left, "seconds": seconds}
        await anyio.sleep(LIMIT)  # both end at the same moment: whether this could still answer is no matter


@app.get("/notes/{token}")
async def note(token: str) -> dict[str, Any]:
    return notes.get(token, {})
