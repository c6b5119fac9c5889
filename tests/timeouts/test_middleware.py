"""The middleware of request timeouts: its options, its two layers, and the loops that it is used in."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import uvloop
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import TimeoutMiddleware, TimeoutReport, abandoned, remaining
from asyncguard._request import SCOPE_KEY, RequestRecord, current_request
from asyncguard.timeouts import InnerLayer, _limit, _middleware
from tests.asgi_driver import ANSWER, Client, Reports, answer_ok, http_scope, responder_of

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

SOON = 0.05


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_limit, "shortest", math.inf)
    yield
    assert abandoned() == 0


class Marker(Exception):
    pass


async def sleep(scope: Scope, receive: Receive, send: Send) -> None:
    await anyio.sleep_forever()


def guarded(app: ASGIApp, **options: Any) -> TimeoutMiddleware:
    return TimeoutMiddleware(app, **{"timeout": SOON, "log": False, **options})


# -- options -----------------------------------------------------------------------------------------


async def coroutine_function(report: TimeoutReport) -> None: ...


SECONDS = [
    (-1, ValueError, "greater than 0"),
    (0, ValueError, "greater than 0"),
    (math.nan, ValueError, "finite"),
    (math.inf, ValueError, "finite"),
    ("5", TypeError, "a number of seconds"),
    (True, TypeError, "a number of seconds"),
]
BAD_OPTIONS = [
    *((option, *case) for option in ("timeout", "idle_timeout", "body_timeout", "grace") for case in SECONDS),
    ("grace", None, TypeError, "a number of seconds"),
    ("status_code", 200, ValueError, "the HTTP status code of an error"),
    ("status_code", 999, ValueError, "the HTTP status code of an error"),
    ("status_code", "504", TypeError, "an HTTP status code"),
    ("status_code", True, TypeError, "an HTTP status code"),
    ("status_code", None, TypeError, "an HTTP status code"),
    ("answer", 5, TypeError, "an ASGI application"),
    ("answer", PlainTextResponse, TypeError, "an ASGI application"),
    ("answer", print, TypeError, "an ASGI application"),
    ("deadline_header", 5, TypeError, "the name of a header"),
    ("deadline_header", b"x-wait", TypeError, "the name of a header"),
    ("deadline_header", "a b", ValueError, "the name of a header"),
    ("deadline_header", "", ValueError, "the name of a header"),
    ("cancel_on_disconnect", 1, TypeError, "True or False"),
    ("cancel_on_disconnect", None, TypeError, "True or False"),
    ("on_timeout", coroutine_function, TypeError, "a plain function"),
    ("on_timeout", "print", TypeError, "a function that takes one event, or None"),
    ("project_root", "/no/such/directory", ValueError, "an existing directory"),
    ("project_root", 1, TypeError, "the path of a directory, or None"),
    ("log", 1, TypeError, "True or False"),
]


DEFAULTS = {
    "timeout": 30.0,
    "idle_timeout": 60.0,
    "body_timeout": 30.0,
    "grace": 5.0,
    "status_code": 504,
    "answer": None,
    "deadline_header": None,
    "cancel_on_disconnect": False,
    "on_timeout": None,
    "project_root": None,
    "log": True,
}


@pytest.mark.parametrize(("option", "value", "error", "allowed"), BAD_OPTIONS)
def test_a_bad_option_is_refused_by_its_name(
    option: str, value: Any, error: type[Exception], allowed: str
) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(error) as caught:
        TimeoutMiddleware(answer_ok, **options)
    assert str(caught.value).startswith(f"{option} must be ")
    assert allowed in str(caught.value)
    assert repr(value) in str(caught.value)


def test_options_are_keywords_with_these_defaults() -> None:
    app, *options = inspect.signature(TimeoutMiddleware).parameters.values()
    assert (app.name, app.kind, app.default) == ("app", app.POSITIONAL_OR_KEYWORD, app.empty)
    assert {option.kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}
    assert {option.name: option.default for option in options} == DEFAULTS


def test_without_options_the_defaults_hold() -> None:
    middleware = TimeoutMiddleware(answer_ok)
    assert (middleware.timeout, middleware.idle_timeout, middleware.body_timeout) == (30.0, 60.0, 30.0)
    assert middleware.grace == 5.0
    assert middleware.answer is middleware.plain_answer
    assert middleware.cancel_on_disconnect is False


@pytest.mark.parametrize("app", [None, "main:app", 5])
def test_it_takes_what_can_be_called(app: Any) -> None:
    with pytest.raises(TypeError) as caught:
        TimeoutMiddleware(app)
    assert str(caught.value) == f"TimeoutMiddleware takes an ASGI application, not {app!r}"


def test_none_is_off() -> None:
    middleware = TimeoutMiddleware(answer_ok, timeout=None, idle_timeout=None, body_timeout=None)
    assert (middleware.timeout, middleware.idle_timeout, middleware.body_timeout) == (math.inf,) * 3


@pytest.mark.anyio
async def test_with_every_clock_off_a_request_takes_as_long_as_it_takes(clock: TurnedClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in ANSWER:
            assert remaining() == math.inf
            clock.turn(10_000)
            responder_of(scope).look()
            await send(message)

    client = Client()
    await client.drive(guarded(app, timeout=None, idle_timeout=None, body_timeout=None))
    assert client.status == 200


@pytest.mark.anyio
async def test_the_options_of_the_answer() -> None:
    client = Client()
    await client.drive(guarded(sleep, status_code=503))
    assert client.status == 503
    client = Client()
    await client.drive(guarded(sleep, answer=PlainTextResponse("mine", 429)))
    assert (client.status, client.body) == (429, b"mine")


@pytest.mark.anyio
async def test_a_hook_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    called = Reports()

    def hook(report: TimeoutReport) -> None:
        called(report)
        raise Marker

    middleware = guarded(sleep, on_timeout=hook)
    for _ in range(2):
        client = Client()
        await client.drive(middleware)
        assert client.status == 504
    await called.first()
    await anyio.to_thread.run_sync(_middleware._reporter.flush().wait)
    assert len(called) == 2
    assert [type(record.exc_info and record.exc_info[1]) for record in caplog.records] == [Marker]


@pytest.mark.anyio
async def test_below_a_directory_that_is_not_its_own_there_is_no_line(tmp_path: Path) -> None:
    reports = Reports()
    await Client().drive(guarded(sleep, on_timeout=reports, project_root=tmp_path))
    report = await reports.first()
    assert report.stack == ()
    assert report.line is None


# -- passing through ---------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["websocket", "lifespan", "some.extension"])
@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
async def test_nothing_is_changed_for_what_is_no_http(kind: str, inner: bool, clock: TurnedClock) -> None:
    seen: list[object] = []
    sent: list[Message] = []
    scope = {"type": kind, "path": "/"}
    messages: list[Message] = [
        {"type": f"{kind}.startup.complete"},
        {"type": f"{kind}.shutdown.failed", "message": "no disk"},
        {"type": f"{kind}.shutdown.complete"},
        {"type": "http.response.start"},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([scope, receive])
        assert current_request.get() is None
        clock.turn(10_000)
        await anyio.lowlevel.checkpoint()
        for message in messages:
            await send(message)
        raise error

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    error = Marker()
    middleware = InnerLayer(app) if inner else guarded(app)
    with pytest.raises(Marker) as caught:
        await middleware(scope, receive, send)
    assert caught.value is error
    assert seen[0] is scope
    assert seen[1] is receive
    assert sent == messages
    assert all(ours is theirs for ours, theirs in zip(sent, messages, strict=True))
    assert scope == {"type": kind, "path": "/"}


@pytest.mark.anyio
async def test_of_a_request_nothing_stays_behind() -> None:
    records: list[RequestRecord] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        record = current_request.get()
        assert record is scope[SCOPE_KEY]
        assert record is not None
        records.append(record)
        await answer_ok(scope, receive, send)

    client = Client(scope=http_scope("/items/1"))
    keys = set(client.scope)
    await client.drive(guarded(app))
    assert set(client.scope) == keys
    assert current_request.get() is None
    assert (records[0].deadline, records[0]._scope, records[0].label) == (None, None, "GET /items/1")
    assert records[0].finished_at < math.inf


@pytest.mark.anyio
async def test_the_last_reports_are_out_before_the_server_hears_of_the_shutdown() -> None:
    """Servers end the process as soon as they have that message."""
    reports: list[TimeoutReport] = []
    counts: list[int] = []
    middleware = guarded(sleep, on_timeout=reports.append)
    await Client().drive(middleware)

    async def send(message: Message) -> None:
        counts.append(len(reports))

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.shutdown.complete"})

    middleware.app = lifespan
    await middleware({"type": "lifespan"}, Client().receive, send)
    assert counts == [1]


@pytest.mark.anyio
async def test_an_application_that_returns_another_awaitable_than_a_coroutine() -> None:
    class Steps:
        def __init__(self, coroutine: Any) -> None:
            self.coroutine = coroutine

        def __await__(self) -> Any:
            return self.coroutine.__await__()

    for app, status in ((answer_ok, 200), (sleep, 504)):
        client = Client()
        await client.drive(guarded(lambda *args, app=app: Steps(app(*args))))
        assert client.status == status


# -- more than one layer -----------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(("inner", "outer"), [(0.5, 30), (0.5, None), (0.5, 0.1)])
async def test_of_two_the_inner_one_sets_the_limit_and_the_outer_one_answers(
    inner: float, outer: float | None, clock: TurnedClock
) -> None:
    left: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        left.append(remaining())
        clock.turn(inner + 0.1)
        responder_of(scope).look()
        await anyio.sleep_forever()

    client = Client()
    innermost = guarded(app, timeout=inner, status_code=503)
    await client.drive(guarded(innermost, timeout=outer, status_code=504))
    assert client.status == 504
    assert left == [pytest.approx(inner)]


@pytest.mark.anyio
async def test_an_inner_layer_without_an_outer_one_does_nothing() -> None:
    client = Client()
    await client.drive(InnerLayer(answer_ok))
    assert client.status == 200


@pytest.mark.anyio
async def test_a_middleware_that_tries_again_is_answered_once(clock: TurnedClock) -> None:
    tries: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tries.append(len(tries))
        if len(tries) < 3:
            raise Marker
        clock.turn(0.6)
        responder_of(scope).look()
        await anyio.sleep_forever()

    async def retry(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            try:
                await layer(scope, receive, send)
            except Marker:
                continue

    layer = InnerLayer(app)
    middleware = guarded(retry, timeout=0.5)
    middleware.has_inner_layer = True
    client = Client()
    await client.drive(middleware)
    assert client.status == 504
    assert tries == [0, 1, 2]


# -- loops, threads and processes --------------------------------------------------------------------


async def serve_both(slow: ASGIApp) -> None:
    """A request that runs out of time, and one that does not."""
    client, quick = Client(), Client(scope=http_scope("/quick"))
    await asyncio.gather(client.drive(slow), quick.drive(slow))
    assert (client.status, quick.status) == (504, 200)


async def slow_or_quick(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] != "/quick":
        await anyio.sleep_forever()
    await answer_ok(scope, receive, send)


@pytest.mark.parametrize("factories", [[None, None], [None, uvloop.new_event_loop, None]])
def test_one_loop_after_another(factories: list[Callable[[], Any] | None]) -> None:
    middleware = guarded(slow_or_quick)
    for factory in factories:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve_both(middleware))


def test_loops_in_two_threads_at_once() -> None:
    middleware = guarded(slow_or_quick)
    both = threading.Barrier(2, timeout=10)
    served: list[int] = []

    def serve() -> None:
        async def main() -> None:
            for _ in range(5):
                both.wait()
                await serve_both(middleware)
            served.append(threading.get_ident())

        asyncio.run(main())

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(served)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_reports_anew_and_has_abandoned_nothing(tmp_path: Path) -> None:
    """The thread that reports stays with the parent, and so does what runs on there."""
    program = """
    import asyncio, os, threading, time, traceback, warnings
    import anyio
    from asyncguard import TimeoutMiddleware, abandoned

    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, from 3.12 on
    SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    reports = []
    reported = threading.Event()

    def on_timeout(report):
        reports.append(report)
        reported.set()

    async def app(scope, receive, send):
        await anyio.to_thread.run_sync(release.wait)

    async def receive():
        await asyncio.sleep(100)

    async def send(message):
        messages.append(message["type"])
        answered.set()

    middleware = TimeoutMiddleware(app, timeout=0.05, on_timeout=on_timeout, log=False)

    async def serve(meanwhile):
        global answered
        answered = asyncio.Event()
        messages.clear()
        task = asyncio.create_task(middleware(dict(SCOPE), receive, send))
        await answered.wait()
        await asyncio.to_thread(reported.wait, 10)
        assert abandoned() == 1
        meanwhile()
        release.set()
        await task
        assert messages == ["http.response.start", "http.response.body"], messages
        assert abandoned() == 0
        assert [report.outcome for report in reports] == ["thread"], reports

    def fork():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    def child():
        global release
        assert abandoned() == 0
        names = [thread.name for thread in threading.enumerate()]
        assert not any("asyncguard" in name for name in names), names
        reports.clear()
        reported.clear()
        release = threading.Event()
        asyncio.events._set_running_loop(None)
        asyncio.run(serve(lambda: None))

    messages, release = [], threading.Event()
    asyncio.run(serve(fork))
    """
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_what_is_logged_at_exit_is_logged(tmp_path: Path) -> None:
    """The thread that reports is a daemon: it is waited for."""
    program = """
    import asyncio, logging, time
    from asyncguard import TimeoutMiddleware

    async def app(scope, receive, send):
        await asyncio.sleep(100)

    async def nothing(*message): ...

    def slowly(report):
        time.sleep(0.2)
        print("reported", report.request)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    middleware = TimeoutMiddleware(app, timeout=0.05, on_timeout=slowly, log=False)
    asyncio.run(middleware(scope, nothing, nothing))
    """
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("reported GET /\n", "")


def test_its_logger_has_no_handlers() -> None:
    assert logging.getLogger("asyncguard.timeouts").handlers == []
