"""When the middleware watches what requests build, whose requests, and what becomes of a report."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import asyncguard
from asyncguard import BlockingMiddleware, ClientReport, TimeoutMiddleware
from asyncguard._asgi import is_asgi_app
from asyncguard._request import SCOPE_KEY, RequestRecord, current_request
from asyncguard.clients import _constructors, _middleware
from asyncguard.clients._middleware import WatchClients
from asyncguard.clients._rebuilt import AGAIN
from tests.asgi_driver import Client, answer_ok, http_scope
from tests.clients.unwatched import unwatch

LOGGER = "asyncguard.clients"
ORIGINAL = vars(httpx2.AsyncClient)["__init__"]
VERIFY: Any = False
LAYERS: dict[str, Callable[..., ASGIApp]] = {
    "alone": lambda app: app,
    "with blocking detection": lambda app: BlockingMiddleware(app, log=False),
    "with timeouts": lambda app: TimeoutMiddleware(app, log=False),
    "with both": lambda app: BlockingMiddleware(TimeoutMiddleware(app, log=False), log=False),
}


@pytest.fixture(autouse=True)
def _watched_by_nobody() -> Iterator[None]:
    unwatch()
    yield
    collect()


def collect() -> None:
    """What waits for the collector may still watch."""
    if is_watched():
        gc.collect()
    assert not is_watched()


def is_watched() -> bool:
    return vars(httpx2.AsyncClient)["__init__"] is not ORIGINAL


async def building(scope: Scope, receive: Receive, send: Send) -> None:
    async with httpx2.AsyncClient(verify=VERIFY):
        await answer_ok(scope, receive, send)


async def requests(app: ASGIApp, times: int = AGAIN + 2, **scope: Any) -> None:
    for _ in range(times):
        await Client(scope=http_scope(**scope)).drive(app)


async def lifespan(app: ASGIApp, meanwhile: Callable[[], Awaitable[object]]) -> None:
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Message:
        message: Message = next(messages)
        if message["type"] == "lifespan.shutdown":
            await meanwhile()
        return message

    async def send(message: Message) -> None: ...

    await app({"type": "lifespan", "state": {}}, receive, send)


def flush() -> None:
    assert _middleware._reporter.flush().wait(30)


@pytest.mark.anyio
@pytest.mark.parametrize("around", LAYERS.values(), ids=LAYERS)
async def test_a_line_is_reported_once(
    around: Callable[..., ASGIApp], caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[ClientReport] = []
    app = around(WatchClients(building, on_client=reports.append))
    await requests(app, 10)
    flush()
    (report,) = reports
    assert (report.request, report.client, report.times) == ("GET /", "httpx2.AsyncClient", AGAIN)
    (logged,) = (record for record in caplog.records if record.name == LOGGER)
    assert logged.levelno == logging.WARNING
    assert logged.getMessage() == str(report)
    assert logged.asyncguard_report is report  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_it_may_be_said_to_the_hook_only(caplog: pytest.LogCaptureFixture) -> None:
    threads: list[str] = []
    app = WatchClients(
        building, on_client=lambda report: threads.append(threading.current_thread().name), log=False
    )
    await requests(app)
    flush()
    assert threads == ["asyncguard-clients"]
    assert caplog.records == []


@pytest.mark.anyio
async def test_a_hook_that_fails_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    def fail(report: ClientReport) -> None:
        raise LookupError("the hook's own")

    await requests(WatchClients(building, on_client=fail, log=False))
    flush()
    assert [record.getMessage().startswith("the on_client hook") for record in caplog.records] == [True]
    caplog.clear()  # its traceback leads to the application


@pytest.mark.anyio
async def test_without_a_thread_it_is_logged_that_there_is_none(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: object) -> bool:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_middleware._reporter, "put", refuse)
    await requests(WatchClients(building))
    assert caplog.messages == ["no thread to be had for the report of GET /"]
    caplog.clear()


@pytest.mark.anyio
async def test_a_websocket_that_builds_for_each_message() -> None:
    reports: list[ClientReport] = []

    async def socket(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(AGAIN + 1):
            async with httpx2.AsyncClient(verify=VERIFY):
                pass

    app = WatchClients(socket, on_client=reports.append, log=False)
    await app({"type": "websocket", "path": "/feed"}, Client().receive, Client().send)
    flush()
    assert [report.request for report in reports] == ["WS /feed"]


@pytest.mark.anyio
async def test_the_outer_one_of_two_reports() -> None:
    inner: list[ClientReport] = []
    outer: list[ClientReport] = []
    app = WatchClients(
        WatchClients(building, on_client=inner.append, log=False), on_client=outer.append, log=False
    )
    await requests(app)
    flush()
    assert (len(inner), len(outer)) == (0, 1)


@pytest.mark.anyio
async def test_of_two_applications_each_has_its_own() -> None:
    reports: list[list[ClientReport]] = [[], []]
    apps = [WatchClients(building, on_client=each.append, log=False) for each in reports]
    for app in apps:
        await requests(app)
    flush()
    assert [len(each) for each in reports] == [1, 1]


@pytest.mark.anyio
async def test_nothing_is_left_in_the_scope_or_the_context() -> None:
    seen: list[RequestRecord | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope[SCOPE_KEY])
        await building(scope, receive, send)
        raise LookupError("the handler's own")

    client = Client()
    with pytest.raises(LookupError, match="the handler's own"):
        await client.drive(WatchClients(app))
    assert SCOPE_KEY not in client.scope
    assert current_request.get() is None
    (record,) = seen
    assert record is not None
    assert record.builds is None
    assert record.at_end is None


def test_a_server_may_close_it_in_another_context_than_it_began_it_in() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    class Suspended:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def receive() -> Message:
        await Suspended()
        raise AssertionError

    scope = http_scope()
    running = WatchClients(app)(scope, receive, Client().send)
    copy_context().run(running.send, None)
    assert SCOPE_KEY in scope
    running.close()
    assert SCOPE_KEY not in scope
    assert current_request.get() is None


# -- from when to when ---------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_with_a_lifespan_it_watches_from_start_to_end() -> None:
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await building(scope, receive, send)
            return
        seen.append(is_watched())
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    reports: list[ClientReport] = []
    watch = WatchClients(app, on_client=reports.append, log=False)
    assert not is_watched()
    for _ in range(2):
        await lifespan(watch, lambda: requests(watch))
        assert not is_watched()
    assert seen == [True, True]
    # They were told of before the server heard of the end.
    assert len(reports) == 1


@pytest.mark.anyio
async def test_an_application_that_is_served_twice_is_watched_until_both_have_ended() -> None:
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()

    watch = WatchClients(app)

    async def serve_again() -> None:
        await lifespan(watch, anyio.lowlevel.checkpoint)
        seen.append(is_watched())

    await lifespan(watch, serve_again)
    assert seen == [True]
    assert not is_watched()


@pytest.mark.anyio
async def test_without_one_it_watches_from_the_first_request_until_it_is_gone() -> None:
    app = WatchClients(building, log=False)
    assert not is_watched()
    await requests(app, 1)
    assert is_watched()
    del app
    collect()


@pytest.mark.anyio
async def test_a_lifespan_that_fails_leaves_nothing_behind() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("no database")

    with pytest.raises(LookupError, match="no database"):
        await lifespan(WatchClients(app), anyio.lowlevel.checkpoint)
    assert not is_watched()


@pytest.mark.anyio
async def test_what_is_no_request_goes_through() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await WatchClients(app)({"type": "something.else"}, Client().receive, Client().send)
    assert seen == ["something.else"]
    assert not is_watched()


@pytest.mark.anyio
async def test_a_library_that_a_request_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[ClientReport] = []
    monkeypatch.delitem(sys.modules, "httpx2")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        sys.modules["httpx2"] = httpx2  # as an import in a function does it
        await building(scope, receive, send)

    watch = WatchClients(app, on_client=reports.append, log=False)
    await requests(watch, 1)
    assert not is_watched()
    await requests(watch)
    assert is_watched()
    flush()
    assert len(reports) == 1


# -- installed -----------------------------------------------------------------------------------------


async def endpoint(request: Request) -> PlainTextResponse:
    async with httpx2.AsyncClient(verify=VERIFY):
        return PlainTextResponse("")


def test_it_is_installed_by_default_and_tests_that_build_clients_are_left_alone() -> None:
    reports: list[ClientReport] = []
    app = Starlette(routes=[Mount("/v1", routes=[Route("/offers/{id}", endpoint)])])
    asyncguard.install(app, on_client=reports.append, log=False)
    for _ in range(2):
        with TestClient(app) as client:
            for _ in range(10):
                assert client.get("/v1/offers/7").status_code == 200
                TestClient(app).close()
                httpx2.Client(verify=VERIFY).close()
    assert [report.request for report in reports] == ["GET /v1/offers/{id}"]
    assert reports[0].line is not None
    assert reports[0].line.function == "endpoint"


def test_what_middlewares_build_is_seen_too() -> None:
    reports: list[ClientReport] = []

    class Authentication:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                async with httpx2.AsyncClient(verify=VERIFY):
                    pass
            await self.app(scope, receive, send)

    app = Starlette()
    asyncguard.install(app, on_client=reports.append, log=False)
    app.add_middleware(Authentication)
    with TestClient(app) as client:
        for _ in range(AGAIN + 1):
            assert client.get("/nothing").status_code == 404
    assert [report.request for report in reports] == ["GET /nothing"]


@pytest.mark.parametrize("block_threshold", [None, 0.1])
def test_off_is_off(block_threshold: float | None) -> None:
    seen: list[bool] = []

    async def look(request: Request) -> PlainTextResponse:
        seen.append(is_watched())
        return await endpoint(request)

    app = Starlette(routes=[Route("/", look)])
    asyncguard.install(app, watch_clients=False, block_threshold=block_threshold)
    with TestClient(app) as client:
        client.get("/")
    assert seen == [False]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("on_client", "print", TypeError),
        ("on_client", anyio.sleep, TypeError),
        ("project_root", "/no/such/directory", ValueError),
        ("log", 1, TypeError),
        ("watch_clients", 1, TypeError),
        ("watch_clients", None, TypeError),
    ],
)
def test_bad_options(option: str, value: object, error: type[Exception], alone: bool) -> None:
    options: dict[str, Any] = {option: value}
    if alone and option == "watch_clients":
        return
    make: Any = partial(WatchClients, answer_ok) if alone else partial(asyncguard.install, Starlette())
    with pytest.raises(error, match=rf"^{option} must be "):
        make(**options)


def test_it_is_an_asgi_application_and_takes_one() -> None:
    assert is_asgi_app(WatchClients(answer_ok))
    with pytest.raises(TypeError, match="WatchClients takes an ASGI application, not 'app'"):
        WatchClients("app")  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_the_project_root_arrives(tmp_path: Any) -> None:
    reports: list[ClientReport] = []
    app = WatchClients(building, on_client=reports.append, project_root=tmp_path, log=False)
    await requests(app)
    flush()
    (report,) = reports
    assert not report.exact
    assert report.line is None
    assert report.stack


def test_a_forked_child_has_a_reporter_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _middleware._reporter
    monkeypatch.setattr(_middleware, "_reporter", before)  # so that it is put back
    _middleware._forget_reporter()
    assert _middleware._reporter is not before
    lock = _constructors._lock
    monkeypatch.setattr(_constructors, "_lock", lock)
    _constructors._renew_lock()
    assert _constructors._lock is not lock
