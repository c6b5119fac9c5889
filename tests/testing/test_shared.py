"""Shared clients in an application that a test runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
import httpx2
import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

import asyncguard
from asyncguard import SharedNotOpen, SharedStartFailed, shared, testing
from asyncguard._tasks import current_loop

opened: list[str] = []


async def open_stock() -> AsyncIterator[dict[str, Any]]:
    opened.append("open")
    yield {"apples": 7, "loop": current_loop()}
    opened.append("close")


stock = shared(open_stock)
app = FastAPI()
asyncguard.install(app, block_threshold=None, shared=[stock])


@app.get("/{article}")
async def count(article: str, live: Annotated[dict[str, Any], Depends(stock)]) -> Any:
    assert live.get("loop") in (current_loop(), None)
    return live[article]


@app.get("/in/a/thread/{article}")
def count_in_a_thread(article: str, live: Annotated[dict[str, Any], Depends(stock)]) -> Any:
    assert stock.get() is live
    return live[article]


@pytest.fixture(autouse=True)
def nothing_opened() -> None:
    opened.clear()


async def ask(served: testing.ServedApp, path: str = "/apples") -> Any:
    transport = httpx2.ASGITransport(served)
    async with httpx2.AsyncClient(transport=transport, base_url="http://shop") as client:
        return (await client.get(path)).json()


@pytest.mark.anyio
async def test_they_are_open_meanwhile() -> None:
    async with testing.running(app) as served:
        assert await ask(served) == 7
        assert await ask(served, "/in/a/thread/apples") == 7
        assert stock.get()["apples"] == 7  # in the test itself, too
        assert opened == ["open"]
    assert opened == ["open", "close"]


def test_from_loop_after_loop() -> None:
    with testing.running(app) as served:
        for backend in ("asyncio", "trio"):
            assert anyio.run(ask, served, backend=backend) == 7
        assert TestClient(served).get("/in/a/thread/apples").json() == 7
        assert opened == ["open"]
    assert opened == ["open", "close"]


@pytest.mark.anyio
async def test_what_is_overridden_is_not_opened() -> None:
    with stock.override({"apples": 1}):
        async with testing.running(app) as served:
            assert await ask(served) == 1
            with stock.override({"apples": 2}):
                assert await ask(served) == 2
            assert await ask(served) == 1
    assert opened == []


def test_it_is_overridden_in_other_threads_too() -> None:
    with stock.override({"apples": 1}), testing.running(app) as served:
        assert TestClient(served).get("/apples").json() == 1
        with TestClient(app) as client:
            assert client.get("/in/a/thread/apples").json() == 1
    assert opened == []


def test_starlettes_client_opens_them() -> None:
    with TestClient(app) as client:
        assert client.get("/apples").json() == 7
    assert opened == ["open", "close"]
    with pytest.raises(SharedNotOpen, match="'stock'"):
        TestClient(app).get("/apples")


def refuse() -> None:
    raise ConnectionError("nobody there")


@pytest.mark.anyio
async def test_one_that_cannot_be_opened() -> None:
    broken = FastAPI()
    asyncguard.install(broken, block_threshold=None, shared=[shared(refuse, name="broken")])
    with pytest.raises(SharedStartFailed, match="'broken'") as caught:
        async with testing.running(broken):
            pytest.fail("it has not started")
    assert isinstance(caught.value.__cause__, ConnectionError)
