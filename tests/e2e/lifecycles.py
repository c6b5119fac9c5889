"""A guarded application for the beginnings and ends of servers, loops and processes.

Run as a program, it serves itself twice: ``python -m tests.e2e.lifecycles ASYNCIO-PORT UVLOOP-PORT``, on two
loops in two threads of one process. SIGUSR1 ends the first server, SIGTERM both.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, FrameType
from typing import Any

import anyio
import trio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

import asyncguard
from asyncguard import BlockingMiddleware, LoopMonitor
from asyncguard._request import RequestRecord
from asyncguard.blocking._stall import Aftermath, LongTurn, Sample, Stall, Wait
from tests.e2e.recording import STALL, THRESHOLD, add_barrier, write

LIFESPAN = os.environ.get("ASYNCGUARD_TEST_LIFESPAN")
"""Whether the start-up and the shutdown are ``slow``."""

# What anyio imports when it is first used is no business of these tests.
for backend in ("asyncio", "trio"):
    importlib.import_module(f"anyio._backends._{backend}")

CHILD = os.environ.get("ASYNCGUARD_TEST_CHILD", "asyncio")
"""On which kind of loop a forked child goes on: ``asyncio``, ``asyncio-uvloop`` or ``trio``."""

_CHILD_TIMEOUT = 30.0


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    if LIFESPAN == "slow":
        time.sleep(STALL)  # blocks: start_up
    yield
    if LIFESPAN == "slow":
        await anyio.sleep(0.001)
        time.sleep(STALL)  # blocks: shutdown


async def hello(_: Request) -> Response:
    return PlainTextResponse(f"hello from {os.getpid()}")


async def sleep(_: Request) -> Response:
    time.sleep(STALL)  # blocks: sleep
    return PlainTextResponse("done")


async def read_pipe(request: Request) -> Response:
    size = len(Path(request.query_params["path"]).read_bytes())  # blocks: read
    return PlainTextResponse(str(size))


# -- a fork in the middle of a request -------------------------------------------------------------


async def fork(request: Request) -> Response:
    """The child leaves this loop behind and has one of its own; answers how it ended."""
    leave: Callable[[], None] = {"app": serve_one_request, "monitor": watch_a_loop}[
        request.path_params["what"]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, from 3.12 on
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert not [thread.name for thread in threading.enumerate() if "asyncguard" in thread.name]
            leave()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return PlainTextResponse(str(await exit_code(pid)))


async def exit_code(pid: int) -> int | str:
    """Of a child of this process, which is killed if it takes too long."""
    with anyio.move_on_after(_CHILD_TIMEOUT):
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            await anyio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "it hangs"


def run_anew(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `function` on a new loop of the kind that this process had."""
    backend, _, uvloop = CHILD.partition("-")
    thread = threading.Thread(
        target=anyio.run,
        args=[function],
        kwargs={"backend": backend, "backend_options": {"use_uvloop": True} if uvloop else {}},
        name="child",
    )
    if backend == "trio":
        # It runs nothing in a thread in which it was running when that was forked.
        thread.start()
        thread.join()
    else:
        thread.run()


def serve_one_request() -> None:
    """The same application, with the guard that watched the parent's loop."""
    answers: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        answers.append(message)

    async def main() -> None:
        scope = {"type": "http", "method": "GET", "path": "/sleep/child", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        await anyio.sleep(0.01)
        await monitor().stop()

    run_anew(main)
    assert [answer["type"] for answer in answers] == ["http.response.start", "http.response.body"]


def watch_a_loop() -> None:
    """Another monitor, made in the child."""

    async def main() -> None:
        async with LoopMonitor(threshold=THRESHOLD, on_block=write, log=False):
            await anyio.sleep(0.01)
            time.sleep(STALL)  # blocks: in_child
            await anyio.sleep(0.01)

    run_anew(main)


# -- what is left of requests ----------------------------------------------------------------------


async def upload(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def blink(_: Request) -> Response:
    time.sleep(1.2 * THRESHOLD)
    return PlainTextResponse("done")


async def with_tasks(_: Request) -> Response:
    async with anyio.create_task_group() as group:
        for _number in range(3):
            group.start_soon(anyio.sleep, 0)
    return PlainTextResponse("done")


async def failing(_: Request) -> Response:
    await anyio.sleep(0)
    raise LookupError("the handler's own error")


async def cancelled(_: Request) -> Response:
    with anyio.CancelScope() as scope:
        await anyio.sleep(0)
        scope.cancel()
        await anyio.sleep_forever()
    return PlainTextResponse("done")


async def endless(_: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"." * 1000
            await anyio.sleep(0.001)

    return StreamingResponse(chunks())


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


KINDS = {
    RequestRecord,
    LongTurn,
    Sample,
    Stall,
    Aftermath,
    Wait,
    Request,
    WebSocket,
    CoroutineType,
    AsyncGeneratorType,
    FrameType,
    Context,
    asyncio.Task,
    trio.lowlevel.Task,
}


async def counts(_: Request) -> Response:
    """What there is of all that a request, a stall or a cancellation makes."""
    gc.collect()
    found = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in KINDS)
    watch = monitor()._watch()
    scopes = sum(
        type(each) is dict and each.get("type") in ("http", "websocket") and "headers" in each
        for each in gc.get_objects()
    )
    return JSONResponse(
        {
            **found,
            "scopes": scopes,
            "in flight": len(watch.in_flight),
            "samples": len(watch._watchdog._samples),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
    )


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/hello", hello),
        Route("/sleep/{name}", sleep),
        Route("/pipe", read_pipe),
        Route("/fork/{what}", fork),
        Route("/upload", upload, methods=["POST"]),
        Route("/blink", blink),
        Route("/with-tasks", with_tasks),
        Route("/failing", failing),
        Route("/cancelled", cancelled),
        Route("/endless", endless),
        WebSocketRoute("/echo", echo),
        Route("/counts", counts),
    ],
)
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
add_barrier(app)


def monitor() -> LoopMonitor:
    guard = app.middleware_stack
    assert isinstance(guard, BlockingMiddleware)
    return guard.monitor


async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """Knows HTTP only, as the first examples of ASGI applications do."""
    assert scope["type"] == "http"
    await app.router(scope, receive, send)


bare = asyncguard.guard(without_lifespan, block_threshold=THRESHOLD, on_block=write)


# -- two loops in two threads ----------------------------------------------------------------------


def serve_twice(ports: dict[str, int]) -> None:
    servers = {
        loop: uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, loop=loop))
        for loop, port in ports.items()
    }

    def end(*loops: str) -> None:
        for loop in loops:
            servers[loop].should_exit = True

    signal.signal(signal.SIGUSR1, lambda number, frame: end("asyncio"))
    signal.signal(signal.SIGTERM, lambda number, frame: end(*servers))
    threads = [threading.Thread(target=server.run, name=loop) for loop, server in servers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [thread.name for thread in threading.enumerate() if "asyncguard-watchdog" in thread.name]
    print("left:", left)


# What lives as long as the server is not worth a look in every full garbage collection: with all
# that is imported here, that alone may be a stall.
gc.collect()
gc.freeze()

if __name__ == "__main__":
    serve_twice({"asyncio": int(sys.argv[1]), "uvloop": int(sys.argv[2])})
