"""The record of a request: its label, wherever it stands, and nothing left behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import asyncguard
from asyncguard._request import RequestRecord, current_request, full_template, remaining
from asyncguard.clients._middleware import WatchClients
from tests.asgi_driver import Client

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

_seen: list[str] = []
"""The labels that endpoints saw of their own requests."""


def note() -> None:
    record = current_request.get()
    assert record is not None
    _seen.append(record.label)


def call(app: ASGIApp, path: str, *, kind: str = "http", **extra: Any) -> tuple[RequestRecord, int]:
    """Send one request through a guarded `app`; its record and the status of the answer."""
    scope: Scope = {
        "type": kind,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"token=secret",
        "headers": [],
        "server": ("localhost", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        **({"method": "GET"} if kind == "http" else {"subprotocols": []}),
        **extra,
    }
    inbox: list[Message] = [
        {"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request"}
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        if inbox:
            return inbox.pop()
        return {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Message) -> None:
        sent.append(message)

    records: list[RequestRecord] = []

    async def spy(scope: Scope, receive: Receive, send: Send) -> None:
        records.append(scope["asyncguard.request"])
        await app(scope, receive, send)

    async def main() -> None:
        await asyncguard.guard(spy, log=False)(scope, receive, send)

    _seen.clear()
    asyncio.run(main())
    assert "asyncguard.request" not in scope
    return records[0], sent[0].get("status", 0)


async def endpoint(request: Request) -> Response:
    note()
    return PlainTextResponse("")


def fastapi_app(**options: Any) -> FastAPI:
    app = FastAPI(**options)
    router, inner = APIRouter(prefix="/items/{item}"), APIRouter(prefix="/parts")

    @app.get("/")
    @app.get("/plain")
    @app.get("/users/{user}")
    @app.get("/files/{p:path}")
    @app.get("/numbers/{n:int}/{x:float}")
    @app.get("/keys/{key:uuid}")
    async def get() -> None:
        note()

    @inner.get("/{part}")
    @inner.get("/{part}/raw/{p:path}")
    async def get_part() -> None:
        note()

    @app.websocket("/live/{room}")
    async def live(websocket: WebSocket) -> None:
        note()
        await websocket.accept()

    router.include_router(inner)
    app.include_router(router, prefix="/v1/{tenant}")
    return app


KEY = str(uuid.uuid4())


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/", "GET /"),
        ("/plain", "GET /plain"),
        ("/users/7", "GET /users/{user}"),
        ("/users/users", "GET /users/{user}"),
        ("/files/a/b/c.txt", "GET /files/{p:path}"),
        ("/numbers/3/4.5", "GET /numbers/{n:int}/{x:float}"),
        (f"/keys/{KEY}", "GET /keys/{key:uuid}"),
        ("/v1/acme/items/7/parts/9", "GET /v1/{tenant}/items/{item}/parts/{part}"),
        ("/v1/acme/items/7/parts/9/raw/x/y", "GET /v1/{tenant}/items/{item}/parts/{part}/raw/{p:path}"),
        # The same value twice, outside and inside.
        ("/v1/7/items/8/parts/7", "GET /v1/{tenant}/items/{item}/parts/{part}"),
    ],
)
def test_fastapi_routes(path: str, label: str) -> None:
    record, status = call(fastapi_app(), path)
    assert (record.label, status) == (label, 200)
    assert _seen == [label]


def test_websockets() -> None:
    record, _ = call(fastapi_app(), "/live/lobby", kind="websocket")
    assert record.label == "WS /live/{room}"
    assert _seen == ["WS /live/{room}"]


def starlette_app() -> Starlette:
    routes = [
        Route("/users/{user}", endpoint),
        Route("/files/{p:path}", endpoint),
        Route("/numbers/{n:int}", endpoint),
    ]
    return Starlette(
        routes=[
            *routes,
            Mount("/v1", routes=routes),
            Mount("/t/{tenant}", routes=[Mount("/deep", routes=routes)]),
            Mount("/api", app=fastapi_app()),
            Mount("/static", app=endpoint_app),
            Host("{sub}.example.org", app=Router(routes)),
        ]
    )


async def endpoint_app(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("")(scope, receive, send)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/users/7", "GET /users/{user}"),
        ("/v1/users/7", "GET /v1/users/{user}"),
        ("/v1/files/a/b", "GET /v1/files/{p:path}"),
        ("/t/acme/deep/users/7", "GET /t/{tenant}/deep/users/{user}"),
        ("/t/acme/deep/files/x/y", "GET /t/{tenant}/deep/files/{p:path}"),
        ("/api/users/7", "GET /api/users/{user}"),
        ("/api/v1/acme/items/7/parts/9", "GET /api/v1/{tenant}/items/{item}/parts/{part}"),
        # A mounted application without routes of its own: the file's name is no part of the label.
        ("/static/app/main.css", "GET /static"),
    ],
)
def test_mounts(path: str, label: str) -> None:
    record, status = call(starlette_app(), path)
    assert (record.label, status) == (label, 200)


@pytest.mark.parametrize(
    ("path", "label"),
    # Starlette hands on the converted value: what was written in the path is not known any more.
    [("/numbers/007", "GET /numbers/{n:int}"), ("/v1/numbers/007", "GET /numbers/{n:int}")],
)
def test_a_value_that_was_converted_leaves_the_route_its_name(path: str, label: str) -> None:
    record, status = call(starlette_app(), path)
    assert (record.label, status) == (label, 200)


@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
def test_without_a_route_the_path_stands(make: Any) -> None:
    record, status = call(make(), "/no/such/page")
    assert (record.label, status) == ("GET /no/such/page", 404)


def test_a_method_that_is_not_allowed_keeps_its_route() -> None:
    record, status = call(fastapi_app(), "/users/7", method="DELETE")
    assert (record.label, status) == ("DELETE /users/{user}", 405)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/users/7", "GET /users/{user}"),
        ("/v1/acme/items/7/parts/9", "GET /v1/{tenant}/items/{item}/parts/{part}"),
        ("/nothing", "GET /nothing"),
    ],
)
def test_the_servers_root_path_is_left_out(path: str, label: str) -> None:
    record, _ = call(fastapi_app(), "/proxied" + path, root_path="/proxied")
    assert record.label == label


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_a_root_path_of_the_application_need_not_be_in_the_path() -> None:
    for path in ("/users/7", "/proxied/users/7"):
        record, status = call(fastapi_app(root_path="/proxied"), path)
        assert (record.label, status) == ("GET /users/{user}", 200)


def test_a_root_path_and_mounts() -> None:
    record, status = call(starlette_app(), "/proxied/v1/users/7", root_path="/proxied")
    assert (record.label, status) == ("GET /v1/users/{user}", 200)


def test_a_path_that_only_begins_like_the_root_path() -> None:
    record = RequestRecord({"type": "http", "method": "GET", "path": "/apiary", "root_path": "/api"}, 0)
    assert record.label == "GET /apiary"


def test_before_routing() -> None:
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/users/7", "query_string": b"secret"}
    record = RequestRecord(scope, 0)
    assert record.label == "POST /users/7"
    assert record.endpoint is None
    scope["endpoint"] = endpoint
    assert record.endpoint is endpoint


def test_a_finished_record_keeps_its_name() -> None:
    record, _ = call(starlette_app(), "/v1/users/7")
    assert record.label == "GET /v1/users/{user}"
    assert record.endpoint is endpoint
    assert record.coroutine is None
    record.finish()
    assert record.label == "GET /v1/users/{user}"


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/a\r\nGET /forged", "GET /a\\r\\nGET /forged"),
        ("/\x1b[2J", "GET /\\x1b[2J"),
        ("/" + "x" * 1000, "GET /" + "x" * 195),
        ("/größe/日本", "GET /größe/日本"),
    ],
    ids=["line feed", "escape", "long", "letters"],
)
def test_what_a_client_chose_is_harmless(path: str, label: str) -> None:
    record, status = call(fastapi_app(), path)
    assert (record.label, status) == (label, 404)


@pytest.mark.parametrize(
    "scope",
    [
        {},
        {"type": "http", "path": None, "method": None, "root_path": None, "path_params": None, "route": None},
        {"type": "http", "path": "", "route": object()},
    ],
)
def test_a_scope_that_lacks_everything(scope: dict[str, Any]) -> None:
    """An application may have done anything to it by the time of the report."""
    assert RequestRecord(scope, 0).label == " "


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"http_version": "1.0"}, True),
        ({"http_version": "2"}, False),  # many at once on one connection
        ({"http_version": None}, False),
        ({"client": None}, False),
        ({"client": ("192.0.2.1", 0)}, False),  # as behind a proxy
    ],
)
def test_the_connection_of_a_request(changes: dict[str, Any], known: bool) -> None:
    client = ("192.0.2.1", 5001)
    scope = {"type": "http", "path": "/", "client": client, "http_version": "1.1"} | changes
    record = RequestRecord(scope, 0)
    assert record.connection == (client if known else None)
    record.finish()
    assert record.connection == (client if known else None)


def test_of_a_finished_request_only_what_names_it_is_kept() -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/proxied/v1/users/7",
        "root_path": "/proxied/v1",
        "app_root_path": "/proxied",
        "route": Route("/users/{user}", endpoint),
        "path_params": {"user": "7"},
        "headers": [(b"authorization", b"secret")],
        "state": {},
    }
    record = RequestRecord(scope, 0)
    label = record.label
    assert label == "GET /v1/users/{user}"
    record.finish()
    assert record.label == label
    kept = {name for name, value in record._naming.items() if value is not None}
    assert kept == set(scope) - {"headers", "state"}
    record.finish()
    assert record.label == label


def test_most_of_a_record_is_kept_in_its_class() -> None:
    """One is made for every request."""
    record = RequestRecord({}, 3.0)
    assert set(vars(record)) == {"_scope", "started", "turn_since", "receive"}
    assert (record.loop_time, record.busy_at, record.coroutine) == (0.0, None, None)
    assert (record.released, record.finished_at) == (-math.inf, math.inf)
    assert (record.arrived, record.deadline, record.limited) == (None, None, False)


def test_a_copied_scope_is_of_the_same_request() -> None:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/"}
    record = scope["asyncguard.request"] = RequestRecord(scope, 0)
    assert copy.deepcopy(scope)["asyncguard.request"] is record


def test_when_a_request_ended(clock: TurnedClock) -> None:
    record = RequestRecord({"type": "http", "method": "GET", "path": "/"}, clock.now)
    assert record.finished_at == math.inf
    clock.turn(3)
    record.finish()
    assert record.finished_at == 1003


class Unprintable:
    """A value of a convertor of the user's."""

    def __str__(self) -> str:
        raise AssertionError("the user's code was run")


def test_no_code_of_a_convertor_runs_for_a_label() -> None:
    params = {"thing": Unprintable(), "item": "7"}
    assert full_template("/a/7", "/{item}", params) == "/a/{item}"


class Scope_(dict[str, Any]):  # noqa: N801
    """A scope that can be watched."""


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_finishing_breaks_the_cycle() -> None:
    with no_collection():
        scope = Scope_(type="http", method="GET", path="/")
        record = scope["asyncguard.request"] = RequestRecord(scope, 0)
        gone = weakref.ref(scope)
        del scope
        assert gone() is not None
        record.finish()
        assert gone() is None
        assert record.label == "GET /"


def test_a_value_that_equals_a_fixed_part_of_the_path() -> None:
    record, status = call(fastapi_app(), "/v1/v1/items/7/parts/9")
    assert status == 200
    assert record.label == "GET /v1/{tenant}/items/{item}/parts/{part}"


segment = st.text("abc", min_size=1, max_size=3)


@given(st.lists(segment, max_size=2), segment, st.lists(segment, max_size=2), st.lists(segment, max_size=3))
def test_full_template_leaves_no_outer_value(
    before: list[str], tenant: str, after: list[str], inner: list[str]
) -> None:
    """Whatever the values are, the template is the inner one below a prefix that names its parameter."""
    params = {"tenant": tenant} | {f"p{n}": value for n, value in enumerate(inner)}
    template = "".join(f"/x/{{p{n}}}" for n in range(len(inner))) + "/end"
    filled = "".join(f"/x/{value}" for value in inner) + "/end"
    prefix = "".join(f"/{part}" for part in (*before, tenant, *after))
    full = full_template(prefix + filled, template, params)
    assert full.endswith(template)
    outer = full.removesuffix(template)
    assert outer.count("/") == prefix.count("/")
    assert "{tenant}" in outer


@pytest.mark.parametrize(
    ("path", "template", "params", "expected"),
    [
        ("/a", "/a", {}, "/a"),
        ("/v1/a", "/a", {}, "/v1/a"),
        ("/elsewhere", "/a", {}, "/a"),
        ("/x/1", "/{a}", {"a": "1", "unused": "x"}, "/{unused}/{a}"),
        ("/m/1.5", "/{x:money}", {"x": 1.5}, "/{x:money}"),
    ],
)
def test_full_template(path: str, template: str, params: dict[str, Any], expected: str) -> None:
    assert full_template(path, template, params) == expected


# -- what is left ------------------------------------------------------------------------------------


class FakeDeadline:
    header = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def left(self) -> float:
        return self.seconds

    def retune(self, seconds: float | None) -> None:
        raise AssertionError("asking changes nothing")


@pytest.mark.parametrize("seconds", [12.5, 0.0, math.inf])
def test_what_is_left_of_a_request(seconds: float) -> None:
    record = RequestRecord({"type": "http"}, 0)
    record.deadline = FakeDeadline(seconds)
    token = current_request.set(record)
    try:
        assert remaining() == seconds
    finally:
        current_request.reset(token)
    assert remaining() == math.inf


def test_without_a_limit_there_is_any_time_left() -> None:
    token = current_request.set(RequestRecord({"type": "http"}, 0))
    try:
        assert remaining() == math.inf
    finally:
        current_request.reset(token)


def test_after_the_request_nothing_counts_any_more() -> None:
    """In a task that it left behind, for one."""
    record = RequestRecord({"type": "http"}, 0)
    record.deadline = FakeDeadline(12.5)
    token = current_request.set(record)
    try:
        record.finish()
        assert remaining() == math.inf
    finally:
        current_request.reset(token)


@pytest.mark.anyio
async def test_what_is_left_is_known_in_tasks_and_threads() -> None:
    record = RequestRecord({"type": "http"}, 0)
    record.deadline = FakeDeadline(12.5)
    current_request.set(record)
    seen: list[float] = []

    async def task() -> None:
        seen.append(remaining())

    async with anyio.create_task_group() as group:
        group.start_soon(task)
    assert [*seen, await anyio.to_thread.run_sync(remaining)] == [12.5, 12.5]


def test_what_is_to_be_called_at_its_end_is_called_once() -> None:
    calls: list[str] = []
    records: list[RequestRecord] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        record = current_request.get()
        assert record is not None
        records.append(record)
        record.at_end = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
        await PlainTextResponse("ok")(scope, receive, send)
        assert calls == []

    middlewares = (asyncguard.BlockingMiddleware, asyncguard.TimeoutMiddleware, WatchClients)
    for middleware in middlewares:
        calls.clear()
        asyncio.run(Client().drive(middleware(app, log=False)))
        assert calls == ["a", "b"]
        assert records[-1].at_end is None
