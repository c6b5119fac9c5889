"""The pool of an application, and the answers to requests that it could not serve."""

from __future__ import annotations

import importlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import asyncguard
from asyncguard import OffloadError, OffloadPool, OffloadQueueFull, OffloadTimeout
from asyncguard.offloading import _local, _pools
from tests.asgi_driver import Client, http_scope
from tests.offloading import work

pytestmark = pytest.mark.anyio

PATIENCE = 30.0


def raising(error: Exception, **handlers: Any) -> Starlette:
    async def endpoint(request: Request) -> Response:
        raise error

    app = Starlette(routes=[Route("/", endpoint)])
    asyncguard.install(app)
    return app


async def ask(app: Any) -> Client:
    client = Client(scope=http_scope())
    await client.drive(app)
    return client


@pytest.mark.parametrize(("seconds", "header"), [(0.01, "1"), (2.2, "3"), (1e9, "3600")])
async def test_a_full_queue_is_answered_503(
    seconds: float, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await ask(raising(OffloadQueueFull("full", seconds)))
    assert client.status == 503
    (record,) = (record for record in caplog.records if record.name == "asyncguard.offloading")
    assert record.getMessage() == "GET / was answered 503: full"
    assert dict(client.headers)[b"retry-after"] == header.encode()
    assert b"busy" in client.body


async def test_a_call_out_of_time_is_answered_504_and_logged_with_its_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = await ask(raising(OffloadTimeout("late", 'File "work.py", line 7 in render')))
    assert client.status == 504
    (record,) = (record for record in caplog.records if record.name == "asyncguard.offloading")
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("GET / was answered 504: late")
    assert 'File "work.py", line 7 in render' in record.getMessage()
    assert b"did not answer in time" in client.body


async def test_other_errors_are_the_applications() -> None:
    with pytest.raises(OffloadError, match="mine"):
        await ask(raising(OffloadError("mine")))


@pytest.mark.parametrize("kind", [OffloadQueueFull, OffloadError, OffloadTimeout, TimeoutError])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_the_applications_own_handlers_come_first(kind: type[Exception], when: str) -> None:
    async def endpoint(request: Request) -> Response:
        raise (OffloadQueueFull if kind is OffloadQueueFull else OffloadTimeout)("late")

    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("mine", 418)

    app = Starlette(routes=[Route("/", endpoint)])
    if when == "before":
        app.add_exception_handler(kind, handle)
    asyncguard.install(app)
    if when == "after":
        app.add_exception_handler(kind, handle)
    assert (await ask(app)).status == 418


@pytest.mark.parametrize("make", [Starlette, FastAPI])
async def test_the_pool_is_open_while_the_application_is_served(make: Callable[..., Any]) -> None:
    seen: list[object] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, int]]:
        seen.append(_pools.current())
        yield {"mine": 1}

    app = make(lifespan=lifespan)
    asyncguard.install(app, block_threshold=None, offload_workers=1)
    with anyio.fail_after(PATIENCE):
        for _ in range(2):  # as often as it is served
            async with app.router.lifespan_context(app) as state:
                assert state == {"mine": 1}
                pool = _pools.current()
                assert isinstance(pool, OffloadPool)
                assert pool.workers == 1
                assert await pool.run(work.add, 1) == 1
    assert len(set(map(id, seen))) == 2


async def test_it_comes_before_pools_that_are_opened_beside_it() -> None:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, object]]:
        applications = _pools.current()
        async with OffloadPool(1) as own:
            assert _pools.current() is applications
            assert await own.run(work.add, 1) == 1
            yield {"pool": applications}

    app = Starlette(lifespan=lifespan)
    asyncguard.install(app, block_threshold=None, offload_workers=1)
    with anyio.fail_after(PATIENCE):
        async with app.router.lifespan_context(app) as state:
            assert state is not None
            assert _pools.current() is state["pool"]
        async with OffloadPool(1) as own:
            assert _pools.current() is own


async def test_its_workers_are_ready_and_have_the_modules_of_offloaded_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import time\nfrom asyncguard import offload\ntime.sleep(0.5)\nloaded = time.time()\n"
        "@offload\ndef when():\n    return loaded\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_local, "_READY_WITHIN", PATIENCE)
    module: Any = importlib.import_module("slow_to_import")
    app = Starlette()
    asyncguard.install(app, block_threshold=None, offload_workers=2)
    with anyio.fail_after(PATIENCE):
        async with app.router.lifespan_context(app):
            pool: Any = _pools.current()
            assert pool.stats.idle == 2
            started = time.time()
            assert module.loaded < await module.when() < started


def test_a_bad_number_of_workers_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1"):
        asyncguard.install(Starlette(), offload_workers=0)
