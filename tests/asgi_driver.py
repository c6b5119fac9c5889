"""A server's side of one request, without a server: what comes in is scripted, what goes out recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import asyncguard
from asyncguard import TimeoutMiddleware
from asyncguard._request import SCOPE_KEY
from asyncguard.events import TimeoutReport
from asyncguard.timeouts._loops import running_loop
from asyncguard.timeouts._responder import Responder

__all__ = [
    "ANSWER",
    "DISCONNECT",
    "NO_BODY",
    "SOON",
    "Client",
    "Looks",
    "Reports",
    "Step",
    "answer_ok",
    "guarded",
    "http_scope",
    "installed",
    "piece",
    "responder_of",
    "sleep",
]

START = "http.response.start"
BODY = "http.response.body"

ANSWER: tuple[Message, ...] = (
    {"type": START, "status": 200, "headers": []},
    {"type": BODY, "body": b"ok", "more_body": False},
)
"""What `answer_ok` sends."""
NO_BODY: Message = {"type": "http.request", "body": b"", "more_body": False}
DISCONNECT: Message = {"type": "http.disconnect"}

SOON = 0.05
"""The limit where a test waits for a timer of the loop, in seconds."""

Step = Message | Callable[[], Awaitable[object]]
"""What a client does next: it sends something, or lets something happen first."""


def http_scope(path: str = "/", headers: Iterable[tuple[bytes, bytes]] = (), **more: Any) -> Scope:
    """The scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("203.0.113.1", 50000),
        "server": ("localhost", 80),
        **more,
    }


def piece(body: bytes) -> Message:
    """A piece of a request's body that is not the last one."""
    return {"type": "http.request", "body": body, "more_body": True}


async def answer_ok(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers at once."""
    for message in ANSWER:
        await send(message)


async def sleep(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that never answers."""
    await anyio.sleep_forever()


def guarded(app: ASGIApp, *, single: bool = True, **options: Any) -> ASGIApp:
    """An application behind a `TimeoutMiddleware`, by itself or as `asyncguard.install` puts it in place."""
    options = {"timeout": SOON, "log": False, **options}
    if single:
        return TimeoutMiddleware(app, **options)

    class Endpoint(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive, send)

    async def endpoint(request: Request) -> Response:
        return Endpoint()

    names = {"grace": "timeout_grace", "answer": "timeout_answer"}
    return installed(endpoint, **{names.get(name, name): option for name, option in options.items()})


def installed(
    endpoint: Callable[[Request], Awaitable[Response]], *middlewares: Any, **options: Any
) -> ASGIApp:
    """An application with one endpoint and some middlewares, guarded by `asyncguard.install`."""
    app = Starlette(routes=[Route("/", endpoint)])
    for middleware in middlewares:
        app.add_middleware(middleware)
    asyncguard.install(app, **{"block_threshold": None, "timeout": SOON, "log": False, **options})
    return app


def responder_of(scope: Scope) -> Responder:
    """Who guards a request in flight."""
    responder = scope[SCOPE_KEY].deadline
    assert isinstance(responder, Responder)
    return responder


class Client:
    """One request, and all that is sent to it.

    Args:
        *script: What comes in, one after the other: messages, and what is awaited before the next one. Then
            the client stays, until it leaves.
        on_send: Awaited with each message before it is taken: a server that is in no hurry.
        scope: The scope; by default that of ``GET /``.

    Attributes:
        sent: The messages that the server has taken.
        started: Set once the response has begun.
        complete: Set once it has ended.
    """

    def __init__(
        self,
        *script: Step,
        on_send: Callable[[Message], Awaitable[object]] | None = None,
        scope: Scope | None = None,
    ) -> None:
        self.scope: Scope = http_scope() if scope is None else scope
        self.sent: list[Message] = []
        self.started = anyio.Event()
        self.complete = anyio.Event()
        self._script: list[Step] = list(script or (NO_BODY,))
        self._on_send = on_send
        self._left = anyio.Event()

    async def drive(self, app: ASGIApp) -> None:
        """Run the application for this request, as a server does; it hangs for ten seconds at most."""
        with anyio.fail_after(10):
            await app(self.scope, self.receive, self.send)

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def receive(self) -> Message:
        """What the application receives by."""
        while self._script:
            step = self._script[0]
            if callable(step):  # others who receive at the same time wait for it as well
                await step()
            if self._script and self._script[0] is step:
                del self._script[0]
            if not callable(step):
                return step
        await self._left.wait()
        return DISCONNECT

    async def send(self, message: Message) -> None:
        """What the application sends by."""
        if self._on_send is not None:
            await self._on_send(message)
        self.sent.append({**message, "headers": list(message.get("headers", ()))})
        if message["type"] == START:
            self.started.set()
        elif message["type"] == BODY and not message.get("more_body", False):
            self.complete.set()

    @property
    def types(self) -> list[str]:
        """What kinds of messages were sent, without what all of them have in common."""
        return [message["type"].removeprefix("http.response.") for message in self.sent]

    @property
    def status(self) -> int:
        """The status of the one response; fails unless there was exactly one, and a whole one."""
        (start,) = (message for message in self.sent if message["type"] == START)
        (end,) = (
            message for message in self.sent if message["type"] == BODY and not message.get("more_body")
        )
        bodies = [message for message in self.sent if message["type"] == BODY]
        assert self.sent[-len(bodies) - 1 :] == [start, *bodies]
        assert bodies[-1] is end
        status: int = start["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of the response."""
        return next(message["headers"] for message in self.sent if message["type"] == START)

    @property
    def body(self) -> bytes:
        """The body of the response, as far as it was sent."""
        return b"".join(message.get("body", b"") for message in self.sent if message["type"] == BODY)


class Reports(list[TimeoutReport]):
    """A hook that keeps its reports, and lets the loop that made it wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = running_loop()
        self._came = anyio.Event()

    def __call__(self, report: TimeoutReport) -> None:
        self._loop.call_threadsafe(lambda: self._take(report))

    def _take(self, report: TimeoutReport) -> None:
        self.append(report)
        self._came.set()

    async def first(self) -> TimeoutReport:
        """The one that comes first."""
        with anyio.fail_after(10):
            await self._came.wait()
        return self[0]


class Looks:
    """Waits until a responder has looked at its clocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._looked = anyio.Event()
        look = Responder.look

        def look_and_tell(responder: Responder) -> None:
            look(responder)
            self._looked.set()

        monkeypatch.setattr(Responder, "look", look_and_tell)

    async def next(self) -> None:
        """Wait for the next look."""
        self._looked = anyio.Event()
        await self._looked.wait()
