"""Clients of httpx and httpx2 in requests that have a deadline."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

import anyio
import anyio.to_thread
import httpx
import httpx2
import pytest
from starlette.types import Receive, Scope, Send

from asyncguard._request import current_request, remaining
from asyncguard.clients._fittings import fit
from asyncguard.clients._leaks import LeakGuard
from tests.asgi_driver import Client, guarded, http_scope
from tests.clients.peer import peer
from tests.clients.requests_in_flight import request_with

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("library", [pytest.param(httpx, id="httpx"), pytest.param(httpx2, id="httpx2")]),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with peer() as url:
        yield url


@pytest.fixture
async def client(library: ModuleType, url: str) -> AsyncIterator[Any]:
    async with library.AsyncClient(base_url=url, verify=False, timeout=20, follow_redirects=True) as client:
        fit(client, "upstream")
        yield client


# -- the deadline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/silent", "/drip/head", "/drip/body", "/redirect/silent"])
async def test_it_gives_up_when_the_request_has_no_time_left(
    path: str, client: Any, library: ModuleType
) -> None:
    began = time.perf_counter()
    with request_with(0.2):
        with pytest.raises(library.ReadTimeout, match="no time left") as caught:
            await client.get(path)
    assert 0.19 <= time.perf_counter() - began < 5
    assert caught.value.request.url.host == "127.0.0.1"
    assert (await client.get("/")).status_code == 200


async def test_its_own_limit_counts_where_it_is_shorter(client: Any, library: ModuleType) -> None:
    with request_with(60):
        with pytest.raises(library.ReadTimeout) as caught:
            await client.get("/silent", timeout=0.05)
    assert "no time left" not in str(caught.value)


async def test_the_exception_says_what_it_was_waiting_for(library: ModuleType, url: str) -> None:
    limits = library.Limits(max_connections=1)
    async with library.AsyncClient(base_url=url, verify=False, limits=limits) as client:
        fit(client, "upstream")
        async with client.stream("GET", "/drip/body"):
            with request_with(0.1), pytest.raises(library.PoolTimeout, match="no time left"):
                await client.get("/")
        # Nobody accepts connections at this address, nor refuses them.
        with request_with(0.1), pytest.raises((library.ConnectTimeout, library.ConnectError)):
            await client.get("http://192.0.2.1/")


async def test_nothing_is_sent_when_no_time_is_left(client: Any, library: ModuleType) -> None:
    with request_with(-1), pytest.raises(library.PoolTimeout, match="nothing was sent"):
        await client.get("/")
    assert not client._transport._pool.connections


async def test_a_request_that_has_ended_leaves_its_calls_alone(client: Any) -> None:
    async def call() -> None:
        responses.append(await client.get("/drip/body/20"))

    responses: list[Any] = []
    async with anyio.create_task_group() as tasks:
        with request_with(0.2) as record:
            tasks.start_soon(call)
            await anyio.sleep(0.05)
            record.finish()
    assert len(responses[0].content) == 20


async def test_a_stream_goes_on_once_the_deadline_counts_no_more(client: Any) -> None:
    with request_with(0.15) as record:
        async with client.stream("GET", "/drip/body/15") as response:
            pieces = 0
            async for piece in response.aiter_raw():
                pieces += len(piece)
                record.deadline = None
        assert pieces == 15


async def test_nothing_stays_behind_in_the_request(client: Any) -> None:
    with request_with(20) as record:
        await client.get("/")
        assert not record.at_end


# -- what is sent onward -----------------------------------------------------------------------------


async def test_the_rest_is_sent_onward(client: Any) -> None:
    with request_with(20, header="X-Wait"):
        before = remaining()
        response = await client.get("/")
        after = remaining()
    (line,) = (line for line in response.text.splitlines() if line.lower().startswith("x-wait:"))
    assert after - 0.001 <= float(line.partition(":")[2]) <= before
    assert "x-wait" not in response.request.headers


@pytest.mark.parametrize(("seconds", "header"), [(20, None), (math.inf, "X-Wait")])
async def test_nothing_is_sent_onward(seconds: float, header: str | None, client: Any) -> None:
    with request_with(seconds, header):
        response = await client.get("/")
    assert "wait" not in response.text.lower()


async def test_a_header_that_was_set_is_sent_as_it_is(client: Any) -> None:
    with request_with(20, header="X-Wait"):
        response = await client.get("/", headers={"x-wait": "7"})
    assert [line for line in response.text.splitlines() if "wait" in line.lower()] == ["x-wait: 7"]


async def test_each_attempt_is_told_what_is_left_by_then(client: Any) -> None:
    request = client.build_request("GET", "/redirect")
    with request_with(20, header="X-Wait"):
        response = await client.send(request)
        assert response.history
        assert response.text.lower().count("x-wait") == 1
    # The same request again, later, with all the time in the world.
    response = await client.send(request)
    assert "x-wait" not in response.text.lower()


async def test_a_body_is_sent_whole(client: Any) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        yield b"2"

    with request_with(20):
        assert (await client.post("/", content=b"12")).text.endswith("\r\n\r\n12")
        assert (await client.post("/", content=body())).text.endswith("1\r\n1\r\n1\r\n2\r\n0\r\n\r\n")


async def test_services_tell_each_other(client: Any, library: ModuleType) -> None:
    """As under `install(app, timeout=30, deadline_header="x-wait")`, called by somebody in a hurry."""
    answers: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answers.append((await client.get("/")).text)
        with pytest.raises((library.ReadTimeout, anyio.get_cancelled_exc_class())) as caught:
            await client.get("/silent")
        answers.append(caught.typename)
        if not caught.errisinstance(library.ReadTimeout):
            raise caught.value

    caller = Client(scope=http_scope(headers=[(b"x-wait", b"0.3")]))
    await caller.drive(guarded(app, timeout=30, deadline_header="x-wait"))
    assert caller.status == 504
    assert float(answers[0].partition("x-wait: ")[2].split()[0]) <= 0.3
    assert len(answers) == 2


# -- whatever transport it has -----------------------------------------------------------------------


async def test_all_transports_of_a_client_are_fitted(library: ModuleType) -> None:
    inner = library.AsyncHTTPTransport(verify=False)
    outer = library.AsyncHTTPTransport(verify=False)
    mounts = {"http://inner.test": inner, "http://none.test": None}
    async with library.AsyncClient(transport=outer, mounts=mounts) as client:
        fit(client, "upstream")
        fit(client, "upstream")
        assert isinstance(inner._pool.handle_async_request, LeakGuard)
        assert isinstance(outer._pool.handle_async_request, LeakGuard)
        assert client._transport._transport is outer
        assert [each and each._transport for each in client._mounts.values()] == [inner, None]
        assert copy.copy(client._transport)._pool is outer._pool


async def test_the_pool_in_a_wrapped_transport_is_found(library: ModuleType) -> None:
    class Retrying(library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.wrapped = library.AsyncHTTPTransport(verify=False)

        async def handle_async_request(self, request: Any) -> Any:
            return await self.wrapped.handle_async_request(request)

        async def aclose(self) -> None:
            await self.wrapped.aclose()

    transport = Retrying()
    async with library.AsyncClient(transport=transport) as client:
        fit(client, "upstream")
        assert isinstance(transport.wrapped._pool.handle_async_request, LeakGuard)


@pytest.mark.parametrize("phase", ["Pool", "Connect", "Write", "Read"])
async def test_a_transport_may_look_up_its_limits(phase: str, library: ModuleType) -> None:
    async def answer(request: Any) -> Any:
        assert request.extensions["timeout"][phase.lower()] == 20
        await anyio.sleep(20)

    async with library.AsyncClient(transport=library.MockTransport(answer), timeout=20) as client:
        fit(client, "upstream")
        late: type[Exception] = getattr(library, f"{phase}Timeout")
        with request_with(0.05), pytest.raises(late, match="no time left"):
            await client.get("http://upstream.test/")


async def test_transports_are_closed(library: ModuleType) -> None:
    closed: list[str] = []

    class Closing(library.MockTransport):  # type: ignore[misc, name-defined]
        async def aclose(self) -> None:
            closed.append("async")

        def close(self) -> None:
            closed.append("sync")

    client = library.AsyncClient(transport=Closing(lambda _: None))
    fit(client, "upstream")
    await client.aclose()
    blocking = library.Client(transport=Closing(lambda _: None))
    fit(blocking, "upstream")
    blocking.close()
    assert closed == ["async", "sync"]


async def test_a_transport_that_is_no_network(library: ModuleType) -> None:
    def answer(request: Any) -> Any:
        return library.Response(200, json=dict(request.headers))

    async with library.AsyncClient(transport=library.MockTransport(answer)) as client:
        fit(client, "upstream")
        with request_with(20, header="x-wait"):
            response = await client.post("http://upstream.test/", json={})
    assert float(response.json()["x-wait"]) <= 20
    assert current_request.get() is None


# -- in a worker thread ------------------------------------------------------------------------------


@pytest.fixture
def blocking(library: ModuleType, url: str) -> Iterator[Any]:
    with library.Client(base_url=url, verify=False, timeout=20) as client:
        fit(client, "upstream")
        fit(client, "upstream")
        yield client


async def test_a_blocking_client_gives_up_too(blocking: Any, library: ModuleType) -> None:
    began = time.perf_counter()
    with request_with(0.2, header="x-wait"):
        response = await anyio.to_thread.run_sync(blocking.get, "/")
        with pytest.raises(library.ReadTimeout):
            await anyio.to_thread.run_sync(blocking.get, "/silent")
        with pytest.raises(library.PoolTimeout, match="nothing was sent"):
            await anyio.to_thread.run_sync(blocking.get, "/")
    assert 0.19 <= time.perf_counter() - began < 5
    assert response.text.count("x-wait: 0.") == 1
    assert blocking.get("/").status_code == 200
    assert blocking.get("/", timeout=None).status_code == 200
