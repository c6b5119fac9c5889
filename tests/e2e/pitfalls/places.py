"""Where it blocks: one sleeping line in each place that code of a request, or of none, can run.

A line that is to blame ends with the comment ``# blocks: NAME``; it is reached by ``/NAME``.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.e2e.pitfalls.timing import timed

__all__ = ["behind_asgi", "behind_base", "router", "work_off"]

router = APIRouter()


# -- around the endpoint ---------------------------------------------------------------------------


async def look_up(seconds: float) -> float:
    with timed("dependency"):
        time.sleep(seconds)  # blocks: dependency
    return seconds


@router.get("/dependency")
async def with_dependency(found: Annotated[float, Depends(look_up)]) -> float:
    return found


class SlowMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seconds = float(Request(scope).query_params["seconds"])
            with timed("asgi_middleware"):
                time.sleep(seconds)  # blocks: asgi_middleware
        await self.app(scope, receive, send)


class SlowBaseMiddleware(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        seconds = float(request.query_params["seconds"])
        with timed("base_middleware"):
            time.sleep(seconds)  # blocks: base_middleware
        return await call_next(request)


async def nothing() -> None:
    pass


behind_asgi, behind_base = FastAPI(), FastAPI()
behind_asgi.add_middleware(SlowMiddleware)
behind_asgi.add_api_route("/item", nothing)
behind_base.add_middleware(SlowBaseMiddleware)
behind_base.add_api_route("/item", nothing)


async def clean(seconds: float) -> None:
    with timed("background"):
        time.sleep(seconds)  # blocks: background


@router.get("/background")
async def with_background(seconds: float) -> Response:
    return PlainTextResponse("sent before", background=BackgroundTask(clean, seconds))


@router.websocket("/websocket")
async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        seconds = float(message)
        with timed("websocket"):
            time.sleep(seconds)  # blocks: websocket
        await websocket.send_text("slept")


async def chunks(seconds: float) -> AsyncIterator[str]:
    yield "first "
    await asyncio.sleep(0)
    with timed("stream"):
        time.sleep(seconds)  # blocks: stream
    yield "last"


@router.get("/stream")
async def stream(seconds: float) -> Response:
    return StreamingResponse(chunks(seconds))


# -- child tasks -----------------------------------------------------------------------------------


async def idle() -> None:
    await asyncio.sleep(0)


async def sleep_in_task(seconds: float) -> None:
    await asyncio.sleep(0)
    with timed("create_task"):
        time.sleep(seconds)  # blocks: create_task


@router.get("/create_task")
async def with_task(seconds: float) -> None:
    await asyncio.create_task(sleep_in_task(seconds))


async def sleep_when_gathered(seconds: float) -> None:
    await asyncio.sleep(0)
    with timed("gather"):
        time.sleep(seconds)  # blocks: gather


@router.get("/gather")
async def with_gather(seconds: float) -> None:
    await asyncio.gather(idle(), sleep_when_gathered(seconds), idle())


async def sleep_in_group(seconds: float) -> None:
    await asyncio.sleep(0)
    with timed("task_group"):
        time.sleep(seconds)  # blocks: task_group


@router.get("/task_group")
async def with_group(seconds: float) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(idle())
        group.create_task(sleep_in_group(seconds))


# -- callbacks -------------------------------------------------------------------------------------


def sleep_soon(seconds: float, done: asyncio.Event) -> None:
    with timed("call_soon"):
        time.sleep(seconds)  # blocks: call_soon
    done.set()


@router.get("/call_soon")
async def with_call_soon(seconds: float) -> None:
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(sleep_soon, seconds, done)
    await done.wait()


def sleep_later(seconds: float) -> None:
    with timed("call_later"):
        time.sleep(seconds)  # blocks: call_later


@router.get("/call_later")
async def with_call_later(seconds: float) -> None:
    """The answer is out by the time the callback runs."""
    asyncio.get_running_loop().call_later(0.02, sleep_later, seconds)


def sleep_when_done(seconds: float, _: asyncio.Future[None]) -> None:
    with timed("done_callback"):
        time.sleep(seconds)  # blocks: done_callback


@router.get("/done_callback")
async def with_done_callback(seconds: float) -> None:
    future = asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.001)
    future.add_done_callback(functools.partial(sleep_when_done, seconds))
    await future


async def numbers(seconds: float) -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        with timed("finaliser"):
            time.sleep(seconds)  # blocks: finaliser


@router.get("/finaliser")
async def leave_generator(seconds: float) -> int:
    """The loop closes the generator in a task of its own, once nobody refers to it any more."""
    async for number in numbers(seconds):
        return number
    return 0


# -- no request's ----------------------------------------------------------------------------------


async def work_off(jobs: asyncio.Queue[float]) -> None:
    """Runs from start-up to shutdown."""
    while True:
        seconds = await jobs.get()
        with timed("start_up_task"):
            time.sleep(seconds)  # blocks: start_up_task


@router.get("/start_up_task")
async def give_job(request: Request, seconds: float) -> None:
    request.app.state.jobs.put_nowait(seconds)
