"""The middleware on every loop: what passes through it, and whose request a stall was."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from starlette.types import Message, Receive, Scope, Send

from asyncguard import BlockingMiddleware, BlockReport, BusyReport, _clock
from asyncguard._request import SCOPE_KEY, RequestRecord, current_request
from asyncguard.blocking import _monitor, _stall
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._stall import Aftermath

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio

Work = Callable[[], Awaitable[object]]


def http(path: str = "/", **extra: Any) -> Scope:
    return {"type": "http", "method": "GET", "path": path, "headers": [], **extra}


async def receive() -> Message:
    await anyio.sleep_forever()
    raise AssertionError


async def send(message: Message) -> None: ...


def app_of(**works: Work) -> Any:
    """An application with a route for each of `works`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await works[scope["path"].strip("/")]()

    return app


class Lifespan:
    """A server's side of the lifespan."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stopping = anyio.Event()
        self.started = anyio.Event()

    async def receive(self) -> Message:
        if not self.started.is_set() and not self.messages:
            return {"type": "lifespan.startup"}
        await self.stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def send(self, message: Message) -> None:
        self.messages.append(message["type"])
        if message["type"] == "lifespan.startup.complete":
            self.started.set()


async def lifespan_app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def is_watched() -> bool:
    watch = _monitor._watches.get(running_loop())
    return watch is not None and watch.active


# -- passing through ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan", "some.extension"])
async def test_every_kind_of_scope_passes_through(kind: str) -> None:
    """The very same scope and `receive`, and what it sends."""
    seen: list[object] = []
    sent: list[Message] = []
    scope = {"type": kind, "path": "/"}
    keys = set(scope)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([scope, receive])
        await send({"type": "some.message"})

    async def take(message: Message) -> None:
        sent.append(message)

    middleware = BlockingMiddleware(app, log=False)
    await middleware(scope, receive, take)
    await middleware.monitor.stop()
    assert seen[0] is scope
    assert seen[1] is receive
    assert sent == [{"type": "some.message"}]
    assert set(scope) == keys


async def test_an_unknown_scope_is_not_watched() -> None:
    middleware = BlockingMiddleware(app_of(), log=False)
    with pytest.raises(KeyError):
        await middleware({"type": "some.extension", "path": "/x"}, receive, send)
    assert not is_watched()


class Marker(Exception):
    pass


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan", "some.extension"])
async def test_exceptions_pass(kind: str) -> None:
    error = Marker()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    middleware = BlockingMiddleware(app, log=False)
    with pytest.raises(Marker) as caught:
        await middleware({"type": kind, "path": "/"}, receive, send)
    assert caught.value is error
    assert error.__context__ is None
    await middleware.monitor.stop()
    assert middleware.monitor.in_flight == ()


async def test_context_variables_set_inside_are_seen_outside() -> None:
    user: ContextVar[str] = ContextVar("user", default="nobody")

    async def login() -> None:
        user.set("ada")
        await anyio.lowlevel.checkpoint()

    middleware = BlockingMiddleware(app_of(login=login), log=False)
    await middleware(http("/login"), receive, send)
    assert user.get() == "ada"
    assert current_request.get() is None
    await middleware.monitor.stop()


async def test_an_application_that_returns_something_else_to_await() -> None:
    """As a middleware in C or Cython may: it has no `send` to be driven by, and is awaited."""
    seen: list[RequestRecord | None] = []

    class Awaitable_:  # noqa: N801
        def __await__(self) -> Any:
            seen.append(current_request.get())
            yield from anyio.lowlevel.checkpoint().__await__()

    def app(scope: Scope, receive: Receive, send: Send) -> Awaitable_:
        return Awaitable_()

    middleware = BlockingMiddleware(app, log=False)
    await middleware(http("/x"), receive, send)
    assert seen[0] is not None
    assert seen[0].label == "GET /x"
    assert middleware.monitor.in_flight == ()
    await middleware.monitor.stop()


# -- in flight ---------------------------------------------------------------------------------------


async def test_requests_in_flight(clock: TurnedClock, marked: Callable[[str], int]) -> None:
    first, second = anyio.Event(), anyio.Event()

    async def one() -> None:
        await first.wait()  # first

    async def two() -> None:
        await second.wait()  # second

    middleware = BlockingMiddleware(app_of(one=one, two=two), threshold=1000, log=False)
    async with anyio.create_task_group() as group:
        group.start_soon(middleware, http("/one"), receive, send)
        await anyio.wait_all_tasks_blocked()
        clock.turn(3)
        group.start_soon(middleware, http("/two"), receive, send)
        await anyio.wait_all_tasks_blocked()
        clock.turn(4)
        found = middleware.monitor.in_flight
        assert [(each.request, each.age) for each in found] == [("GET /one", 7), ("GET /two", 4)]
        assert [each.line and each.line.line for each in found] == [marked("first"), marked("second")]
        first.set()
        await anyio.wait_all_tasks_blocked()
        assert [each.request for each in middleware.monitor.in_flight] == ["GET /two"]
        second.set()
    assert middleware.monitor.in_flight == ()
    await middleware.monitor.stop()


async def test_nothing_is_left_of_a_cancelled_request() -> None:
    records: list[RequestRecord] = []

    async def wait() -> None:
        record = current_request.get()
        assert record is not None
        records.append(record)
        await anyio.sleep_forever()

    middleware = BlockingMiddleware(app_of(wait=wait), log=False)
    async with anyio.create_task_group() as group:
        group.start_soon(middleware, http("/wait"), receive, send)
        await anyio.wait_all_tasks_blocked()
        assert len(middleware.monitor.in_flight) == 1
        group.cancel_scope.cancel()
    assert middleware.monitor.in_flight == ()
    assert records[0].coroutine is None
    assert records[0].label == "GET /wait"
    await middleware.monitor.stop()


async def test_a_request_that_is_closed_in_another_context() -> None:
    """As by the garbage collector, when a loop is closed with the request in flight."""
    log: list[str] = []

    class Suspend:
        def __await__(self) -> Any:
            yield

    async def wait() -> None:
        try:
            await Suspend()
        finally:
            log.append("cleaned up")

    middleware = BlockingMiddleware(app_of(wait=wait), log=False)
    scope = http("/wait")
    running = middleware(scope, receive, send)
    contextvars.copy_context().run(running.send, None)
    record = scope["asyncguard.request"]
    running.close()
    assert log == ["cleaned up"]
    assert record.coroutine is None
    assert middleware.monitor.in_flight == ()
    await middleware.monitor.stop()


async def test_a_request_leaves_nothing_to_the_garbage_collector() -> None:
    class Held(dict[str, Any]):
        pass

    async def work() -> None:
        await anyio.lowlevel.checkpoint()

    middleware = BlockingMiddleware(app_of(work=work), log=False)
    await middleware(http("/work"), receive, send)  # what is made once is made
    gc.collect()
    gc.disable()
    try:
        scope = Held(http("/work"))
        gone = weakref.ref(scope)
        await middleware(scope, receive, send)
        del scope
        await anyio.lowlevel.checkpoint()
        assert gone() is None
    finally:
        gc.enable()
    await middleware.monitor.stop()


async def test_a_scope_may_be_served_twice() -> None:
    """As by a middleware outside that tries again."""
    records: list[RequestRecord | None] = []

    async def work() -> None:
        records.append(current_request.get())

    middleware = BlockingMiddleware(app_of(work=work), log=False)
    scope = http("/work")
    for _ in range(2):
        await middleware(scope, receive, send)
    assert None not in records
    assert records[0] is not records[1]
    await middleware.monitor.stop()


# -- lifespan ----------------------------------------------------------------------------------------


async def test_the_loop_is_watched_from_start_to_shutdown() -> None:
    server = Lifespan()
    middleware = BlockingMiddleware(lifespan_app, log=False)
    assert not is_watched()
    async with anyio.create_task_group() as group:
        group.start_soon(middleware, {"type": "lifespan"}, server.receive, server.send)
        await server.started.wait()
        assert is_watched()
        server.stopping.set()
    assert not is_watched()
    assert server.messages == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_the_reports_are_out_before_the_shutdown_is_complete() -> None:
    """Servers end the loop, and often the process, as soon as they hear of it."""
    order: list[str] = []

    def hook(report: BlockReport) -> None:
        time.sleep(0.1)
        order.append(report.call)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        time.sleep(0.15)
        await send({"type": "lifespan.shutdown.complete"})

    async def take(message: Message) -> None:
        order.append(message["type"])
        await server.send(message)

    server = Lifespan()
    middleware = BlockingMiddleware(app, threshold=0.05, on_block=hook, log=False)
    async with anyio.create_task_group() as group:
        group.start_soon(middleware, {"type": "lifespan"}, server.receive, take)
        await server.started.wait()
        await anyio.sleep(0.01)
        server.stopping.set()
    assert order == ["lifespan.startup.complete", "time.sleep", "lifespan.shutdown.complete"]


async def test_start_up_stalls_are_marked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reports: list[BlockReport] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        time.sleep(0.15)
        await anyio.sleep(0.01)
        time.sleep(0.15)  # in one iteration with the end of the start-up
        await send({"type": "lifespan.startup.complete"})
        await anyio.sleep(0.01)
        time.sleep(0.15)
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    server = Lifespan()
    middleware = BlockingMiddleware(app, threshold=0.05, on_block=reports.append)
    async with anyio.create_task_group() as group:
        group.start_soon(middleware, {"type": "lifespan"}, server.receive, server.send)
        await anyio.sleep(1)
        server.stopping.set()
    assert [report.starting for report in reports] == [True, True, False]
    assert [report.headline.partition(" blocked")[0] for report in reports] == [
        "start-up",
        "start-up",
        "code outside any request",
    ]
    assert reports[0].advice is None
    assert [entry.count for entry in middleware.monitor.lines] == [1]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


async def test_a_start_up_that_fails_is_reported_before_the_server_knows() -> None:
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        time.sleep(0.15)
        await send({"type": "lifespan.startup.failed"})

    async def take(message: Message) -> None:
        order.append(message["type"])

    middleware = BlockingMiddleware(
        app, threshold=0.05, on_block=lambda report: order.append(f"{report.starting}"), log=False
    )
    await anyio.sleep(0.01)
    await middleware({"type": "lifespan"}, Lifespan().receive, take)
    assert order == ["True", "lifespan.startup.failed"]
    assert not is_watched()


async def test_an_application_without_a_lifespan() -> None:
    """It raises, as the specification says; the first request begins the watch."""
    reports: list[BlockReport] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        time.sleep(0.15)

    middleware = BlockingMiddleware(app, threshold=0.05, on_block=reports.append, log=False)
    with pytest.raises(NotImplementedError):
        await middleware({"type": "lifespan"}, receive, send)
    assert not is_watched()
    await middleware(http("/first"), receive, send)
    assert is_watched()
    await anyio.sleep(0.01)
    await middleware.monitor.stop()
    assert [report.request for report in reports] == ["GET /first"]


# -- whose request -----------------------------------------------------------------------------------


async def test_the_request_that_blocks_and_those_that_suffer(marked: Callable[[str], int]) -> None:
    reports: list[BlockReport] = []
    far = anyio.Event()

    async def block() -> None:
        await anyio.lowlevel.checkpoint()
        time.sleep(0.3)  # block
        far.set()

    async def nap() -> None:
        await anyio.sleep(0.1)

    async def wait() -> None:
        await anyio.sleep(3)

    middleware = BlockingMiddleware(
        app_of(block=block, nap=nap, wait=wait), threshold=0.1, on_block=reports.append, log=False
    )
    async with anyio.create_task_group() as group:
        group.start_soon(middleware, http("/nap"), receive, send)
        group.start_soon(middleware, http("/wait"), receive, send)
        await anyio.sleep(0.02)
        await middleware(http("/block"), receive, send)
        await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    await middleware.monitor.stop()
    (report,) = reports
    assert report.request == "GET /block"
    assert report.line is not None
    assert report.line.line == marked("block")
    assert [victim.request for victim in report.victims] == ["GET /nap"]
    assert 0.1 < report.victims[0].waited < 5


async def test_a_child_task_of_a_request() -> None:
    reports: list[BlockReport] = []

    async def child() -> None:
        await anyio.sleep(0.01)
        time.sleep(0.15)

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child)

    middleware = BlockingMiddleware(app_of(parent=parent), threshold=0.05, on_block=reports.append, log=False)
    await middleware(http("/parent"), receive, send)
    await anyio.sleep(0.01)
    await middleware.monitor.stop()
    (report,) = reports
    assert (report.request, report.left_behind) == ("GET /parent", False)
    assert report.victims == ()


async def test_a_task_left_behind_by_a_request() -> None:
    reports: list[BlockReport] = []

    async def child() -> None:
        await anyio.sleep(0.05)
        time.sleep(0.15)

    async with anyio.create_task_group() as group:

        async def parent() -> None:
            if isinstance(running_loop(), asyncio.AbstractEventLoop):
                tasks.append(asyncio.create_task(child()))
            else:
                group.start_soon(child)

        tasks: list[asyncio.Task[None]] = []
        middleware = BlockingMiddleware(
            app_of(parent=parent), threshold=0.05, on_block=reports.append, log=False
        )
        await middleware(http("/parent"), receive, send)
        await anyio.sleep(0.3)
    await middleware.monitor.stop()
    (report,) = reports
    if report.request is None:  # trio's tasks have the context of their nursery
        assert not isinstance(running_loop(), asyncio.AbstractEventLoop)
    else:
        assert (report.request, report.left_behind) == ("GET /parent", True)
        assert "a task left behind by GET /parent" in str(report)


async def test_one_guard_inside_another() -> None:
    """Both get their reports, of the same request, which is watched once."""
    inner_reports: list[BlockReport] = []
    outer_reports: list[BlockReport] = []
    records: list[object] = []

    async def block() -> None:
        records.append(len(_monitor._watches[running_loop()].in_flight))
        time.sleep(0.3)

    inner = BlockingMiddleware(app_of(block=block), threshold=0.05, on_block=inner_reports.append, log=False)
    outer = BlockingMiddleware(inner, threshold=0.1, on_block=outer_reports.append, log=False)
    await outer(http("/block"), receive, send)
    await anyio.sleep(0.01)
    await inner.monitor.stop()
    await outer.monitor.stop()
    assert records == [1]
    assert [report.request for report in inner_reports] == ["GET /block"]
    assert [report.request for report in outer_reports] == ["GET /block"]
    assert not is_watched()


async def test_two_guarded_applications_on_one_loop() -> None:
    """Each has its threshold; a stall is told to both, for both had to stand still."""
    short: list[BlockReport] = []
    long: list[BlockReport] = []

    async def block() -> None:
        time.sleep(0.15)

    first = BlockingMiddleware(app_of(block=block), threshold=0.05, on_block=short.append, log=False)
    second = BlockingMiddleware(app_of(block=block), threshold=5, on_block=long.append, log=False)
    for middleware in (first, second):
        await middleware(http("/block"), receive, send)
        await anyio.sleep(0.01)
    await first.monitor.stop()
    await second.monitor.stop()
    assert len(short) == 2
    assert long == []


# -- inside a guard of another kind ------------------------------------------------------------------


def another_guard(app: Any, records: list[RequestRecord]) -> Any:
    """Makes the record, as each kind of guard does where it is the outermost one."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        record = scope[SCOPE_KEY] = RequestRecord(scope, _clock.monotonic(), receive)
        records.append(record)
        try:
            await app(scope, receive, send)
        finally:
            del scope[SCOPE_KEY]

    return guard


async def test_a_request_that_has_a_record_already_is_watched_under_it(
    marked: Callable[[str], int], clock: TurnedClock
) -> None:
    records: list[RequestRecord] = []
    ages: list[float] = []

    async def work() -> None:
        (found,) = middleware.monitor.in_flight
        ages.append(found.age)
        waiting.set()
        await release.wait()  # joined

    waiting, release = anyio.Event(), anyio.Event()
    middleware = BlockingMiddleware(app_of(work=work), threshold=1000, log=False)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        clock.turn(3)
        await middleware(scope, receive, send)

    async with anyio.create_task_group() as group:
        group.start_soon(another_guard(slow, records), http("/work"), receive, send)
        await waiting.wait()
        await anyio.wait_all_tasks_blocked()
        (found,) = middleware.monitor.in_flight
        assert (found.request, found.age) == ("GET /work", 3)
        assert found.line is not None
        assert found.line.line == marked("joined")
        release.set()
    assert ages == [3]
    assert middleware.monitor.in_flight == ()
    assert records[0].coroutine is None
    assert records[0].finished_at == float("inf")  # who has made it finishes it
    await middleware.monitor.stop()


async def test_its_time_on_the_loop_is_added_up(clock: TurnedClock) -> None:
    records: list[RequestRecord] = []
    busy: list[BusyReport] = []

    async def pieces() -> None:
        for _ in range(20):
            clock.turn(0.0625)
            await anyio.lowlevel.checkpoint()

    async def quick() -> None:
        clock.turn(0.25)

    middleware = BlockingMiddleware(
        app_of(pieces=pieces, quick=quick), threshold=1000, on_busy=busy.append, log=False
    )
    guard = another_guard(middleware, records)
    await guard(http("/pieces"), receive, send)
    await guard(http("/quick"), receive, send)
    assert [record.loop_time for record in records] == [1.25, 0.25]
    await middleware.monitor.stop()
    assert [report.request for report in busy] == ["GET /pieces"]


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
async def test_what_it_raises_passes_through_both(waits: bool) -> None:
    error = Marker()
    records: list[RequestRecord] = []

    async def work() -> None:
        if waits:
            await anyio.lowlevel.checkpoint()
        raise error

    middleware = BlockingMiddleware(app_of(work=work), log=False)
    with pytest.raises(Marker) as caught:
        await another_guard(middleware, records)(http("/work"), receive, send)
    assert caught.value is error
    assert error.__context__ is None
    assert records[0].coroutine is None
    assert middleware.monitor.in_flight == ()
    await middleware.monitor.stop()


async def test_one_that_is_cancelled_is_watched_no_more() -> None:
    records: list[RequestRecord] = []
    middleware = BlockingMiddleware(app_of(work=anyio.sleep_forever), log=False)
    async with anyio.create_task_group() as group:
        group.start_soon(another_guard(middleware, records), http("/work"), receive, send)
        await anyio.wait_all_tasks_blocked()
        assert len(middleware.monitor.in_flight) == 1
        group.cancel_scope.cancel()
    assert middleware.monitor.in_flight == ()
    assert records[0].coroutine is None
    await middleware.monitor.stop()


async def test_two_of_ours_inside_one_of_another_kind_watch_it_once() -> None:
    in_flight: list[int] = []

    async def work() -> None:
        in_flight.append(len(_monitor._watches[running_loop()].in_flight))

    inner = BlockingMiddleware(app_of(work=work), log=False)
    outer = BlockingMiddleware(inner, log=False)
    await another_guard(outer, [])(http("/work"), receive, send)
    assert in_flight == [1]
    await inner.monitor.stop()
    await outer.monitor.stop()


async def test_its_stall_is_reported_with_its_label() -> None:
    reports: list[BlockReport] = []

    async def block() -> None:
        time.sleep(0.15)

    middleware = BlockingMiddleware(app_of(block=block), threshold=0.05, on_block=reports.append, log=False)
    await another_guard(middleware, [])(http("/block"), receive, send)
    await anyio.sleep(0.01)
    await middleware.monitor.stop()
    assert [report.request for report in reports] == ["GET /block"]


# -- requests in small pieces ------------------------------------------------------------------------


async def test_a_request_that_holds_the_loop_in_small_pieces(
    clock: TurnedClock, marked: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    busy: list[BusyReport] = []
    stalls: list[BlockReport] = []

    async def pieces() -> None:
        for _ in range(20):
            clock.turn(0.0625)
            await anyio.lowlevel.checkpoint()  # gives back

    async def few() -> None:
        for _ in range(15):
            clock.turn(0.0625)
            await anyio.lowlevel.checkpoint()

    middleware = BlockingMiddleware(
        app_of(pieces=pieces, few=few), threshold=1000, on_block=stalls.append, on_busy=busy.append
    )
    await middleware(http("/pieces"), receive, send)
    await middleware(http("/few"), receive, send)
    await middleware.monitor.stop()
    (report,) = busy
    assert (report.request, report.loop_time, report.window) == ("GET /pieces", 1.25, 1.25)
    assert report.longest == 0.0625
    assert 0 < report.turns <= 20
    assert report.line is not None
    assert report.line.line == marked("gives back")
    assert stalls == []
    assert [record.getMessage() for record in caplog.records] == [str(report)]


async def test_without_a_busy_threshold_pieces_are_nobodys_business(clock: TurnedClock) -> None:
    busy: list[BusyReport] = []

    async def pieces() -> None:
        for _ in range(200):
            clock.turn(0.0625)
            await anyio.lowlevel.checkpoint()

    middleware = BlockingMiddleware(
        app_of(pieces=pieces), threshold=1000, busy_threshold=None, on_busy=busy.append, log=False
    )
    await middleware(http("/pieces"), receive, send)
    await middleware.monitor.stop()
    assert busy == []


# -- what is kept, and when --------------------------------------------------------------------------


async def test_a_record_that_somebody_still_refers_to_is_finished(clock: TurnedClock) -> None:
    """A task that runs on asks whether its request has ended."""
    records: list[RequestRecord] = []

    async def keep() -> None:
        record = current_request.get()
        assert record is not None
        assert record.coroutine is not None
        records.append(record)
        clock.turn(1)

    middleware = BlockingMiddleware(app_of(keep=keep), threshold=1000, log=False)
    scope = http("/keep", state={})
    await middleware(scope, receive, send)
    (record,) = records
    assert (record.finished_at, record.coroutine, record.label) == (clock.now, None, "GET /keep")
    assert record._scope is None
    await middleware.monitor.stop()


async def test_a_record_that_nobody_refers_to_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """That costs a request more than it may."""
    finished: list[RequestRecord] = []
    monkeypatch.setattr(RequestRecord, "finish", finished.append)

    async def work() -> None:
        await anyio.lowlevel.checkpoint()

    middleware = BlockingMiddleware(app_of(work=work), log=False)
    await middleware(http("/work"), receive, send)
    assert finished == []
    await middleware.monitor.stop()


async def test_a_request_ends_the_rest_of_the_loops_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def work() -> None:
        asked.append("request")

    middleware = BlockingMiddleware(app_of(work=work), log=False)
    await middleware(http("/work"), receive, send)
    watch = _monitor._watches[running_loop()]
    with monkeypatch.context() as patched:
        patched.setattr(watch, "resting", True)
        patched.setattr(watch.probe, "end_rest", lambda: asked.append("end of the rest"))
        await middleware(http("/work"), receive, send)
    await middleware(http("/work"), receive, send)
    assert asked == ["request", "end of the rest", "request", "request"]
    await middleware.monitor.stop()


async def test_only_right_after_a_stall_it_is_asked_when_a_request_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is a system call: most requests must not pay for it."""
    asked: list[object] = []
    found: list[float | None] = []

    def arrival(receive: object) -> float:
        asked.append(receive)
        return 12.5

    async def work() -> None:
        record = current_request.get()
        assert record is not None
        found.append(record.arrived)

    monkeypatch.setattr(_stall, "arrival", arrival)
    middleware = BlockingMiddleware(app_of(work=work), threshold=1000, log=False)
    await middleware(http("/work"), receive, send)
    watch = _monitor._watches[running_loop()]
    watch.aftermath = Aftermath()
    await middleware(http("/work"), receive, send)
    watch.aftermath = None
    await middleware(http("/work"), receive, send)
    assert asked == [receive]
    assert found == [None, 12.5, None]
    await middleware.monitor.stop()
