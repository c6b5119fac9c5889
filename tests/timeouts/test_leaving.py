"""What cannot be stopped, the client that leaves, and what nobody holds on to afterwards."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from asyncguard import abandoned, timeout
from asyncguard._reporter import Reporter
from asyncguard.timeouts import _limit, _middleware, _responder
from asyncguard.timeouts._responder import Responder
from tests.asgi_driver import (
    ANSWER,
    DISCONNECT,
    NO_BODY,
    SOON,
    Client,
    Reports,
    answer_ok,
    guarded,
    http_scope,
    installed,
    piece,
    responder_of,
    sleep,
)

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio

layers = pytest.mark.parametrize("single", [True, False], ids=["single layer", "install"])


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_limit, "shortest", math.inf)
    yield
    assert abandoned() == 0


# -- threads -----------------------------------------------------------------------------------------


@layers
async def test_a_thread_is_waited_for_and_counted(single: bool) -> None:
    """It cannot be stopped: the client is answered, and its request goes on until it ends."""
    release = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.to_thread.run_sync(release.wait)

    reports = Reports()
    client = Client()
    async with anyio.create_task_group() as group:
        group.start_soon(client.drive, guarded(app, single=single, timeout=0.5, on_timeout=reports))
        await client.complete.wait()
        await anyio.wait_all_tasks_blocked()
        assert abandoned() == 1
        assert (await reports.first()).outcome == "thread"
        release.set()
    assert client.status == 504
    assert abandoned() == 0


async def test_a_plain_endpoints_own_limit_where_a_dependency_has_another_and_all_threads_are_busy() -> None:
    """It is known before the endpoint has got a thread, whatever the dependencies around it have set."""
    app, release = FastAPI(), threading.Event()

    @timeout(30)
    async def dependency() -> None: ...

    @app.get("/busy")
    def busy() -> None:
        release.wait()

    @app.get("/limited", dependencies=[Depends(dependency)])
    @timeout(SOON)
    def limited() -> None: ...

    middleware = guarded(app, timeout=20)
    limiter = anyio.to_thread.current_default_thread_limiter()
    tokens, limiter.total_tokens = limiter.total_tokens, 1
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(Client(scope=http_scope("/busy")).drive, middleware)
            await anyio.wait_all_tasks_blocked()
            client = Client(scope=http_scope("/limited"))
            group.start_soon(client.drive, middleware)
            with anyio.move_on_after(8):
                await client.complete.wait()
            release.set()
    finally:
        limiter.total_tokens = tokens
    assert client.status == 504


@layers
async def test_without_a_thread_for_the_report_the_request_is_answered_all_the_same(
    single: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("asyncguard"):
            raise RuntimeError("can't start new thread")
        start(thread)

    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            steps.append("stopped")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(_middleware, "_reporter", Reporter("asyncguard-timeouts", _middleware.logger))
    client = Client()
    await client.drive(guarded(app, single=single))
    assert client.status == 504
    assert steps == ["stopped"]
    assert [record.getMessage() for record in caplog.records] == [
        "no thread to be had for the report of GET /"
    ]


async def test_nor_does_it_keep_what_runs_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of it comes before it has ended, from a timer."""
    release, start = threading.Event(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("asyncguard"):
            raise RuntimeError("can't start new thread")
        start(thread)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.to_thread.run_sync(release.wait)
        await anyio.sleep_forever()

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(_middleware, "_reporter", Reporter("asyncguard-timeouts", _middleware.logger))
    client = Client()
    async with anyio.create_task_group() as group:
        group.start_soon(client.drive, guarded(app))
        await client.complete.wait()
        await anyio.wait_all_tasks_blocked()
        release.set()
    assert client.status == 504


# -- the client that leaves --------------------------------------------------------------------------


@layers
async def test_a_client_that_leaves_takes_its_handler_with_it(single: bool) -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        client.leave()
        try:
            await anyio.sleep_forever()
        finally:
            steps.append("cancelled")

    client = Client()
    await client.drive(guarded(app, single=single, timeout=30, cancel_on_disconnect=True))
    assert steps == ["cancelled"]
    assert abandoned() == 0


@layers
async def test_but_not_what_comes_after_the_response(single: bool) -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer_ok(scope, receive, send)
        client.leave()
        for _ in range(10):
            await anyio.wait_all_tasks_blocked()
        steps.append("in the background")

    client = Client()
    await client.drive(guarded(app, single=single, timeout=30, cancel_on_disconnect=True))
    assert client.status == 200
    assert steps == ["in the background"]


async def test_two_who_receive_at_once() -> None:
    """Each gets a piece, and both hear of it when the client leaves."""
    bodies: list[bytes] = []
    left: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            bodies.append((await receive())["body"])
            if len(bodies) == 2:
                read_all.set()
            await read_all.wait()
            left.append(await receive())

        read_all = anyio.Event()
        await send(ANSWER[0])
        await send(ANSWER[1])  # what comes now is not cancelled
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            group.start_soon(read)
            await read_all.wait()
            await anyio.wait_all_tasks_blocked()
            client.leave()

    client = Client(anyio.wait_all_tasks_blocked, piece(b"1"), {"type": "http.request", "body": b"2"})
    await client.drive(guarded(app, timeout=30, cancel_on_disconnect=True))
    assert sorted(bodies) == [b"1", b"2"]
    assert left == [DISCONNECT, DISCONNECT]
    assert client.status == 200


# -- what is over is over ----------------------------------------------------------------------------


async def test_a_request_that_was_answered_is_not_counted_any_more() -> None:
    client = Client()
    await client.drive(guarded(sleep))
    assert abandoned() == 0


async def test_nor_is_one_whose_stream_was_cut(clock: TurnedClock) -> None:
    """With a patience that is not over yet."""

    async def endpoint(request: Request) -> Response:
        async def content() -> Any:
            yield b"a piece"
            clock.turn(0.6)
            responder_of(request.scope).look()
            counts.append(abandoned())
            await anyio.sleep_forever()

        return StreamingResponse(content())

    counts: list[int] = []
    app = installed(endpoint, timeout=30, idle_timeout=0.5, timeout_grace=30)
    client = Client(scope=http_scope(asgi={"version": "3.0", "spec_version": "2.4"}))
    await client.drive(app)
    assert client.types == ["start", "body"]
    assert counts == [1]
    assert abandoned() == 0


@layers
@pytest.mark.parametrize("listens", [False, True], ids=["", "cancel_on_disconnect"])
async def test_a_request_leaves_nothing_to_the_garbage_collector(single: bool, listens: bool) -> None:
    gone: list[weakref.ref[Responder]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        gone.append(weakref.ref(responder_of(scope)))
        await anyio.lowlevel.checkpoint()
        await PlainTextResponse("ok")(scope, receive, send)

    middleware = guarded(app, single=single, timeout=30, cancel_on_disconnect=listens)
    await Client().drive(middleware)  # what is made once is made
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            async with anyio.create_task_group() as group:
                group.start_soon(Client().drive, middleware)
        await anyio.wait_all_tasks_blocked()
        await anyio.sleep(0.001)
        assert [reference() for reference in gone] == [None] * 4
    finally:
        gc.enable()


async def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_responder, "_DELIVERED_WITHIN", SOON)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ANSWER[0])
        await anyio.sleep_forever()

    client = Client(NO_BODY)
    await client.drive(guarded(sleep, answer=answer))
    assert client.types == ["start"]
