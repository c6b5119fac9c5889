"""One request under its clocks: when it is answered, by what, and that it is answered once."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import BlockingMiddleware, TimeoutMiddleware, abandoned, remaining
from asyncguard.timeouts import InnerLayer, _limit, _responder
from asyncguard.timeouts._loops import running_loop
from tests.asgi_driver import (
    ANSWER,
    NO_BODY,
    SOON,
    Client,
    Looks,
    Reports,
    Step,
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


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_limit, "shortest", math.inf)
    yield
    assert abandoned() == 0


async def sleeping_endpoint(request: Request) -> Response:
    await anyio.sleep_forever()
    raise AssertionError


# -- the clocks --------------------------------------------------------------------------------------


async def test_the_idle_clock_starts_after_a_piece_that_the_server_took_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looked at in the meantime, it does not run: nothing is due then."""
    looks = Looks(monkeypatch)

    async def slow(message: Message) -> None:
        if message["type"] == "http.response.body":
            await looks.next()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ANSWER[0])
        await send({**ANSWER[1], "more_body": True})
        await anyio.sleep_forever()

    client = Client(on_send=slow)
    await client.drive(guarded(app, timeout=30, idle_timeout=SOON))
    assert client.types == ["start", "body"]


async def test_the_idle_clock_does_not_run_while_the_server_takes_the_head(clock: TurnedClock) -> None:
    async def slow(message: Message) -> None:
        if message["type"] == "http.response.start":
            clock.turn(0.6)
            responder_of(client.scope).look()

    client = Client(on_send=slow)
    await client.drive(guarded(answer_ok, timeout=30, idle_timeout=0.5))
    assert client.status == 200


async def test_a_response_that_stalls_is_cut_and_one_that_goes_on_is_not(clock: TurnedClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ANSWER[0])
        for _ in range(10):
            clock.turn(0.3)
            responder_of(scope).look()
            await send({"type": "http.response.body", "body": b".", "more_body": True})
        clock.turn(0.6)
        responder_of(scope).look()
        await anyio.sleep_forever()

    client = Client()
    await client.drive(guarded(app, timeout=0.5, idle_timeout=0.5))
    assert client.types == ["start", *["body"] * 10]
    assert not client.complete.is_set()


async def test_server_sent_events_may_be_silent(clock: TurnedClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
        await send({**ANSWER[0], "headers": headers})
        for _ in range(2):
            clock.turn(0.6)
            responder_of(scope).look()
        await send(ANSWER[1])

    client = Client()
    await client.drive(guarded(app, idle_timeout=0.5))
    assert client.status == 200


async def test_after_an_upload_the_response_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at while the body comes in, it is not looked at again only when that would have been late."""
    looks = Looks(monkeypatch)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await anyio.sleep_forever()

    client = Client(piece(b"x" * 5000), looks.next, NO_BODY)
    await client.drive(guarded(app, body_timeout=30))
    assert client.status == 504


async def test_an_upload_takes_the_clients_time(clock: TurnedClock) -> None:
    async def turn() -> None:
        clock.turn(0.3)
        responder_of(client.scope).look()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        clock.turn(0.4)
        responder_of(scope).look()
        await answer_ok(scope, receive, send)

    pieces: list[Step] = [turn, piece(b"x" * 5000)] * 10
    client = Client(*pieces, NO_BODY)
    await client.drive(guarded(app, timeout=0.5, body_timeout=0.5))
    assert client.status == 200


async def test_a_client_that_stalls_its_upload_is_refused(clock: TurnedClock) -> None:
    async def turn() -> None:
        clock.turn(0.6)
        responder_of(client.scope).look()
        await anyio.sleep_forever()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass

    client = Client(piece(b"x" * 5000), turn)
    await client.drive(guarded(app, timeout=30, body_timeout=0.5))
    assert client.status == 408
    assert (b"connection", b"close") in client.headers


async def test_who_else_receives_does_not_end_the_wait_for_the_body(clock: TurnedClock) -> None:
    """Starlette's `Request.is_disconnected` begins to receive, and gives up at once."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            await receive()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                assert not await Request(scope, receive).is_disconnected()
                clock.turn(0.3)
                responder_of(scope).look()
            came.set()
        await answer_ok(scope, receive, send)

    came = anyio.Event()
    client = Client(came.wait, NO_BODY)
    await client.drive(guarded(app, timeout=0.5, body_timeout=30))
    assert client.status == 200


async def test_a_live_stream_is_not_cut_because_somebody_listens_for_the_body(clock: TurnedClock) -> None:
    """A streaming response listens for its client's leaving: of a body that nobody has read."""

    async def content() -> AsyncIterator[str]:
        for letter in "0123456789":
            clock.turn(0.3)
            responder_of(client.scope).look()
            yield letter

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(content())(scope, receive, send)

    client = Client(anyio.sleep_forever)
    await client.drive(guarded(app, timeout=0.5, body_timeout=0.5, idle_timeout=0.5))
    assert (client.status, client.body) == (200, b"0123456789")


async def test_a_request_that_was_under_way_already_is_answered_in_time(clock: TurnedClock) -> None:
    """Its clock began at the guard further out: it is looked at when that has run out."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        due = responder_of(scope)._armed
        assert due == pytest.approx(began + 0.5)
        await answer_ok(scope, receive, send)

    inner = guarded(app, timeout=0.5)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        clock.turn(0.4)
        await inner(scope, receive, send)

    outer = BlockingMiddleware(slow, threshold=1000, log=False)
    began = clock.now
    client = Client()
    await client.drive(outer)
    assert client.status == 200
    await outer.monitor.stop()


async def test_one_whose_time_was_up_before_it_came_is_answered_at_once(clock: TurnedClock) -> None:
    inner = guarded(sleep, timeout=0.5)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        clock.turn(0.6)
        await inner(scope, receive, send)

    outer = BlockingMiddleware(slow, threshold=1000, log=False)
    client = Client()
    await client.drive(outer)
    assert client.status == 504
    await outer.monitor.stop()


async def test_what_is_left(clock: TurnedClock) -> None:
    left: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            left.append(remaining())
            clock.turn(0.25)
        await send(ANSWER[0])
        left.append(remaining())
        await send(ANSWER[1])

    assert remaining() == math.inf
    await Client().drive(guarded(app, timeout=0.5))
    assert left == [0.5, 0.25, math.inf]


# -- a debugger --------------------------------------------------------------------------------------


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a debugger is attached, as its last element says; one is."""
    said = [True]
    monkeypatch.setattr(_responder, "is_debugged", lambda late: said[-1])
    return said


@pytest.mark.parametrize("single", [True, False], ids=["single", "installed"])
async def test_while_a_debugger_is_attached_nobody_is_answered(
    clock: TurnedClock, attached: list[bool], single: bool
) -> None:
    left: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for seconds in (0.6, 3600.0, 0.6):
            clock.turn(seconds)
            responder_of(scope).look()
            await anyio.wait_all_tasks_blocked()
            left.append(remaining())
        assert client.sent == []
        attached.append(False)
        clock.turn(remaining() - 0.01)
        responder_of(scope).look()
        await anyio.wait_all_tasks_blocked()
        assert client.sent == []
        clock.turn(0.02)
        responder_of(scope).look()
        await anyio.sleep_forever()

    client = Client()
    await client.drive(guarded(app, single=single, timeout=0.5))
    assert min(left) > 0
    assert client.status == 504


async def test_after_a_debuggers_prompt_there_is_time_again(
    clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one was there is told by how late the look is, and that only once."""
    monkeypatch.setattr(_responder, "is_debugged", lambda late: late > 1)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clock.turn(60)
        responder_of(scope).look()
        assert remaining() == pytest.approx(5)
        clock.turn(4)
        responder_of(scope).look()
        await answer_ok(scope, receive, send)

    client = Client()
    await client.drive(guarded(app, timeout=5))
    assert client.status == 200


async def test_while_a_debugger_is_attached_no_stalled_response_is_cut(
    clock: TurnedClock, attached: list[bool]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ANSWER[0])
        clock.turn(3600)
        responder_of(scope).look()
        await send({**ANSWER[1], "more_body": True})
        attached.append(False)
        clock.turn(0.6)
        responder_of(scope).look()
        await send(ANSWER[1])

    client = Client()
    await client.drive(guarded(app, timeout=0.5, idle_timeout=0.5))
    assert client.types == ["start", "body"]
    assert not client.complete.is_set()


async def test_while_a_debugger_is_attached_no_stalled_upload_is_refused(
    clock: TurnedClock, attached: list[bool]
) -> None:
    async def turn() -> None:
        clock.turn(3600)
        responder_of(client.scope).look()
        await anyio.wait_all_tasks_blocked()
        assert client.sent == []
        attached.append(False)

    async def stall() -> None:
        clock.turn(0.6)
        responder_of(client.scope).look()
        await anyio.sleep_forever()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass

    client = Client(turn, piece(b"x" * 5000), stall)
    await client.drive(guarded(app, timeout=30, body_timeout=0.5))
    assert client.status == 408


# -- one response ------------------------------------------------------------------------------------


class Moment:
    """Looks at the clocks at one moment of the many that a response has, while its handler waits.

    Args:
        clock: The clock, which has run out by then.
        at: Which moment.
        first: Whether the look comes before what the handler waits for, or right after it, when the handler
            has been woken and has not gone on yet.
        waits: Whether the handler gives the loop back at the other moments.
    """

    def __init__(self, clock: TurnedClock, at: int, first: bool, waits: bool) -> None:
        self._clock = clock
        self._left = at
        self._first = first
        self._waits = waits
        self.scope = http_scope()

    async def __call__(self, message: Message | None = None) -> None:
        self._left -= 1
        if self._left == -1:
            woken = anyio.Event()
            calls = [responder_of(self.scope).look, woken.set]

            def make_calls() -> None:
                self._clock.turn(0.6)
                for call in calls if self._first else reversed(calls):
                    call()

            running_loop().call_later(0, make_calls)
            await woken.wait()
        elif self._waits:
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("layers", [1, 2])
async def test_a_handler_that_answers_in_the_tick_of_its_deadline(clock: TurnedClock, layers: int) -> None:
    """Whatever comes first: there is one response, and it is all of one piece."""

    class Passes:
        """A middleware that takes its time."""

        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def pass_on(message: Message) -> None:
                await moment()
                await send(message)
                await moment()

            await self.app(scope, receive, pass_on)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in ANSWER:
            await moment()
            await send(message)
        await moment()

    middleware = TimeoutMiddleware(app, timeout=0.5, idle_timeout=30, status_code=503, log=False)
    if layers == 2:
        middleware.app = Passes(InnerLayer(app))
        middleware.has_inner_layer = True
    bodies = {200: b"ok", 503: None}
    seen: set[int] = set()
    yes_and_no = (True, False)
    for at, first, waits, _ in itertools.product(range(13), yes_and_no, yes_and_no, range(20)):
        moment = Moment(clock, at, first=first, waits=waits)
        client = Client(on_send=moment, scope=moment.scope)
        await client.drive(middleware)
        assert client.status in bodies
        assert bodies[client.status] in (client.body, None)
        seen.add(client.status)
        task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
        assert task is None or task.cancelling() == 0
    assert seen == {200, 503}


async def test_hints_are_no_response() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.early_hint", "links": [b"</style.css>"]})
        await anyio.sleep_forever()

    client = Client()
    await client.drive(guarded(app))
    assert client.types == ["early_hint", "start", "body"]
    assert client.sent[1]["status"] == 504


async def test_what_comes_after_the_response_has_all_the_time_it_wants(clock: TurnedClock) -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer_ok(scope, receive, send)
        clock.turn(0.6)
        responder_of(scope).look()
        await anyio.lowlevel.checkpoint()
        steps.append("in the background")

    client = Client()
    await client.drive(guarded(app, timeout=0.5, idle_timeout=0.5))
    assert client.status == 200
    assert steps == ["in the background"]


@pytest.mark.parametrize("kind", ["http.response.pathsend", "http.response.zerocopysend"])
async def test_a_file_that_the_server_sends_is_a_whole_response(clock: TurnedClock, kind: str) -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ANSWER[0])
        await send({"type": kind})
        clock.turn(0.6)
        responder_of(scope).look()
        await anyio.lowlevel.checkpoint()
        steps.append("in the background")

    client = Client()
    await client.drive(guarded(app, timeout=0.5, idle_timeout=0.5))
    assert client.types == ["start", kind.removeprefix("http.response.")]
    assert steps == ["in the background"]


@pytest.mark.parametrize(
    "messages",
    [
        (),
        ANSWER[:1],
        (*ANSWER, ANSWER[1]),
        (*ANSWER, *ANSWER),
        (ANSWER[1],),
        (ANSWER[1], ANSWER[0]),
        ({**ANSWER[0], "trailers": True}, ANSWER[1], {"type": "http.response.trailers", "headers": []}),
        ({"type": "http.response.debug", "info": {}}, *ANSWER),
    ],
)
async def test_what_an_application_sends_is_its_own_business(messages: tuple[Message, ...]) -> None:
    """No response, one too many or half of one: it is the server that says so."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    bare, client = Client(), Client()
    await bare.drive(app)
    await client.drive(guarded(app))
    assert client.sent == bare.sent


async def test_what_the_server_raises_reaches_the_application() -> None:
    caught: list[BaseException] = []

    async def gone(message: Message) -> None:
        raise OSError("gone")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in ANSWER:
            try:
                await send(message)
            except OSError as error:
                caught.append(error)

    await Client(on_send=gone).drive(guarded(app))
    assert list(map(repr, caught)) == ["OSError('gone')"] * 2


# -- the report --------------------------------------------------------------------------------------


async def test_the_report_names_the_line_and_what_became_of_it(marked: Callable[[str], int]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()  # waits

    reports = Reports()
    client = Client(scope=http_scope("/report"))
    await client.drive(guarded(app, on_timeout=reports))
    report = await reports.first()
    assert (report.request, report.path, report.clock) == ("GET /report", "/report", "response")
    assert (report.limit, report.outcome, report.loop_time) == (SOON, "stopped", None)
    assert report.line is not None
    assert report.line.line == marked("waits")


async def test_blocking_detection_further_in_hides_neither_the_line_nor_the_loop_time(
    marked: Callable[[str], int],
) -> None:
    """It drives the application by hand: nothing leads from the outer coroutine to the inner one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()  # is driven

    reports = Reports()
    blocking = BlockingMiddleware(app, threshold=1000, log=False)
    client = Client()
    await client.drive(guarded(blocking, on_timeout=reports))
    report = await reports.first()
    assert client.status == 504
    assert report.line is not None
    assert report.line.line == marked("is driven")
    assert report.loop_time is not None
    await blocking.monitor.stop()


async def test_each_request_is_reported_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports()
    client = Client()
    await client.drive(installed(sleeping_endpoint, on_timeout=reports, log=True))
    report = await reports.first()
    await anyio.wait_all_tasks_blocked()
    assert len(reports) == 1
    assert [record.getMessage() for record in caplog.records] == [str(report)]
