"""`install` and `guard`: options refused by the caller's names, and the guard outside everything."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import asyncguard
from asyncguard import (
    BlockingMiddleware,
    BlockReport,
    LoopMonitor,
    TimeoutMiddleware,
    TimeoutReport,
    remaining,
)
from tests.asgi_driver import Client, http_scope


async def application(scope: Scope, receive: Receive, send: Send) -> None: ...


async def coroutine_function(report: BlockReport) -> None: ...


BAD_OPTIONS = [
    ("block_threshold", "0.1", TypeError, "a number of seconds"),
    ("block_threshold", True, TypeError, "a number of seconds"),
    ("block_threshold", 0, ValueError, "at least 0.001"),
    ("block_threshold", -1, ValueError, "at least 0.001"),
    ("block_threshold", 0.00099, ValueError, "at least 0.001"),
    ("block_threshold", math.inf, ValueError, "finite"),
    ("block_threshold", math.nan, ValueError, "finite"),
    ("busy_threshold", "1", TypeError, "a number of seconds"),
    ("busy_threshold", 0, ValueError, "greater than 0"),
    ("hang_after", True, TypeError, "a number of seconds"),
    ("hang_after", -1.0, ValueError, "greater than 0"),
    ("on_hang", "restart", ValueError, "'log' or 'abort'"),
    ("on_hang", coroutine_function, TypeError, "a plain function"),
    ("on_hang", None, ValueError, "'log' or 'abort'"),
    ("on_busy", 7, TypeError, "a function that takes one event, or None"),
    ("on_busy", coroutine_function, TypeError, "a plain function"),
    ("on_block", "print", TypeError, "a function that takes one event, or None"),
    ("on_block", coroutine_function, TypeError, "a plain function"),
    ("project_root", 1, TypeError, "the path of a directory, or None"),
    ("project_root", "/no/such/directory", ValueError, "an existing directory"),
    ("log", 1, TypeError, "True or False"),
    ("log", None, TypeError, "True or False"),
]


@pytest.mark.parametrize(("option", "value", "error", "allowed"), BAD_OPTIONS)
def test_bad_options(option: str, value: Any, error: type[Exception], allowed: str) -> None:
    def refuses(call: Any, name: str) -> None:
        with pytest.raises(error) as caught:
            call(**{name: value})
        assert str(caught.value).startswith(f"{name} must be ")
        assert allowed in str(caught.value)
        assert repr(value) in str(caught.value)

    app = FastAPI()
    refuses(lambda **options: asyncguard.install(app, **options), option)
    refuses(lambda **options: asyncguard.guard(application, **options), option)
    plain = option.removeprefix("block_")
    refuses(lambda **options: BlockingMiddleware(application, **options), plain)
    refuses(LoopMonitor, plain)
    # The refusal has left no trace: the application can still be guarded.
    asyncguard.install(app)


@pytest.mark.parametrize("value", [0.001, 1])
def test_thresholds_that_will_do(value: float) -> None:
    guarded = asyncguard.guard(application, block_threshold=value)
    assert isinstance(guarded, BlockingMiddleware)
    assert guarded.monitor.threshold == value


@pytest.mark.parametrize(
    "app", [None, application, "main:app", FastAPI, BlockingMiddleware(application)], ids=repr
)
def test_install_takes_starlette_only(app: Any) -> None:
    with pytest.raises(TypeError) as caught:
        asyncguard.install(app)
    assert repr(app) in str(caught.value)
    assert "asyncguard.guard(app)" in str(caught.value)


@pytest.mark.parametrize("app", [None, "main:app", FastAPI, print], ids=repr)
def test_guard_takes_asgi_only(app: Any) -> None:
    with pytest.raises(TypeError) as caught:
        asyncguard.guard(app)
    assert str(caught.value).startswith(f"guard() takes an ASGI application, not {app!r}")


@pytest.mark.parametrize("app", [None, "main:app"])
def test_the_middleware_takes_what_can_be_called(app: Any) -> None:
    """As any middleware, it may get another one that is no coroutine function itself."""
    with pytest.raises(TypeError) as caught:
        BlockingMiddleware(app)
    assert str(caught.value) == f"BlockingMiddleware takes an ASGI application, not {app!r}"


def test_guard_takes_a_factorys_result() -> None:
    def make() -> ASGIApp:
        return application

    with pytest.raises(TypeError, match="call the factory"):
        asyncguard.guard(make)  # type: ignore[arg-type]


def test_twice() -> None:
    app = FastAPI()
    asyncguard.install(app)
    with pytest.raises(RuntimeError, match=r"called twice.*one call"):
        asyncguard.install(app)


@pytest.mark.parametrize("make", [FastAPI, Starlette])
def test_too_late(make: Any) -> None:
    app = make()
    request(app, "/")
    with pytest.raises(RuntimeError, match="too late"):
        asyncguard.install(app)


def test_none_is_off() -> None:
    app = FastAPI()
    before = app.build_middleware_stack
    asyncguard.install(app, block_threshold=None, watch_clients=False)
    assert app.build_middleware_stack == before
    assert asyncguard.guard(application, block_threshold=None) is application
    asyncguard.install(app)
    with pytest.raises(RuntimeError):
        asyncguard.install(app)


class Blocking:
    """A middleware that blocks: only a guard outside it can say whose request that was."""

    def __init__(self, app: ASGIApp, log: list[str], name: str) -> None:
        self.app = app
        self.log = log
        self.name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.log.append(f"{self.name}: {'asyncguard.request' in scope}")
        await self.app(scope, receive, send)


def request(app: ASGIApp, path: str) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": [],
        "query_string": b"",
        "server": ("localhost", 80),
        "scheme": "http",
    }

    async def main() -> None:
        await app(scope, receive, send)

    asyncio.run(main())
    return sent


@pytest.mark.parametrize("make", [FastAPI, Starlette])
def test_whatever_the_order_the_guard_is_outermost(make: Any) -> None:
    log: list[str] = []
    app = make(middleware=[Middleware(Blocking, log, "given")])
    app.add_middleware(Blocking, log, "before")
    asyncguard.install(app, log=False)
    app.add_middleware(Blocking, log, "after")
    assert request(app, "/nothing")[0]["status"] == 404
    assert log == ["after: True", "before: True", "given: True"]


def test_exception_handlers_and_the_server_error_middleware_are_inside() -> None:
    """An unhandled error is still answered by the application itself, and comes through the guard."""

    async def fail(request: object) -> None:
        raise LookupError("mine")

    app = Starlette(routes=[Route("/", fail)])
    asyncguard.install(app, log=False)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    with pytest.raises(LookupError, match="mine"):
        asyncio.run(_call(app, scope, receive, send))
    assert sent[0]["status"] == 500


async def _call(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def test_every_option_arrives(tmp_path: Path) -> None:
    """One real stall in an installed application, in code that is not below `project_root`."""
    reports: list[BlockReport] = []

    async def block(request: object) -> PlainTextResponse:
        time.sleep(0.12)
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/block/{times}", block)])
    asyncguard.install(app, block_threshold=0.05, on_block=reports.append, project_root=tmp_path, log=False)

    async def serve() -> None:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Message:
            message: Message = next(messages)
            if message["type"] == "lifespan.shutdown":
                scope = {
                    "type": "http",
                    "method": "GET",
                    "path": "/block/1",
                    "headers": [],
                    "query_string": b"",
                }
                await _call(app, scope, receive, send)
            return message

        async def send(message: Message) -> None: ...

        await app({"type": "lifespan", "state": {}}, receive, send)

    asyncio.run(serve())
    (report,) = reports
    assert report.request == "GET /block/{times}"
    assert not report.exact
    assert report.line is not None
    assert report.line.function.endswith("block")


@pytest.mark.parametrize("put", [asyncguard.guard, asyncguard.install], ids=["guard", "install"])
def test_the_other_options_arrive(put: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LoopMonitor] = []
    remember = LoopMonitor.__init__

    def made_with(monitor: LoopMonitor, **options: Any) -> None:
        remember(monitor, **options)
        made.append(monitor)

    monkeypatch.setattr(LoopMonitor, "__init__", made_with)
    put(Starlette(), busy_threshold=0.5, hang_after=7, on_hang="abort")
    put(Starlette(), busy_threshold=None, hang_after=None, on_hang=print)
    put(Starlette())
    listeners = [monitor._listener for monitor in made]
    assert [(each.busy_threshold, each.hang_after, each.aborts) for each in listeners] == [
        (0.5, 7.0, True),
        (math.inf, math.inf, False),
        (1.0, 10.0, False),
    ]


def test_public_names() -> None:
    for name in asyncguard.__all__:
        assert getattr(asyncguard, name).__doc__
    assert sorted(asyncguard.__all__) == asyncguard.__all__


@pytest.mark.parametrize("put", [asyncguard.guard, asyncguard.install], ids=["guard", "install"])
def test_options_are_checked_even_where_the_guard_is_off(put: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=r"^on_block must be a function .* not 'print'$"):
        put(Starlette(), block_threshold=None, on_block="print")


# -- request timeouts --------------------------------------------------------------------------------


async def hook_that_waits(report: TimeoutReport) -> None: ...


BAD_TIMEOUT_OPTIONS = [
    *(
        (option, value, error)
        for option in ("timeout", "idle_timeout", "body_timeout", "timeout_grace")
        for value, error in ((-1, ValueError), (0, ValueError), (math.nan, ValueError), ("5", TypeError))
    ),
    ("timeout", True, TypeError),
    ("timeout_grace", None, TypeError),
    ("timeout_status_code", 200, ValueError),
    ("timeout_status_code", 999, ValueError),
    ("timeout_status_code", "504", TypeError),
    ("timeout_status_code", True, TypeError),
    ("timeout_answer", 5, TypeError),
    ("deadline_header", 5, TypeError),
    ("deadline_header", "a b", ValueError),
    ("deadline_header", "", ValueError),
    ("cancel_on_disconnect", 1, TypeError),
    ("on_timeout", hook_that_waits, TypeError),
    ("project_root", "/no/such/directory", ValueError),
]


@pytest.mark.parametrize("timeout", [30, None], ids=["on", "off"])
@pytest.mark.parametrize(("option", "value", "error"), BAD_TIMEOUT_OPTIONS)
def test_bad_options_of_timeouts_are_refused_by_the_names_that_install_has_for_them(
    option: str, value: Any, error: type[Exception], timeout: float | None
) -> None:
    """Even where they are switched off."""
    app = FastAPI()
    options = {"timeout": timeout, option: value}
    with pytest.raises(error) as caught:
        asyncguard.install(app, **options)
    assert str(caught.value).startswith(f"{option} must be ")
    assert repr(value) in str(caught.value)
    asyncguard.install(app)


def test_timeouts_are_off_by_default_and_the_rest_of_them_is_as_in_the_middleware() -> None:
    options = inspect.signature(asyncguard.install).parameters
    alone = inspect.signature(TimeoutMiddleware).parameters
    assert {each.kind for name, each in options.items() if name != "app"} == {inspect.Parameter.KEYWORD_ONLY}
    assert options["timeout"].default is None
    for name, option in alone.items():
        if name not in ("app", "timeout"):
            prefixed = f"timeout_{name}" if name in ("grace", "status_code", "answer") else name
            assert options[prefixed].default == option.default, name


class Signs:
    """A middleware that puts its name on responses."""

    def __init__(self, app: ASGIApp, name: bytes, seen: list[float]) -> None:
        self.app = app
        self.name = name
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(remaining())

        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-signed", self.name))
            await send(message)

        await self.app(scope, receive, sign)


async def sleep_endpoint(request: object) -> PlainTextResponse:
    await anyio.sleep_forever()
    raise AssertionError


def serve(app: ASGIApp, path: str = "/") -> Client:
    async def main() -> Client:
        client = Client(scope=http_scope(path))
        await client.drive(app)
        return client

    return asyncio.run(main())


@pytest.mark.parametrize("block_threshold", [None, 1000], ids=["alone", "with blocking detection"])
def test_both_layers_are_in_place_whatever_the_order(block_threshold: float | None) -> None:
    """The clock runs in every middleware, and every middleware sees the answer."""
    seen: list[float] = []
    given = Middleware(Signs, b"given", seen)
    app = Starlette(routes=[Route("/", sleep_endpoint)], middleware=[given])
    app.add_middleware(Signs, b"before", seen)
    asyncguard.install(app, block_threshold=block_threshold, timeout=0.05, log=False)
    app.add_middleware(Signs, b"after", seen)
    own = list(app.user_middleware)
    listed = app.user_middleware
    client = serve(app)
    assert client.status == 504
    assert [value for name, value in client.headers if name == b"x-signed"] == [b"given", b"before", b"after"]
    assert len(seen) == 3
    assert max(seen) <= 0.05
    assert app.user_middleware is listed
    assert app.user_middleware == own


def test_the_middlewares_are_as_they_were_even_if_one_of_them_cannot_be_made() -> None:
    def refuse(app: ASGIApp) -> ASGIApp:
        raise LookupError("no settings")

    app = Starlette()
    app.add_middleware(refuse)
    asyncguard.install(app, timeout=5)
    own = list(app.user_middleware)
    with pytest.raises(LookupError, match="no settings"):
        serve(app)
    assert app.user_middleware == own


def test_without_a_timeout_there_is_no_guard_of_timeouts() -> None:
    left: list[float] = []

    async def endpoint(request: object) -> PlainTextResponse:
        left.append(remaining())
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/", endpoint)])
    asyncguard.install(app, timeout=None, idle_timeout=0.001, log=False)
    assert serve(app).status == 200
    assert left == [math.inf]
    guard = app.middleware_stack
    assert isinstance(guard, BlockingMiddleware)
    assert not isinstance(guard.app, TimeoutMiddleware)


def test_without_blocking_detection_timeouts_are_outermost() -> None:
    app = Starlette(routes=[Route("/", sleep_endpoint)])
    asyncguard.install(app, block_threshold=None, timeout=0.05, log=False)
    assert serve(app).status == 504
    assert isinstance(app.middleware_stack, TimeoutMiddleware)


def test_every_option_of_timeouts_arrives() -> None:
    def hook(report: TimeoutReport) -> None: ...

    app, answer = Starlette(), PlainTextResponse("busy", 503)
    asyncguard.install(
        app,
        block_threshold=None,
        timeout=1,
        idle_timeout=2,
        body_timeout=3,
        timeout_grace=4,
        timeout_status_code=503,
        timeout_answer=answer,
        deadline_header="X-Wait",
        cancel_on_disconnect=True,
        on_timeout=hook,
        project_root="/",
        log=False,
    )
    guard = app.build_middleware_stack()
    assert isinstance(guard, TimeoutMiddleware)
    assert (guard.timeout, guard.idle_timeout, guard.body_timeout, guard.grace) == (1, 2, 3, 4)
    assert guard.answer is answer
    assert guard.cancel_on_disconnect
    assert guard.has_inner_layer
    assert (guard._deadline_header, guard._project_root, guard._log) == (b"x-wait", "/", False)
    assert guard._hook is not None


def test_the_status_code_arrives() -> None:
    app = Starlette(routes=[Route("/", sleep_endpoint)])
    asyncguard.install(app, timeout=0.05, timeout_status_code=503, log=False)
    assert serve(app).status == 503
