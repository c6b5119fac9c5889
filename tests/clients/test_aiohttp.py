"""Sessions of aiohttp in requests that have a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from asyncguard.clients._fittings import fit
from tests.clients.peer import peer
from tests.clients.requests_in_flight import request_with

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend",
        [
            pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
            pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        ],
    ),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with peer() as url:
        yield url


@pytest.fixture
async def session(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        fit(session, "upstream")
        fit(session, "upstream")
        yield session


async def text(session: aiohttp.ClientSession, path: str, **options: Any) -> str:
    async with session.get(path, **options) as response:
        return await response.text()


@pytest.mark.parametrize("path", ["/silent", "/drip/head", "/drip/body", "/redirect/silent"])
async def test_it_gives_up_when_the_request_has_no_time_left(
    path: str, session: aiohttp.ClientSession
) -> None:
    began = time.perf_counter()
    with request_with(0.2):
        with pytest.raises(TimeoutError, match="no time left"):
            await text(session, path)
        assert 0.19 <= time.perf_counter() - began < 5
        await asyncio.sleep(0.01)  # uvloop's timers may be a millisecond early
        with pytest.raises(TimeoutError, match="nothing was sent"):
            await text(session, "/")
    assert await text(session, "/")


async def test_its_own_limit_counts_where_it_is_shorter(session: aiohttp.ClientSession) -> None:
    with request_with(60):
        for path in ("/silent", "/drip/body"):
            with pytest.raises(TimeoutError) as caught:
                await text(session, path, timeout=aiohttp.ClientTimeout(total=0.1))
            assert "no time left" not in str(caught.value)


async def test_a_body_that_was_begun_in_time_is_not_read_later(session: aiohttp.ClientSession) -> None:
    with request_with(0.15):
        async with session.get("/drip/body") as response:
            time.sleep(0.15)
            with pytest.raises(TimeoutError, match="no time left"):
                await response.read()


async def test_a_stream_goes_on_once_the_deadline_counts_no_more(session: aiohttp.ClientSession) -> None:
    with request_with(0.15) as record:
        async with session.get("/drip/body/15") as response:
            await response.content.readany()
            record.deadline = None
            await response.read()
            assert response.content.at_eof()


async def test_a_cancelled_task_is_cancelled(session: aiohttp.ClientSession) -> None:
    for path in ("/silent", "/drip/body"):
        with request_with(20):
            task = asyncio.create_task(text(session, path))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


@pytest.mark.parametrize(
    ("headers", "sent", "others"),
    [
        (None, True, 0),
        ({"a": "b"}, True, 1),
        ([("a", "b"), ("a", "c")], True, 2),
        ({"x-wait": "7"}, False, 0),
        ([("X-Wait", "7")], False, 0),
    ],
)
async def test_the_rest_is_sent_onward(
    headers: Any, sent: bool, others: int, session: aiohttp.ClientSession
) -> None:
    with request_with(20, header="X-Wait"):
        lines = (await text(session, "/", headers=headers)).splitlines()
    (rest,) = (float(line[7:]) for line in lines if line.lower().startswith("x-wait:"))
    assert (19 < rest <= 20) if sent else rest == 7
    assert sum(line.startswith("a: ") for line in lines) == others


async def test_a_header_of_the_session_is_sent_as_it_is(url: str) -> None:
    async with aiohttp.ClientSession(url, headers={"X-Wait": "7"}) as session:
        fit(session, "upstream")
        with request_with(20, header="x-wait"):
            assert (await text(session, "/")).lower().count("x-wait: 7") == 1


async def test_nothing_is_sent_onward_without_a_name_for_it(session: aiohttp.ClientSession) -> None:
    with request_with(20):
        assert "wait" not in (await text(session, "/")).lower()


async def test_a_class_of_sessions_keeps_its_own_way(url: str) -> None:
    with pytest.warns(DeprecationWarning, match="Inheritance"):

        class Session(aiohttp.ClientSession):
            async def _request(self, *args: Any, **options: Any) -> Any:
                options["headers"] = {"x-own": "yes"}
                return await super()._request(*args, **options)

    async with Session(url) as session:
        fit(session, "upstream")
        assert "x-own: yes" in await text(session, "/")
