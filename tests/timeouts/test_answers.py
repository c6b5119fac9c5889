"""What a request is answered with when its time is up."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import abandoned
from asyncguard._request import SCOPE_KEY
from asyncguard.timeouts import _limit, _responder
from tests.asgi_driver import (
    ANSWER,
    NO_BODY,
    SOON,
    Client,
    answer_ok,
    guarded,
    http_scope,
    installed,
    sleep,
)

pytestmark = pytest.mark.anyio

layers = pytest.mark.parametrize("single", [True, False], ids=["single layer", "install"])


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_limit, "shortest", math.inf)
    yield
    assert abandoned() == 0


async def sleeping_endpoint(request: Request) -> Response:
    await anyio.sleep_forever()
    raise AssertionError


class Adds:
    """A middleware that appends to the list of headers that it is given, as some do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-added", b"once"))
            await send(message)

        await self.app(scope, receive, send_more)


async def test_a_handler_that_sleeps_is_answered_and_stopped() -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            steps.append("stopped")

    client = Client()
    await client.drive(guarded(app))
    assert client.status == 504
    assert b"The service did not answer in time." in client.body
    assert (b"content-length", b"%d" % len(client.body)) in client.headers
    assert steps == ["stopped"]


async def test_one_that_answers_in_time_is_left_alone() -> None:
    client = Client()
    await client.drive(guarded(answer_ok))
    assert client.sent == [{**ANSWER[0]}, {**ANSWER[1], "headers": []}]


class AnswersToEverything:
    """As clients of databases do, whose attributes are databases, tables, ..."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        if len(self.asked) > 10_000:
            raise AssertionError("asked without end")
        return AnswersToEverything(self.asked)


class AnswersToNothing:
    """As proxies do outside what they are bound to."""

    def __init__(self, asked: list[str]) -> None:
        self.__dict__["asked"] = asked

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        raise RuntimeError("outside of its context")


class Everything(AnswersToEverything):
    async def work(self) -> None:
        await anyio.sleep_forever()


class Nothing(AnswersToNothing):
    async def work(self) -> None:
        await anyio.sleep_forever()


class EverythingAwaited(AnswersToEverything):
    """Its steps are its own, and not Python's."""

    def work(self) -> Any:
        return self

    def __await__(self) -> Any:
        self.steps = anyio.sleep_forever().__await__()
        return self

    def __next__(self) -> Any:
        return next(self.steps)

    def send(self, value: Any) -> Any:
        return self.steps.send(value)

    def throw(self, *error: Any) -> Any:
        return self.steps.throw(*error)

    def close(self) -> None:
        self.steps.close()


class NothingAwaited(AnswersToNothing):
    work = EverythingAwaited.work
    __await__ = EverythingAwaited.__await__
    __next__ = EverythingAwaited.__next__
    send = EverythingAwaited.send
    throw = EverythingAwaited.throw
    close = EverythingAwaited.close


@pytest.mark.parametrize("kind", [Everything, Nothing, EverythingAwaited, NothingAwaited])
async def test_an_object_that_answers_to_every_name_or_to_none_is_not_asked(kind: Any) -> None:
    asked: list[str] = []
    thing = kind(asked)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await thing.work()

    client = Client()
    await client.drive(guarded(app))
    assert client.status == 504
    assert asked == []


@pytest.mark.parametrize("kind", [AnswersToEverything, AnswersToNothing])
async def test_such_an_object_as_answer_is_not_asked_either(kind: Any) -> None:
    class Answer(kind):  # type: ignore[misc]
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await PlainTextResponse("mine", 503)(scope, receive, send)

    asked: list[str] = []
    client = Client()
    await client.drive(guarded(sleep, answer=Answer(asked)))
    assert (client.status, client.body) == (503, b"mine")
    assert asked == []


@layers
async def test_a_failing_answer_is_logged_and_the_plain_one_goes_out(
    single: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("no template")

    client = Client()
    await client.drive(guarded(sleep, single=single, answer=answer))
    assert client.status == 504
    assert b"The service did not answer in time." in client.body
    (record,) = caplog.records
    assert record.name == "asyncguard.timeouts"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_an_answer_that_fails_halfway_is_not_followed_by_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ANSWER[0])
        raise LookupError("no template")

    client = Client()
    await client.drive(guarded(sleep, answer=answer))
    assert client.types == ["start"]
    assert len(caplog.records) == 1


@layers
async def test_an_answer_that_sends_nothing_gives_way_to_the_plain_one(single: bool) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None: ...

    client = Client()
    await client.drive(guarded(sleep, single=single, answer=answer))
    assert client.status == 504


@layers
async def test_an_answer_that_hangs_gives_way_to_the_plain_one(
    single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_responder, "_ANSWERED_WITHIN", SOON)
    given_up = anyio.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            given_up.set()

    client = Client()
    await client.drive(guarded(sleep, single=single, answer=answer))
    assert client.status == 504
    with anyio.fail_after(10):  # which of two cancelled tasks runs first is up to trio
        await given_up.wait()


@layers
async def test_a_response_that_is_the_answer_each_time_stays_as_it_is(single: bool) -> None:
    """Middlewares append to the headers of what passes through them."""
    answer = PlainTextResponse("busy", 503)
    headers = list(answer.raw_headers)
    app: ASGIApp
    if single:
        app = Adds(guarded(sleep, answer=answer))
    else:
        app = installed(sleeping_endpoint, Adds, timeout_answer=answer)
    for _ in range(3):
        client = Client()
        await client.drive(app)
        assert (client.status, client.body) == (503, b"busy")
        assert [name for name, _ in client.headers].count(b"x-added") == 1
    assert answer.raw_headers == headers


async def test_the_plain_answer_stays_as_it_is() -> None:
    app = Adds(guarded(sleep))
    for _ in range(3):
        client = Client()
        await client.drive(app)
        assert [name for name, _ in client.headers].count(b"x-added") == 1


@pytest.mark.parametrize("version", ["2.3", "2.4"])
@layers
async def test_an_answer_in_pieces_is_whole(single: bool, version: str) -> None:
    """Before ASGI 2.4 a streaming response listens for its client's leaving, and stops then."""

    async def content() -> AsyncIterator[str]:
        for letter in "busy":
            yield letter
            await anyio.sleep(0.001)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(content(), 503)(scope, receive, send)

    client = Client(scope=http_scope(asgi={"version": "3.0", "spec_version": version}))
    await client.drive(guarded(sleep, single=single, answer=answer))
    assert (client.status, client.body) == (503, b"busy")


async def test_an_answer_may_read_the_body_which_is_empty() -> None:
    bodies: list[bytes] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await Request(scope, receive).body())
        await answer_ok(scope, receive, send)

    client = Client({"type": "http.request", "body": b"of the handler"})
    await client.drive(guarded(sleep, answer=answer))
    assert client.status == 200
    assert bodies == [b""]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks before 3.12")
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
@pytest.mark.parametrize("header", [False, True], ids=["limit", "header"])
@pytest.mark.parametrize("hangs", [False, True], ids=["", "hanging answer"])
async def test_tasks_that_begin_at_once(hangs: bool, header: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_responder, "_ANSWERED_WITHIN", SOON)
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    answer = PlainTextResponse("busy", 504)
    app = guarded(
        sleep,
        timeout=30 if header else SOON,
        deadline_header="x-wait" if header else None,
        answer=sleep if hangs else answer,
        cancel_on_disconnect=True,
    )
    client = Client(NO_BODY, scope=http_scope(headers=[(b"x-wait", b"0.05")]))
    await client.drive(app)
    assert client.status == 504
    assert (client.body == b"busy") is not hangs


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks before 3.12")
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
async def test_tasks_that_begin_at_once_and_a_client_that_has_left_already() -> None:
    """The server's task is not cancelled for a request that never waits: that would come after its end."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer_ok(scope, receive, send)

    client = Client()
    await guarded(app, timeout=30, cancel_on_disconnect=True)(client.scope, receive, client.send)
    await anyio.sleep(0)
    assert client.status == 200


async def test_a_caller_who_will_not_wait_is_answered_without_the_handler() -> None:
    called: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        called.append(scope["path"])

    client = Client(scope=http_scope(headers=[(b"x-wait", b"0")]))
    await client.drive(guarded(app, deadline_header="X-Wait"))
    assert client.status == 504
    assert called == []


@pytest.mark.parametrize("header", [None, "X-Wait"])
async def test_the_deadline_knows_the_header(header: str | None) -> None:
    found: list[str | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        deadline = scope[SCOPE_KEY].deadline
        found.append(deadline.header)
        await answer_ok(scope, receive, send)

    await Client().drive(guarded(app, deadline_header=header))
    assert found == [header]


async def test_nothing_of_the_handlers_comes_after_the_answer() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await answer_ok(scope, receive, send)

    client = Client()
    await client.drive(guarded(app))
    assert client.status == 504
