"""What becomes of the code that still runs at a deadline, and of what it raises."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import abandoned
from asyncguard.timeouts import _limit
from asyncguard.timeouts._asyncio import AsyncioLoop
from tests.asgi_driver import (
    SOON,
    Client,
    Reports,
    answer_ok,
    guarded,
    http_scope,
    installed,
    sleep,
)

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)
layers = pytest.mark.parametrize("single", [True, False], ids=["single layer", "install"])


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_limit, "shortest", math.inf)
    yield
    assert abandoned() == 0


class Marker(Exception):
    pass


class Stop(BaseException):
    pass


# -- cancelling, and cleaning up ---------------------------------------------------------------------


@on_asyncio
@layers
async def test_it_is_cancelled_once_so_that_it_can_clean_up(single: bool) -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            for _ in range(3):
                await anyio.sleep(0.01)
            steps.append("cleaned up")
            raise

    client = Client()
    await client.drive(guarded(app, single=single))
    assert client.status == 504
    assert steps == ["cleaned up"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@on_asyncio
async def test_who_swallows_it_and_goes_on_is_cancelled_again_after_grace() -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                steps.append("cancelled")

    reports = Reports()
    client = Client()
    await client.drive(guarded(app, grace=SOON, on_timeout=reports))
    assert client.status == 504
    assert steps == ["cancelled", "cancelled"]
    assert (await reports.first()).outcome == "running"


@on_asyncio
@layers
async def test_it_is_cancelled_again_when_grace_is_over_and_not_before(
    single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    over: list[Callable[[], None]] = []
    call_later = AsyncioLoop.call_later

    def call_by_hand(loop: AsyncioLoop, delay: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        if delay == 30:
            over.append(call)
        return call_later(loop, delay, call)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            steps.append("cancelled once")
            (call,) = over
            call()
            try:
                await anyio.sleep_forever()
            finally:
                steps.append("cancelled again")

    monkeypatch.setattr(AsyncioLoop, "call_later", call_by_hand)
    client = Client()
    await client.drive(guarded(app, single=single, grace=30))
    assert client.status == 504
    assert steps == ["cancelled once", "cancelled again"]


@on_asyncio
async def test_cleanup_that_is_stuck_in_a_shield_is_reported_and_cancelled_once_that_ends() -> None:
    steps: list[str] = []
    reports = Reports()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                report = await reports.first()  # comes after grace: the shield is still there
                steps.append(report.outcome)
                assert abandoned() == 1
            steps.append("shield ended")
            await anyio.sleep_forever()

    client = Client()
    await client.drive(guarded(app, grace=SOON, on_timeout=reports))
    assert client.status == 504
    assert steps == ["shielded", "shield ended"]
    assert len(reports) == 1


@layers
async def test_a_shielded_section_ends_in_peace_and_what_follows_is_cancelled(single: bool) -> None:
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope(shield=True):
            await client.complete.wait()
            await anyio.lowlevel.checkpoint()
            steps.append("shield ended")
        await anyio.sleep_forever()

    client = Client()
    await client.drive(guarded(app, single=single))
    assert client.status == 504
    assert steps == ["shield ended"]


@layers
async def test_a_shield_further_out_is_none_of_the_handlers(single: bool) -> None:
    """An outer middleware of the same task shields everything: what is inside is still stopped."""
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep(5)  # nobody else could end it
        except anyio.get_cancelled_exc_class():
            steps.append("cancelled")
            raise

    client = Client()
    await client.drive(Shields(guarded(app, single=single)))
    assert client.status == 504
    assert steps == ["cancelled"]


class Shields:
    """A middleware in which nothing is to be cancelled, as one may think."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope(shield=True):
            await self.app(scope, receive, send)


async def test_a_shield_in_one_of_its_middlewares_is_none_either() -> None:
    steps: list[str] = []

    async def endpoint(request: Request) -> Response:
        try:
            await anyio.sleep(5)
        except anyio.get_cancelled_exc_class():
            steps.append("cancelled")
            raise
        raise AssertionError

    client = Client()
    await client.drive(installed(endpoint, Shields))
    assert client.status == 504
    assert steps == ["cancelled"]


class HoldsBack:
    """A middleware that keeps the head of a response until some of the body comes, as GZip does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)
            if message.get("body"):
                for each in held:
                    await send(each)
                held.clear()

        await self.app(scope, receive, hold)


class Dawdles(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        await request.scope["cleaned up"].wait()
        return response


@on_asyncio
@pytest.mark.parametrize("middleware", [HoldsBack, Dawdles])
async def test_cleanup_that_awaits_under_a_middleware_that_holds_the_head_back(middleware: Any) -> None:
    """The response has begun where the handler stands, but not for the client, who gets the plain answer."""
    steps: list[str] = []
    ended = asyncio.Event()

    async def endpoint(request: Request) -> Response:
        async def content() -> Any:
            try:
                yield b""
                await anyio.sleep_forever()
            finally:
                try:
                    for _ in range(5):
                        await asyncio.sleep(0)
                    steps.append("cleaned up")
                finally:
                    ended.set()

        return StreamingResponse(content())

    asgi = {
        "version": "3.0",
        "spec_version": "2.4",
    }  # before, Starlette sends in a task that it cancels itself
    client = Client(scope={**http_scope(), "asgi": asgi, "cleaned up": ended})
    await client.drive(installed(endpoint, middleware, timeout=0.5, timeout_grace=30))
    assert client.status == 504
    assert b"The service did not answer in time." in client.body
    assert steps == ["cleaned up"]


# -- what is raised ----------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize(
    "error",
    [
        Marker("mine"),
        TimeoutError("mine"),
        ExceptionGroup("mine", [Marker("a"), TimeoutError("b")]),
        Stop("mine"),
        BaseExceptionGroup("mine", [Stop("a"), Marker("b")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_the_applications_exceptions_pass_through(error: BaseException, single: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    with pytest.raises(type(error)) as caught:
        await guarded(app, single=single, timeout=30)(http_scope(), Client().receive, Client().send)
    assert caught.value is error
    assert error.__context__ is None


@pytest.mark.parametrize(
    "error",
    [
        Marker("mine"),
        ExceptionGroup("mine", [Marker("a"), TimeoutError("b")]),
        Stop("mine"),
    ],
    ids=lambda error: type(error).__name__,
)
@layers
async def test_so_do_those_of_its_cleanup(error: BaseException, single: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise error

    client = Client()
    with pytest.raises(type(error)) as caught:
        await guarded(app, single=single)(client.scope, client.receive, client.send)
    if isinstance(error, ExceptionGroup):  # trio makes another one, without its own exceptions
        assert isinstance(caught.value, ExceptionGroup)
        assert caught.value.exceptions == error.exceptions
    else:
        assert caught.value is error
    assert client.status == 504


@on_asyncio
@layers
@pytest.mark.parametrize("when", ["before", "while it cleans up"])
async def test_a_foreign_cancellation_passes_through(single: bool, when: str) -> None:
    reached = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if when == "before":
            reached.set()
        try:
            await anyio.sleep_forever()
        finally:
            reached.set()
            if when != "before":
                await anyio.sleep_forever()

    client = Client()
    limit = 30 if when == "before" else SOON
    middleware = guarded(app, single=single, timeout=limit, grace=30)

    async def drive() -> None:
        try:
            await middleware(client.scope, client.receive, client.send)
        finally:
            task = asyncio.current_task()
            assert task is not None
            cancelling.append(task.cancelling())

    cancelling: list[int] = []
    task = asyncio.create_task(drive())
    await reached.wait()
    if when != "before":
        await client.complete.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelling == [1]
    assert client.types == ([] if when == "before" else ["start", "body"])


@on_asyncio
async def test_the_applications_own_limits_keep_their_meaning() -> None:
    """Both are cancelled in the end: the inner one by its own scope, which tells it from the outer one."""
    steps: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(30):
                async with asyncio.TaskGroup() as group:
                    group.create_task(anyio.sleep_forever())
                    with anyio.move_on_after(30):
                        await anyio.sleep_forever()
                    steps.append("moved on")
        except TimeoutError:
            steps.append("timed out")

    client = Client()
    await client.drive(guarded(app))
    assert client.status == 504
    assert steps == []
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_an_outside_cancellation_leaves_no_task_that_sends() -> None:
    begun, release = anyio.Event(), anyio.Event()
    steps: list[str] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        try:
            await release.wait()
        except anyio.get_cancelled_exc_class():
            steps.append("cancelled")
            raise
        await answer_ok(scope, receive, send)

    client = Client()
    async with anyio.create_task_group() as group:
        group.start_soon(client.drive, guarded(sleep, answer=answer))
        await begun.wait()
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    release.set()
    await anyio.wait_all_tasks_blocked()
    assert client.sent == []
    assert steps == ["cancelled"]
