"""Whom the scenarios ask: a service that is slow, or answers when the test lets it."""

from __future__ import annotations

from collections import defaultdict

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route


class Gate:
    """Holds requests back until it is opened."""

    def __init__(self) -> None:
        self.arrived = anyio.Event()
        self.opened = anyio.Event()
        self.waiting = 0
        self.passed = 0


_gates: defaultdict[str, Gate] = defaultdict(Gate)


async def slow(request: Request) -> Response:
    """Answer after some seconds."""
    await anyio.sleep(float(request.path_params["seconds"]))
    return PlainTextResponse("at last")


async def wait(request: Request) -> Response:
    """Answer once the gate is open."""
    gate = _gates[request.path_params["name"]]
    gate.waiting += 1
    gate.arrived.set()
    await gate.opened.wait()
    gate.waiting -= 1
    gate.passed += 1
    return PlainTextResponse("through")


async def arrived(request: Request) -> Response:
    """Answer once somebody waits at the gate."""
    await _gates[request.path_params["name"]].arrived.wait()
    return PlainTextResponse("somebody waits")


async def count(request: Request) -> Response:
    """How many wait at the gate, and how many have been answered."""
    gate = _gates[request.path_params["name"]]
    return JSONResponse({"waiting": gate.waiting, "passed": gate.passed})


async def opened(request: Request) -> Response:
    """Open the gate."""
    _gates[request.path_params["name"]].opened.set()
    return PlainTextResponse("open")


app = Starlette(
    routes=[
        Route("/slow/{seconds:float}", slow),
        Route("/gates/{name}", wait),
        Route("/gates/{name}/arrived", arrived),
        Route("/gates/{name}/count", count),
        Route("/gates/{name}/open", opened),
    ]
)
