"""Applications whose requests run out of time, each guarded in another way; served side by side.

The first part of a path is the name of the application, the last one a token of the test's own. What
happens in a handler is noted under that token, and so are the reports; ``/notes/TOKEN`` tells. Some handlers
stand at a gate of their token's, which ``/release/TOKEN`` opens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.sse import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import asyncguard
from asyncguard import TimeoutMiddleware, TimeoutReport, abandoned, remaining, timeout

LIMIT = 0.4
"""The limit of each clock, in seconds."""
GRACE = 0.5
LONG = 60.0
"""What takes that long would never be waited for."""

notes: defaultdict[str, list[Any]] = defaultdict(list)
threads: dict[str, int] = {"now": 0, "most": 0}
threads_lock = threading.Lock()
served_by: dict[str, str] = {}
"""The module of the server's that a request or a websocket came from, by its token."""
seen: ContextVar[str] = ContextVar("seen", default="nothing")


def note_report(report: TimeoutReport) -> None:
    said = {**dataclasses.asdict(report), "said": str(report)}
    notes[report.path.rpartition("/")[2]].append({"report": said})


# -- handlers that take too long -------------------------------------------------------------------

router = APIRouter()


@router.get("/quick/{token}")
async def quick(token: str) -> str:
    return token


@router.get("/asleep/{token}")
async def asleep(token: str) -> None:
    try:
        await anyio.sleep(LONG)  # awaits: asleep
        notes[token].append("slept")
    finally:
        notes[token].append("ended")


@router.get("/thread/{token}")
def in_thread(token: str, seconds: float = 4 * LIMIT) -> None:
    with threads_lock:
        threads["now"] += 1
        threads["most"] = max(threads["most"], threads["now"])
    time.sleep(seconds)  # awaits: thread
    with threads_lock:
        threads["now"] -= 1
    notes[token].append("ended")


@router.get("/swallow/{token}")
async def swallow(token: str) -> str:
    """Has to be cancelled twice."""
    for _ in range(2):
        try:
            await anyio.sleep(LONG)
        except anyio.get_cancelled_exc_class():
            notes[token].append("cancelled")
    return "too late"


@router.get("/shielded/{token}")
async def shielded(token: str) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.sleep(2 * LIMIT)
        await anyio.sleep(LIMIT)
        notes[token].append("section ended")
    try:
        await anyio.sleep(LONG)
    except anyio.get_cancelled_exc_class():
        notes[token].append("cancelled")
        raise


async def transfer(token: str) -> None:
    await asyncio.sleep(3 * LIMIT)
    notes[token].append("transferred")


@router.get("/asyncio-shield/{token}")
async def asyncio_shield(token: str) -> None:
    transfers = asyncio.create_task(transfer(token))
    try:
        await asyncio.shield(transfers)
    except asyncio.CancelledError:
        notes[token].append("cancelled")
        raise


@router.get("/cleanup/{token}")
async def cleanup(token: str) -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        await anyio.sleep(0.05)
        await anyio.sleep(0.05)
        notes[token].append("cleaned up")


async def dependency(token: str) -> AsyncIterator[str]:
    try:
        yield "dependency"
    except BaseException as error:
        notes[token].append(type(error).__name__)
        raise
    finally:
        notes[token].append("closed")


@router.get("/dependency/{token}")
async def with_dependency(token: str, _: Annotated[str, Depends(dependency)]) -> None:
    await anyio.sleep(LONG)


async def slow_dependency() -> None:
    await anyio.sleep(LONG)


@router.get("/slow-dependency/{token}")
async def with_slow_dependency(token: str, _: Annotated[None, Depends(slow_dependency)]) -> None: ...


@router.get("/failing-cleanup/{token}")
async def failing_cleanup(token: str) -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        raise LookupError(f"while cleaning up {token}")


# -- what keeps its own meaning --------------------------------------------------------------------


@router.get("/own-timeout-error/{token}")
async def own_timeout_error(token: str) -> None:
    raise TimeoutError("the application's own")


@router.get("/own-limit/{token}")
async def own_limit(token: str) -> str:
    try:
        with anyio.fail_after(0.05):
            await anyio.sleep(LONG)
    except TimeoutError:
        return "the application's own limit"
    return "never"


@router.get("/own-504/{token}")
async def own_504(token: str) -> None:
    raise HTTPException(504, "the application's own")


@router.get("/own-error/{token}")
async def own_error(token: str) -> None:
    raise LookupError(f"the application's own {token}")


# -- responses that have begun ---------------------------------------------------------------------


async def stalling(token: str) -> AsyncIterator[bytes]:
    try:
        yield b"begun" * 100
        await anyio.sleep(LONG)  # awaits: stalled
        yield b"ended" * 100
    finally:
        notes[token].append("ended")


@router.get("/stalled/{token}")
async def stalled(token: str, length: int = 0) -> Response:
    headers = {"content-length": str(length)} if length else {}
    return StreamingResponse(stalling(token), headers=headers, media_type="text/plain")


def stalling_in_thread(token: str) -> Iterator[bytes]:
    yield b"begun" * 100
    gate_of(token).passed_in_thread()
    notes[token].append("ended")
    yield b"ended" * 100


@router.get("/stalled-in-thread/{token}")
async def stalled_in_thread(token: str) -> Response:
    return StreamingResponse(stalling_in_thread(token), media_type="text/plain")


async def ticks(count: int, pause: float) -> AsyncIterator[bytes]:
    for number in range(count):
        yield f"data: {number}\n\n".encode()
        await anyio.sleep(pause)


@router.get("/live/{token}")
async def live(token: str) -> Response:
    return StreamingResponse(ticks(8, LIMIT / 2), media_type="text/plain")


@router.get("/events/{token}")
async def events(token: str) -> Response:
    return StreamingResponse(ticks(2, 3 * LIMIT), media_type="text/event-stream")


@router.get("/download/{token}")
async def download(token: str) -> Response:
    return FileResponse(os.environ["ASYNCGUARD_TEST_DOWNLOAD"])


async def work_afterwards(token: str) -> None:
    await anyio.sleep(3 * LIMIT)
    notes[token].append("worked afterwards")


@router.get("/background/{token}")
async def background(token: str) -> Response:
    return PlainTextResponse("sent before", background=BackgroundTask(work_afterwards, token))


@router.websocket("/websocket/{token}")
async def websocket(socket: WebSocket, token: str) -> None:
    await socket.accept()
    await anyio.sleep(3 * LIMIT)
    await socket.send_text(await socket.receive_text())
    await socket.receive()  # the client closes it: hypercorn on trio breaks if both do so at once


# -- the client's body -----------------------------------------------------------------------------


@router.post("/upload/{token}")
async def upload(token: str, request: Request) -> int:
    try:
        return len(await request.body())
    except BaseException as error:
        notes[token].append(type(error).__name__)
        raise


@router.post("/ignore-body/{token}")
async def ignore_body(token: str) -> None:
    await anyio.sleep(8 * LIMIT)


# -- limits of their own ---------------------------------------------------------------------------


@router.get("/longer/{token}")
@timeout(3 * LIMIT)
async def longer(token: str, seconds: float) -> float:
    await anyio.sleep(seconds)
    return remaining()


@router.get("/shorter/{token}")
@timeout(LIMIT / 4)
async def shorter(token: str) -> None:
    await anyio.sleep(LONG)


@router.get("/unlimited/{token}")
@timeout(None)
async def unlimited(token: str) -> str:
    await anyio.sleep(3 * LIMIT)
    return str(remaining())


@router.get("/shorter-thread/{token}")
@timeout(LIMIT / 4)
def shorter_in_thread(token: str) -> None:
    time.sleep(2 * LIMIT)


@router.get("/longer-thread/{token}")
@timeout(4 * LIMIT)
def longer_in_thread(token: str) -> float:
    time.sleep(2 * LIMIT)
    return remaining()


async def somewhat_slow() -> None:
    await anyio.sleep(2 * LIMIT)


@router.get("/longer-stream/{token}")
@timeout(4 * LIMIT)
async def longer_generator(token: str, _: Annotated[None, Depends(somewhat_slow)]) -> AsyncIterator[str]:
    """FastAPI sends what it yields, a line of JSON each."""
    yield token


@router.get("/shorter-behind-a-dependency/{token}")
@timeout(LIMIT / 4)
async def shorter_behind_dependency(token: str, _: Annotated[None, Depends(slow_dependency)]) -> None: ...


@timeout(LIMIT / 4)
async def impatient() -> str:
    return "impatient"


@router.get("/by-dependency/{token}")
async def by_dependency(token: str, _: Annotated[str, Depends(impatient)]) -> None:
    await anyio.sleep(LONG)


@router.get("/nested/{token}")
@timeout(None)
async def nested(token: str) -> None:
    await impatient()
    await anyio.sleep(LONG)


@router.get("/context/{token}")
@timeout(LIMIT)
async def sets_variable(token: str) -> str:
    seen.set(token)
    return token


hasty = APIRouter(prefix="/hasty", dependencies=[Depends(timeout(LIMIT / 4))])


@hasty.get("/asleep/{token}")
async def hasty_asleep(token: str) -> None:
    await anyio.sleep(LONG)


@hasty.get("/longer/{token}")
@timeout(4 * LIMIT)
async def hasty_longer(token: str) -> str:
    await anyio.sleep(LIMIT)
    return "in time"


class Methods(HTTPEndpoint):
    @timeout(LIMIT / 4)
    async def get(self, request: Request) -> None:
        await anyio.sleep(LONG)


@router.get("/left/{token}")
async def left(token: str) -> float:
    return remaining()


router.include_router(hasty)


# -- at a gate -------------------------------------------------------------------------------------

GATE = 15.0
"""Seconds after which the gate is given up: only a test that fails leaves it closed."""


class Gate:
    """Is opened once, for coroutines and for threads."""

    def __init__(self) -> None:
        self._opened = anyio.Event()
        self._opened_for_threads = threading.Event()

    def open(self) -> None:
        self._opened.set()
        self._opened_for_threads.set()

    async def passed(self) -> None:
        with anyio.fail_after(GATE):
            await self._opened.wait()

    def passed_in_thread(self) -> None:
        if not self._opened_for_threads.wait(GATE):
            raise TimeoutError


gates: dict[str, Gate] = {}


def gate_of(token: str) -> Gate:
    return gates.setdefault(token, Gate())  # in one step: threads come here too


async def pass_gate(token: str) -> None:
    await gate_of(token).passed()
    notes[token].append("passed")


gated = APIRouter(prefix="/gate")


@gated.get("/shielded/{token}")
async def shielded_at_gate(token: str) -> None:
    with anyio.CancelScope(shield=True):
        notes[token].append("begun")
        await pass_gate(token)
    try:
        await anyio.sleep(LONG)
    except anyio.get_cancelled_exc_class():
        notes[token].append("cancelled")
        raise


@gated.get("/asyncio-shield/{token}")
async def asyncio_shield_at_gate(token: str) -> None:
    passes = asyncio.create_task(pass_gate(token))
    try:
        await asyncio.shield(passes)
    except asyncio.CancelledError:
        notes[token].append("cancelled")
        raise


@gated.get("/cleanup/{token}")
async def cleanup_at_gate(token: str, shield: bool) -> None:
    try:
        await anyio.sleep(LONG)
    finally:
        notes[token].append("cancelled")
        with anyio.CancelScope(shield=shield):
            await pass_gate(token)


@gated.get("/swallow/{token}")
async def swallow_at_gate(token: str) -> str:
    while "passed" not in notes[token]:
        try:
            await pass_gate(token)
        except asyncio.CancelledError:
            notes[token].append("cancelled")
    return "too late"


@gated.get("/thread/{token}")
def thread_at_gate(token: str) -> None:
    notes[token].append("begun")
    gate_of(token).passed_in_thread()
    notes[token].append("passed")


barriers: dict[str, threading.Barrier] = {}


@gated.get("/together/{token}")
@timeout(None)
def together(token: str, count: int) -> int:
    """Waits in its thread until so many others are there as well."""
    return barriers.setdefault(token, threading.Barrier(count)).wait(GATE)


# Streams that have nothing to send until the gate is open. Their response begins before that.

BEGIN = LIMIT * 3 / 4
"""Their own limit: has passed when the idle clock stops them, and is no race for a slow machine."""


async def late_items(token: str) -> AsyncIterator[bytes]:
    try:
        await pass_gate(token)
        yield b"first"
    finally:
        notes[token].append("ended")


def late_items_in_thread(token: str) -> Iterator[bytes]:
    gate_of(token).passed_in_thread()
    notes[token].append("ended")
    yield b"first"


@gated.get("/stream/{token}")
@timeout(BEGIN)
async def stream(token: str) -> Response:
    return StreamingResponse(late_items(token), media_type="text/plain")


@gated.get("/stream-in-thread/{token}")
@timeout(BEGIN)
async def stream_in_thread(token: str) -> Response:
    return StreamingResponse(late_items_in_thread(token), media_type="text/plain")


@gated.get("/generator/{token}")
@timeout(BEGIN)
async def generator(token: str) -> AsyncIterator[str]:
    async for item in late_items(token):
        yield item.decode()


@gated.get("/generator-in-thread/{token}")
@timeout(BEGIN)
def generator_in_thread(token: str) -> Iterator[str]:
    for item in late_items_in_thread(token):
        yield item.decode()


@gated.get("/events/{token}", response_class=EventSourceResponse)
@timeout(BEGIN)
async def late_events(token: str) -> AsyncIterator[str]:
    async for item in late_items(token):
        yield item.decode()


router.include_router(gated)


# -- when and how often it is cancelled ------------------------------------------------------------


@router.get("/timed/{token}")
async def timed(token: str) -> None:
    """Notes when it was cancelled; one clock for all processes."""
    notes[token].append("begun")
    try:
        await anyio.sleep(LONG)
    finally:
        notes[token].append(time.monotonic())


@router.get("/endless-cleanup/{token}")
async def endless_cleanup(token: str) -> None:
    """Notes when it was cancelled, and how many requests ran on then."""
    try:
        await anyio.sleep(LONG)
    finally:
        notes[token] += [time.monotonic(), abandoned()]
        try:
            await anyio.sleep_forever()
        finally:
            notes[token] += [time.monotonic(), abandoned()]


@router.post("/reading/{token}")
async def reading(token: str, request: Request) -> None:
    """Goes on for nobody, unless it is cancelled."""
    try:
        async for _ in request.stream():
            notes[token].append("read")
    except ClientDisconnect:
        await anyio.sleep(LONG)
    finally:
        notes[token].append("ended")


class Deaf(Response):
    """A response that begins and stalls, and does not listen for its client's leaving as Starlette's do."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        try:
            await anyio.sleep(LONG)
        finally:
            notes[scope["path"].rpartition("/")[2]].append("ended")


@router.get("/deaf/{token}")
async def deaf(token: str) -> Response:
    return Deaf()


# -- middlewares -----------------------------------------------------------------------------------


class RequestId:
    """Puts a header on each response, from a context variable."""

    current: ContextVar[str] = ContextVar("request_id")

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.current.set(scope["path"].rpartition("/")[2])

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", self.current.get().encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)
        notes[self.current.get()].append(f"seen outside: {seen.get()}")


class Hangs:
    """Hangs before or after the application, or while it passes the response on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        token, where = scope["path"].rpartition("/")[2], scope["query_string"].decode()

        async def send_slowly(message: Any) -> None:
            if where == "hang=sending":
                await anyio.sleep(LONG)
            await send(message)

        try:
            if where == "hang=before":
                await anyio.sleep(LONG)
            await self.app(scope, receive, send_slowly)
        finally:
            notes[token].append("middleware ended")


CallNext = Callable[[Request], Awaitable[Response]]


class Passing(BaseHTTPMiddleware):
    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        return await call_next(request)


class HangsAfterwards(BaseHTTPMiddleware):
    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        if request.url.query == "hang=after":
            await anyio.sleep(LONG)
        return response


# -- the applications ------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "timeout": LIMIT,
    "idle_timeout": LIMIT,
    "body_timeout": LIMIT,
    "on_timeout": note_report,
}


CORS = (CORSMiddleware, {"allow_origins": ["https://client.example"]})
GZIP = (GZipMiddleware, {"minimum_size": 1})
BASE: tuple[Any, dict[str, Any]] = (Passing, {})


def make(
    *middlewares: Any, install: bool = True, before: int = 0, grace: float = GRACE, **options: Any
) -> FastAPI:
    """An application with these middlewares, innermost first; `before` of them are added before `install`."""
    app = FastAPI()
    app.include_router(router)
    app.mount("/mounted", mounted())
    app.mount("/mounted-base", mounted(BASE))
    app.router.routes.append(Route("/methods/{token}", Methods))
    for middleware, arguments in middlewares[:before]:
        app.add_middleware(middleware, **arguments)
    if install:
        asyncguard.install(app, timeout_grace=grace, **{"block_threshold": None, **OPTIONS, **options})
    else:
        app.add_middleware(TimeoutMiddleware, grace=grace, **{**OPTIONS, **options})
    for middleware, arguments in middlewares[before:]:
        app.add_middleware(middleware, **arguments)
    return app


def mounted(*middlewares: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    for middleware, arguments in middlewares:
        app.add_middleware(middleware, **arguments)
    return app


def mounted_guarded() -> FastAPI:
    app = make(timeout=4 * LIMIT)
    outer = FastAPI()
    outer.mount("/inner", app)
    asyncguard.install(outer, block_threshold=None, timeout_grace=GRACE, **OPTIONS)
    return outer


async def fixed_answer(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"late": scope["path"]}, 503)(scope, receive, send)


async def failing_answer(scope: Scope, receive: Receive, send: Send) -> None:
    raise LookupError("no answer")


async def hanging_answer(scope: Scope, receive: Receive, send: Send) -> None:
    await anyio.sleep(LONG)


APPLICATIONS: dict[str, FastAPI] = {
    "plain": make(),
    "watched": make(block_threshold=0.2),
    "watched-base": make(BASE, block_threshold=0.2),
    "headers-before": make((RequestId, {}), CORS, before=2),
    "headers-after": make((RequestId, {}), CORS),
    "gzip": make(GZIP),
    "base": make(BASE),
    "base-twice": make(BASE, GZIP, BASE),
    "hangs-before": make((Hangs, {}), (HangsAfterwards, {}), before=2),
    "hangs-after": make((Hangs, {}), (HangsAfterwards, {})),
    "single": make(install=False),
    "single-base-inside": make(BASE, install=False, before=1),
    "single-base-outside": make(BASE, install=False),
    "inner-guarded": mounted_guarded(),
    "answer": make(timeout_answer=fixed_answer),
    "answer-response": make(timeout_answer=PlainTextResponse("later, please", 503)),
    "failing-answer": make(timeout_answer=failing_answer, timeout_status_code=503),
    "hanging-answer": make(timeout_answer=hanging_answer),
    "patient": make(grace=LONG),
    "patient-single": make(install=False, grace=LONG),
    "disconnect": make(timeout=LONG, idle_timeout=None, body_timeout=None, cancel_on_disconnect=True),
    "disconnect-single": make(
        BASE, install=False, timeout=None, idle_timeout=None, body_timeout=None, cancel_on_disconnect=True
    ),
    "disconnect-base": make(
        BASE, timeout=LONG, idle_timeout=None, body_timeout=None, cancel_on_disconnect=True
    ),
    "deadline": make(deadline_header="X-Timeout"),
    "deadline-single": make(install=False, timeout=None, deadline_header="X-Timeout"),
}


NO_WORKERS = ("MainThread", "asyncguard-", "asyncio_")
"""What the names of threads begin with that are none of anyio's or trio's workers."""


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    token = scope["path"].rpartition("/")[2]
    told = {
        "notes": notes[token],
        "abandoned": abandoned(),
        "threads": threads,
        "borrowed": anyio.to_thread.current_default_thread_limiter().borrowed_tokens,
        "workers": sum(not each.name.startswith(NO_WORKERS) for each in threading.enumerate()),
        "served_by": served_by.get(token),
    }
    await JSONResponse(told)(scope, receive, send)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await APPLICATIONS["plain"](scope, receive, send)
        return
    name, _, path = scope["path"].removeprefix("/").partition("/")
    if name == "notes":
        await tell(scope, receive, send)
    elif name == "release":
        gate_of(path).open()
        await PlainTextResponse("open")(scope, receive, send)
    else:
        served_by[path.rpartition("/")[2]] = type(getattr(send, "__self__", None)).__module__
        await APPLICATIONS[name]({**scope, "path": f"/{path}"}, receive, send)
