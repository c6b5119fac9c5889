"""An application runs in a test as under a server: with its lifespan, and nothing leaks between requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import anyio
import httpx
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from asyncguard import testing
from asyncguard._tasks import current_loop
from asyncguard.testing import _lifespan

PATIENCE = 30.0

user: ContextVar[str] = ContextVar("user", default="nobody")


class Shop:
    """An application that tells what it has seen."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.loop: object = None
        self.asked: anyio.Event | None = None
        self.app = Starlette(
            routes=[
                Route("/", self.seen),
                Route("/stream", self.stream),
                Route("/hang", self.hang),
                Route("/fail", self.fail),
                WebSocketRoute("/ws", self.echo),
            ],
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[dict[str, object]]:
        self.events.append("open")
        self.loop = current_loop()
        yield {"stock": 7}
        self.events.append("close")

    async def seen(self, request: Request) -> Response:
        before = [getattr(request.state, "user", "nobody"), user.get()]
        request.state.user = "somebody"
        user.set("somebody")
        here = current_loop() is self.loop
        return JSONResponse({"stock": request.state.stock, "before": before, "at home": here})

    async def stream(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[str]:
            for number in range(3):
                yield str(number)

        return StreamingResponse(pieces())

    async def hang(self, request: Request) -> Response:
        self.events.append("hang")
        try:
            await anyio.sleep_forever()
        finally:
            self.events.append("left")
        raise AssertionError

    async def fail(self, request: Request) -> Response:
        raise LookupError("mine")

    async def echo(self, websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(f"{text} {websocket.state.stock}")


SEEN = {"stock": 7, "before": ["nobody", "nobody"], "at home": True}


def client_of(served: testing.ServedApp, library: Any = httpx2) -> Any:
    return library.AsyncClient(transport=library.ASGITransport(served), base_url="http://shop")


@pytest.fixture
def shop() -> Shop:
    return Shop()


class TestAsync:
    pytestmark = pytest.mark.anyio

    @pytest.mark.parametrize("library", [httpx, httpx2])
    async def test_requests_find_the_state_and_nothing_of_each_other(self, shop: Shop, library: Any) -> None:
        async with testing.running(shop.app) as served:
            assert shop.events == ["open"]
            assert served.state == {"stock": 7}
            async with client_of(served, library) as client:
                for _ in range(2):
                    assert (await client.get("/")).json() == SEEN
                assert (await client.get("/stream")).text == "012"
                with pytest.raises(LookupError, match="mine"):
                    await client.get("/fail")
        assert user.get() == "nobody"
        assert shop.events == ["open", "close"]
        with pytest.raises(RuntimeError, match="has ended"):
            await client_of(served).get("/")

    async def test_a_test_passes_its_context_on(self, shop: Shop) -> None:
        async with testing.running(shop.app) as served, client_of(served) as client:
            user.set("the test")
            assert (await client.get("/")).json()["before"] == ["nobody", "the test"]

    async def test_twice_one_after_the_other(self, shop: Shop) -> None:
        block = testing.running(shop.app)
        for _ in range(2):
            async with block as served, client_of(served) as client:
                assert (await client.get("/")).json() == SEEN
        assert shop.events == ["open", "close"] * 2

    async def test_opened_in_one_task_and_closed_in_another(self, shop: Shop) -> None:
        """As the fixtures of some plugins are; with a cancel scope inside."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                shop.events.append("open")
                yield
                tasks.cancel_scope.cancel()
            shop.events.append("close")

        block = testing.running(Starlette(lifespan=lifespan))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block.__aenter__)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block.__aexit__, None, None, None)
        assert shop.events == ["open", "close"]

    async def test_a_client_that_gives_up_cancels_its_request(self, shop: Shop) -> None:
        async with testing.running(shop.app) as served, client_of(served) as client:
            with anyio.move_on_after(0.05):
                await client.get("/hang")
            assert shop.events[1:] == ["hang", "left"]

    async def test_another_loop_is_refused(self, shop: Shop) -> None:
        async with testing.running(shop.app) as served:
            with pytest.raises(RuntimeError, match=r"another event loop: use `with running\(app\)`"):
                await anyio.to_thread.run_sync(lambda: TestClient(served).get("/"))

    async def test_what_a_failed_start_raises(self) -> None:
        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            raise LookupError("mine")
            yield

        with pytest.raises(LookupError, match="mine"):
            async with testing.running(Starlette(lifespan=lifespan)):
                pytest.fail("it has not started")

    async def test_what_a_failed_end_raises(self) -> None:
        with pytest.raises(LookupError, match="mine"):
            async with testing.running(Starlette(lifespan=failing_at_the_end)):
                pass

    async def test_a_failed_test_comes_before_a_failed_end(self) -> None:
        with pytest.raises(KeyError, match="the test") as caught:
            async with testing.running(Starlette(lifespan=failing_at_the_end)):
                raise KeyError("the test")
        assert caught.value.__notes__ == ["Then the application did not end well: LookupError('mine')"]

    async def test_what_fails_in_between_is_raised_in_the_end(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "lifespan.startup.complete"})
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            async with testing.running(app):
                await anyio.lowlevel.checkpoint()

    async def test_an_outcome_of_pytest_is_one(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            pytest.fail("in the lifespan")

        with pytest.raises(pytest.fail.Exception, match="in the lifespan"):
            async with testing.running(app):
                pass

    @pytest.mark.parametrize("phase", ["startup", "shutdown"])
    async def test_failure_without_an_exception(self, phase: str) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            while (message := await receive())["type"] != f"lifespan.{phase}":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": f"lifespan.{phase}.failed", "message": "no stock"})

        with pytest.raises(RuntimeError, match="no stock"):
            async with testing.running(app):
                assert phase == "shutdown"

    async def test_an_application_that_knows_no_lifespan(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            pass

        with pytest.raises(RuntimeError, match="ended its lifespan before it had started"):
            async with testing.running(app):
                pass

    async def test_a_start_that_hangs(self, marked: Callable[[str], int]) -> None:
        left: list[str] = []

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            try:
                await anyio.sleep_forever()  # hangs
            finally:
                left.append("left")
            yield

        with pytest.raises(TimeoutError) as caught:
            async with testing.running(Starlette(lifespan=lifespan), start_timeout=0.05):
                pass
        assert "the startup of <starlette.applications.Starlette" in str(caught.value)
        assert "took longer than 0.05 s; it is at " in str(caught.value)
        assert f"test_running.py:{marked('hangs')} in " in str(caught.value)
        assert left == ["left"]

    async def test_an_end_that_hangs_whatever_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_lifespan, "_GRACE", 0.05)
        release = anyio.Event()
        ended = anyio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            with anyio.CancelScope(shield=True):
                while not release.is_set():
                    try:
                        await release.wait()
                    except anyio.get_cancelled_exc_class():
                        pass
            ended.set()

        with pytest.raises(TimeoutError, match=r"took longer than 0.05 s.*does not heed its cancellation"):
            async with testing.running(app, close_timeout=0.05):
                pass
        release.set()
        with anyio.fail_after(PATIENCE):
            await ended.wait()

    async def test_a_start_that_is_cancelled(self) -> None:
        events: list[str] = []

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            try:
                await anyio.sleep_forever()
            finally:
                events.append("left")
            yield

        with anyio.move_on_after(0.05) as scope:
            async with testing.running(Starlette(lifespan=lifespan)):
                pass
        assert scope.cancelled_caught
        assert events == ["left"]

    async def test_a_cancelled_test_ends_the_application(self, shop: Shop) -> None:
        with anyio.CancelScope() as scope:
            async with testing.running(shop.app):
                scope.cancel()
                await anyio.sleep_forever()
        assert shop.events == ["open", "close"]


@asynccontextmanager
async def failing_at_the_end(app: Starlette) -> AsyncIterator[None]:
    yield
    raise LookupError("mine")


class TestInAThread:
    def test_clients_share_one_run(self, shop: Shop) -> None:
        with testing.running(shop.app) as served:
            assert TestClient(served).get("/").json() == SEEN
            with TestClient(served) as client:  # whose lifespan it does not run again
                assert client.get("/").json() == SEEN
                assert client.get("/stream").text == "012"
                with client.websocket_connect("/ws") as socket:
                    socket.send_text("in stock:")
                    assert socket.receive_text() == "in stock: 7"
                with pytest.raises(LookupError, match="mine"):
                    client.get("/fail")
            assert shop.events == ["open"]
        assert shop.events == ["open", "close"]

    @pytest.mark.parametrize("library", [httpx, httpx2])
    def test_from_loop_after_loop(self, shop: Shop, library: Any) -> None:
        async def ask() -> None:
            async with client_of(served, library) as client:
                assert (await client.get("/")).json() == SEEN
                assert (await client.get("/stream")).text == "012"

        with testing.running(shop.app) as served:
            for backend in ("asyncio", "trio", "asyncio"):
                anyio.run(ask, backend=backend)

    @pytest.mark.anyio
    async def test_many_at_a_time(self, shop: Shop) -> None:
        answers: list[object] = []

        async def ask(client: Any) -> None:
            answers.append((await client.get("/")).json())

        with testing.running(shop.app) as served:
            async with client_of(served) as client, anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(ask, client)
        assert answers == [SEEN] * 100

    @pytest.mark.anyio
    async def test_a_client_that_gives_up_cancels_its_request(self, shop: Shop) -> None:
        with testing.running(shop.app) as served:
            async with client_of(served) as client:
                with anyio.move_on_after(0.1):
                    await client.get("/hang")
                assert shop.events[1:] == ["hang", "left"]
                assert (await client.get("/")).json() == SEEN

    @pytest.mark.anyio
    async def test_an_application_that_stops_listening(self) -> None:
        """What it has begun to receive is cancelled at the client, without a trace."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            if scope["type"] == "lifespan":
                await send({"type": "lifespan.startup.complete"})
                await receive()
                return
            with anyio.move_on_after(0.05):
                await receive()
            await Response("ok")(scope, receive, send)

        with testing.running(app) as served:
            async with client_of(served) as client:
                with anyio.fail_after(PATIENCE):
                    assert (await client.get("/")).text == "ok"

    @pytest.mark.asyncio
    async def test_what_outlives_its_request_cannot_reach_the_client(self) -> None:
        later: list[Awaitable[object]] = []
        told = threading.Event()

        async def too_late(receive: Receive) -> None:
            await asyncio.sleep(0.05)
            with pytest.raises(RuntimeError, match="the other side of this request has gone"):
                await receive()
            told.set()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            if scope["type"] == "lifespan":
                await send({"type": "lifespan.startup.complete"})
                await receive()
                return
            later.append(asyncio.create_task(too_late(receive)))
            await Response("ok")(scope, receive, send)

        with testing.running(app) as served:
            async with client_of(served) as client:
                assert (await client.get("/")).text == "ok"
            assert await asyncio.to_thread(told.wait, PATIENCE)

    def test_a_failed_start_and_a_failed_end(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"), testing.running(app):
            pytest.fail("it has not started")
        with (
            pytest.raises(LookupError, match="mine"),
            testing.running(Starlette(lifespan=failing_at_the_end)),
        ):
            pass
        with pytest.raises(KeyError, match="the test") as caught:
            with testing.running(Starlette(lifespan=failing_at_the_end)):
                raise KeyError("the test")
        assert caught.value.__notes__ == ["Then the application did not end well: LookupError('mine')"]


def test_options_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match=r"running\(\) takes an ASGI application, not None"):
        testing.running(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_timeout must be"):
        testing.running(Starlette(), start_timeout=0)
    with pytest.raises(ValueError, match="close_timeout must be"):
        testing.running(Starlette(), close_timeout=-1)


@pytest.mark.anyio
async def test_no_limit(shop: Shop) -> None:
    async with testing.running(shop.app, start_timeout=None, close_timeout=None):
        assert shop.events == ["open"]
