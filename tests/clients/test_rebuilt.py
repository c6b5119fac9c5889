"""Which lines build clients for single requests again and again, and which do not."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import httpx
import httpx2
import pytest
import redis
import requests

from asyncguard._request import current_request
from asyncguard.clients import _rebuilt
from asyncguard.clients._constructors import Hold
from asyncguard.clients._rebuilt import AGAIN, WITHIN
from asyncguard.events import ClientReport
from tests.clients.requesting import VERIFY, Service, Work
from tests.conftest import TurnedClock

cache: list[Any] = []
"""Outlives the requests."""


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    yield
    cache.clear()


@pytest.fixture
def service() -> Iterator[Service]:
    hold = Hold()
    yield Service()
    hold.release()


async def httpx_closed() -> None:
    async with httpx.AsyncClient(verify=VERIFY):
        pass


# -- what is not ---------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_is_built_by_the_first_request_and_kept(service: Service) -> None:
    async def work() -> None:
        if not cache:
            cache.append(httpx.AsyncClient(verify=VERIFY))

    for _ in range(10):  # each time, all the tests of a user's begin anew
        await service.requests(work)
        cache.clear()
    assert service.reports == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "build",
    [
        partial(httpx.Client, verify=VERIFY),
        partial(httpx2.Client, verify=VERIFY),
        requests.Session,
        redis.Redis,
    ],
    ids=["httpx", "httpx2", "requests", "redis"],
)
async def test_a_cache_that_forgets_the_oldest(build: Callable[[], Any], service: Service) -> None:
    """One for each customer, and there are many: those that are thrown away were used more than once."""

    async def work() -> None:
        cache.append(build())
        if len(cache) > 2:
            cache.pop(0).close()

    await service.requests(work, 12)
    assert service.reports == []


@pytest.mark.asyncio
async def test_a_line_that_also_builds_what_lives_on(service: Service) -> None:
    async def work() -> None:
        client = httpx.AsyncClient(verify=VERIFY)
        if not cache:
            cache.append(client)
        else:
            await client.aclose()

    await service.requests(work, 10)
    assert service.reports == []
    await cache[0].aclose()
    await service.request(work)
    assert len(service.reports) == 1


@pytest.mark.asyncio
async def test_what_is_built_elsewhere(service: Service) -> None:
    for _ in range(10):
        await httpx_closed()
    assert service.reports == []


@pytest.mark.asyncio
async def test_what_a_task_builds_that_its_request_has_left_behind(service: Service) -> None:
    record = service.begin()
    token = current_request.set(record)
    await httpx_closed()
    record.finish()
    for _ in range(10):
        await httpx_closed()
    current_request.reset(token)
    assert service.reports == []
    assert record.at_end is None


@pytest.mark.asyncio
async def test_what_cannot_be_built_is_not_thrown_away(service: Service) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match="Unknown scheme"):
            httpx.AsyncClient(proxy="carrier://pigeon", verify=VERIFY)

    await service.requests(work, 10)
    assert service.reports == []


@pytest.mark.asyncio
async def test_what_is_closed_only_after_its_request(service: Service) -> None:
    """A test suite closes what its applications have kept."""

    async def work() -> None:
        cache.append(httpx.AsyncClient(verify=VERIFY))

    for _ in range(10):
        await service.request(work)
        await cache.pop().aclose()
    assert service.reports == []


# -- how many, and when --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_many_at_the_same_time_count_once(service: Service) -> None:
    """None of them has found anything to share yet."""

    async def crowd(size: int) -> None:
        all_have_built = anyio.Event()

        async def work() -> None:
            async with httpx.AsyncClient(verify=VERIFY):
                cache.append(None)
                if len(cache) == size:
                    all_have_built.set()
                await all_have_built.wait()

        cache.clear()
        async with anyio.create_task_group() as group:
            for _ in range(size):
                group.start_soon(service.request, work)

    for _ in range(AGAIN):
        await crowd(20)
    assert service.reports == []
    await crowd(20)
    (report,) = service.reports
    assert report.times == AGAIN


@pytest.mark.asyncio
async def test_what_one_request_builds_one_after_the_other(service: Service) -> None:
    """Such as a websocket, for each message."""

    async def work() -> None:
        for _ in range(AGAIN + 1):
            await httpx_closed()

    await service.request(work)
    assert len(service.reports) == 1


@pytest.mark.asyncio
async def test_a_request_that_goes_on_and_on_holds_on_to_little(service: Service) -> None:
    record = service.begin()
    token = current_request.set(record)
    cache.extend(requests.Session() for _ in range(1000))
    assert record.at_end is not None
    (visit,) = record.at_end.values()
    assert len(visit._builds) == _rebuilt._MOST_BUILDS  # type: ignore[attr-defined]
    current_request.reset(token)
    record.finish()
    assert service.reports == []


@pytest.mark.asyncio
async def test_what_is_built_now_and_then_is_not_reported(service: Service, clock: TurnedClock) -> None:
    for _ in range(10):
        await service.request(httpx_closed)
        clock.turn(WITHIN)
    assert service.reports == []
    for _ in range(AGAIN):
        await service.request(httpx_closed)
        clock.turn(WITHIN / AGAIN)
    await service.request(httpx_closed)
    (report,) = service.reports
    assert report.times == 10 + AGAIN


@pytest.mark.asyncio
async def test_each_line_has_a_report_of_its_own(service: Service) -> None:
    async def work() -> None:
        async with httpx.AsyncClient(verify=VERIFY):  # the first
            pass
        async with httpx.AsyncClient(verify=VERIFY):  # the second
            pass

    await service.requests(work, 10)
    assert [report.line and report.line.source.partition("# ")[2] for report in service.reports] == [
        "the first",
        "the second",
    ]


@pytest.mark.asyncio
async def test_how_long_it_takes(service: Service, clock: TurnedClock) -> None:
    class Slow(httpx.Client):
        def __init__(self) -> None:
            super().__init__(verify=VERIFY, transport=None)

        def _transport_for_url(self, url: Any) -> Any: ...

        def _init_transport(self, *args: Any, **kwargs: Any) -> Any:
            clock.turn(0.25)
            return super()._init_transport(*args, **kwargs)

    async def work() -> None:
        Slow().close()

    await service.requests(work)
    (report,) = service.reports
    assert report.seconds == pytest.approx(0.25)


@pytest.mark.asyncio
async def test_only_so_many_lines_are_remembered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rebuilt, "_MOST_LINES", 2)

    async def other_lines() -> None:
        requests.Session().close()
        requests.Session().close()

    await service.requests(httpx_closed, AGAIN)
    await service.request(other_lines)
    await service.requests(httpx_closed, AGAIN)
    assert service.reports == []
    assert len(service.lines._lines) == 2


# -- whose line ----------------------------------------------------------------------------------------


async def reported_line(
    service: Service, work: Work, marked: Callable[[str], int], name: str
) -> ClientReport:
    await service.requests(work)
    (report,) = service.reports
    assert report.line is not None
    assert report.line.line == marked(name)
    return report


class Github(httpx.AsyncClient):
    def __init__(self) -> None:
        super().__init__(base_url="https://api.github.com", verify=VERIFY)


class Repositories:
    def __init__(self) -> None:
        self.client = httpx.AsyncClient(verify=VERIFY)  # a class of the user's


@asynccontextmanager
async def connected() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(verify=VERIFY) as client:  # a context manager
        yield client


@pytest.mark.asyncio
async def test_the_users_own_subclass(service: Service, marked: Callable[[str], int]) -> None:
    async def work() -> None:
        async with Github():  # a subclass
            pass

    report = await reported_line(service, work, marked, "a subclass")
    assert report.call == "Github"
    assert [line.function.rpartition(".")[2] for line in report.stack][-2:] == ["work", "__init__"]


@pytest.mark.asyncio
async def test_a_class_around_the_client(service: Service, marked: Callable[[str], int]) -> None:
    async def work() -> None:
        Repositories()  # who builds that

    report = await reported_line(service, work, marked, "a class of the user's")
    assert report.call == "httpx.AsyncClient"
    assert [line.line for line in report.stack][-2:] == [
        marked("who builds that"),
        marked("a class of the user's"),
    ]


@pytest.mark.asyncio
async def test_a_context_manager(service: Service, marked: Callable[[str], int]) -> None:
    async def work() -> None:
        async with connected():
            pass

    await reported_line(service, work, marked, "a context manager")


@pytest.mark.asyncio
async def test_a_shorthand_of_the_library(service: Service, marked: Callable[[str], int]) -> None:
    """Each call of `httpx.get` builds a client."""

    async def work() -> None:
        with pytest.raises(httpx.UnsupportedProtocol):
            httpx.get("nothing://", verify=VERIFY)  # a shorthand

    report = await reported_line(service, work, marked, "a shorthand")
    assert (report.client, report.call) == ("httpx.Client", "httpx.get")
    assert report.stack[-1].function.endswith("request")


@pytest.mark.anyio
async def test_in_a_thread(service: Service, marked: Callable[[str], int]) -> None:
    def build() -> None:
        with httpx.Client(verify=VERIFY):  # in a thread
            pass

    async def work() -> None:
        await anyio.to_thread.run_sync(build)

    await reported_line(service, work, marked, "in a thread")


# -- what it holds on to -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_nothing_is_kept_alive(service: Service) -> None:
    built: list[weakref.ref[Any]] = []

    async def work() -> None:
        client = requests.Session()
        built.append(weakref.ref(client))
        cache.append(client)
        del client
        cache.clear()
        assert built[-1]() is None

    await service.requests(work)
    record = service.begin()
    remembered = weakref.ref(record)
    token = current_request.set(record)
    await httpx_closed()
    current_request.reset(token)
    record.finish()
    del record, token
    assert remembered() is None
    assert len(service.reports) == 1


@pytest.mark.asyncio
async def test_what_cannot_be_referred_to_weakly_is_let_go_with_its_request(service: Service) -> None:
    async def work() -> None:
        cache.append(asyncpg.create_pool("postgresql://nobody@localhost:1/nothing", min_size=0))

    await service.requests(work)
    assert service.reports == []
    for pool in cache:
        pool.terminate() if pool._initialized else None
        assert not any(isinstance(holder, _rebuilt.Build) for holder in gc.get_referrers(pool))


@pytest.mark.asyncio
async def test_a_client_that_cannot_be_asked_lives(service: Service) -> None:
    class Odd(httpx.Client):
        @property
        def is_closed(self) -> bool:
            raise LookupError("nobody knows")

    async def work() -> None:
        cache.append(Odd(verify=VERIFY))

    await service.requests(work, 10)
    assert service.reports == []


def test_threads_of_many_requests(service: Service) -> None:
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            for _ in range(50):
                anyio.run(service.request, work)
        except BaseException as error:
            errors.append(error)

    async def work() -> None:
        requests.Session().close()

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(service.reports) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_waits_for_no_thread_of_its_parent(service: Service) -> None:
    held = service.lines._lock
    held.acquire()
    try:
        _rebuilt._renew_locks()
        assert service.lines._lock is not held
    finally:
        held.release()
