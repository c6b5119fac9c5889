"""Of thousands of requests, stalls and cancellations nothing is left, whatever way they ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import Context
from types import AsyncGeneratorType, CoroutineType, FrameType, TracebackType
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from starlette.types import Message, Receive, Scope, Send

from asyncguard import BlockingMiddleware, BlockReport
from asyncguard._request import RequestRecord
from asyncguard.blocking import _lookups
from asyncguard.blocking._busy import BusyTime
from asyncguard.blocking._stall import Aftermath, LongTurn, Sample, Stall, Wait

pytestmark = pytest.mark.anyio

REQUESTS = 10_080
AT_ONCE = 20
THRESHOLD = 0.001
STALL = 0.0015


class Held(dict[str, Any]):
    """A scope that can be told from other dictionaries, and referred to weakly."""


class Local:
    """Something that only the frame of an endpoint refers to."""


OURS = {Held, Local, RequestRecord, BusyTime, LongTurn, Sample, Stall, Aftermath, Wait}
"""What the requests and the monitor make: nothing may be left of it."""

OTHERS = {
    CoroutineType,
    AsyncGeneratorType,
    FrameType,
    TracebackType,
    Context,
    asyncio.Task,
    trio.lowlevel.Task,
}
"""What backends make. They may keep some that were last: trio the traceback of its last cancellation."""

FEW = 100
"""What is left once for each request, of any one endpoint alone, is left hundreds of times."""


class Disconnected(Exception):
    """What servers raise from `send` when the client has gone."""


# -- endpoints -------------------------------------------------------------------------------------


async def quick(receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    await anyio.lowlevel.checkpoint()
    await send({"type": "http.response.body"})


async def blocking(receive: Receive, send: Send) -> None:
    await anyio.lowlevel.checkpoint()
    time.sleep(STALL)
    await quick(receive, send)


async def with_tasks(receive: Receive, send: Send) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(anyio.lowlevel.checkpoint)


async def failing(receive: Receive, send: Send) -> None:
    await anyio.lowlevel.checkpoint()
    raise LookupError("the endpoint's own error")


async def failing_after_a_stall(receive: Receive, send: Send) -> None:
    time.sleep(STALL)
    raise LookupError("the endpoint's own error")


async def cancelled_in_an_await(receive: Receive, send: Send) -> None:
    with anyio.move_on_after(0):
        await anyio.sleep_forever()


async def cancelled_in_a_turn(receive: Receive, send: Send) -> None:
    """It holds the loop when the scope around the whole request is cancelled."""
    cast(anyio.CancelScope, (await receive())["around"]).cancel()
    time.sleep(STALL)
    await anyio.sleep_forever()


async def reading_until_disconnected(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "http.disconnect":
        await anyio.lowlevel.checkpoint()


async def sending_until_disconnected(receive: Receive, send: Send) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"."
            await anyio.lowlevel.checkpoint()

    async with contextlib.aclosing(chunks()) as body:
        async for chunk in body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def websocket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


ENDPOINTS: tuple[Callable[[Receive, Send], Any], ...] = (
    *(quick,) * 4,
    *(with_tasks,) * 2,
    *(failing,) * 2,
    *(cancelled_in_an_await,) * 3,
    *(reading_until_disconnected,) * 3,
    *(sending_until_disconnected,) * 2,
    *(websocket,) * 3,
    blocking,
    failing_after_a_stall,
    cancelled_in_a_turn,
)


class Server:
    """A server's side of requests."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.refs: list[weakref.ref[Any]] = []
        self.middleware = BlockingMiddleware(
            self._application, threshold=THRESHOLD, on_block=self._on_block, log=False
        )
        self.reported = 0

    def _on_block(self, report: BlockReport) -> None:
        self.reported += 1

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        local = Local()
        if len(self.refs) < 1000:
            self.refs += [weakref.ref(scope), weakref.ref(local)]
            if asyncio._get_running_loop() is not None:
                self.refs.append(weakref.ref(asyncio.current_task()))
            else:
                self.refs.append(weakref.ref(trio.lowlevel.current_task()))
        await scope["endpoint"](receive, send)

    async def request(self, endpoint: Callable[[Receive, Send], Any]) -> None:
        """One request, whose client leaves or closes the websocket after three messages."""
        kind = "websocket" if endpoint is websocket else "http"
        last = {"type": f"{kind}.disconnect"}
        around = anyio.CancelScope()
        more = [{"type": f"{kind}.receive", "text": "a", "around": around}] * 3
        messages: Iterator[Message] = itertools.chain(more, itertools.repeat(last))
        sent = 0

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None:
            nonlocal sent
            sent += 1
            await anyio.lowlevel.checkpoint()
            if sent > 5:
                raise Disconnected

        scope = Held(type=kind, method="GET", path=f"/{endpoint.__name__}", headers=[], endpoint=endpoint)
        outcome = "cancelled"
        with around:
            try:
                await self.middleware(scope, receive, send)
                outcome = "answered"
            except (LookupError, Disconnected) as error:
                outcome = type(error).__name__
        self.outcomes[outcome] += 1

    async def serve(self, count: int) -> None:
        """As many requests, some of them at once, each in a task of its own."""
        endpoints = itertools.islice(itertools.cycle(ENDPOINTS), count)
        while batch := list(itertools.islice(endpoints, AT_ONCE)):
            async with anyio.create_task_group() as group:
                for endpoint in batch:
                    group.start_soon(self.request, endpoint)

    def told(self) -> int:
        monitor = self.middleware.monitor
        return self.reported + sum(monitor.excused.values()) + monitor.dropped


def counted() -> Counter[str]:
    """How many objects there are of each kind."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in OURS | OTHERS)


async def least_counted() -> Counter[str]:
    """The same at rest: the least of several counts, each taken from a coroutine as this is."""
    least = counted()
    for _ in range(10):
        await anyio.sleep(0.01)
        least &= counted()
    return least


async def more_than(before: Counter[str]) -> Counter[str]:
    """What there is more of than `before`, once the monitor's threads have come to rest."""
    more: Counter[str] = Counter()
    for _ in range(500):
        # The watchdog forgets its last look when it wakes the next time, the reporter what it has told.
        await anyio.sleep(0.01)
        more = counted() - before
        for kind in OTHERS:
            if more[kind.__name__] < FEW:
                del more[kind.__name__]
        if not more:
            break
    return more


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def watch_threads() -> set[threading.Thread]:
    """Those of monitors; backends have workers of their own, which stay for a while."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncguard-")}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of descriptors here")
async def test_nothing_is_left_of_ten_thousand_requests() -> None:
    threads, open_before = watch_threads(), descriptors()
    server = Server()
    await server.serve(AT_ONCE * len(ENDPOINTS))
    server.refs.clear()
    first = server.told()
    before = await least_counted()
    open_during, threads_during = descriptors(), watch_threads()
    assert threads_during > threads

    server.outcomes.clear()
    await server.serve(REQUESTS)
    assert sum(server.outcomes.values()) == REQUESTS
    assert set(server.outcomes) == {"answered", "cancelled", "LookupError", "Disconnected"}
    # While the monitor watches on:
    assert await more_than(before) == Counter()
    assert len(server.refs) >= 1000
    assert [ref() for ref in server.refs if ref() is not None] == []
    assert server.middleware.monitor.in_flight == ()
    assert server.told() - first >= 300
    assert len(_lookups._requests) == 0
    assert watch_threads() <= threads_during
    assert descriptors() <= open_during
    # And after its end:
    await server.middleware.monitor.stop()
    for _ in range(3000):
        left, opened = watch_threads() - threads, descriptors() - open_before
        if not left and opened <= 0:
            break
        await anyio.sleep(0.01)
    assert (left, max(0, opened)) == (set(), 0)
    assert await more_than(before) == Counter()
