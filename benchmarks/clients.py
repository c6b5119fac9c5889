"""What shared clients cost: `scripts/bench clients`.

Three questions: what it costs a request to get one, what it costs a call that it keeps to the request's
deadline, and for how long the loop stands still while ten of them are opened. Whatever is compared takes
turns within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated, Any

import anyio.lowlevel
from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import TimeoutMiddleware, open_shared, shared
from benchmarks.apps import PassThrough
from benchmarks.inprocess import alternate
from benchmarks.summary import Budget, Spread, differences, ratios, table

__all__ = ["LIBRARIES", "WAYS_TO_OPEN", "measure_calls", "measure_gets", "measure_openings", "opening"]

LIBRARIES = tuple(name for name in ("httpx", "httpx2") if find_spec(name))
CLIENTS = 10
LONGEST_STALL = 20.0
"""Milliseconds that the loop may stand still while all of them are opened."""

_LIMIT = 30.0
_REQUESTS = 100
_BEAT = 0.0005

Call = Callable[[], Awaitable[None]]


class Client:
    """Stands for any client: what is measured is how a request gets it."""


# -- how a request gets it -------------------------------------------------------------------------


class WithState(PassThrough):
    """Gives each request a copy of the lifespan's state, as servers do."""

    def __init__(self, app: ASGIApp, state: Mapping[str, object]) -> None:
        super().__init__(app)
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = dict(self.state)
        await self.app(scope, receive, send)


client = Client()
plain = shared(Client)
aging = shared(Client, max_age=3600)


async def _injected() -> Client:
    return client


def gets() -> dict[str, ASGIApp]:
    """FastAPI applications that get a client in one way each, by name."""
    apps = {
        name: FastAPI()
        for name in (
            "no client",
            "module global",
            "request.state",
            "Depends(function)",
            "shared.get()",
            "Depends(shared)",
            "Depends(shared), max_age",
        )
    }

    @apps["no client"].get("/")
    async def none() -> bool:
        return True

    @apps["module global"].get("/")
    async def module_global() -> bool:
        return client is not None

    @apps["request.state"].get("/")
    async def of_state(request: Request) -> bool:
        return request.state.client is not None

    @apps["Depends(function)"].get("/")
    async def of_function(own: Annotated[Client, Depends(_injected)]) -> bool:
        return own is not None

    @apps["shared.get()"].get("/")
    async def got() -> bool:
        return plain.get() is not None

    @apps["Depends(shared)"].get("/")
    async def injected(own: Annotated[Client, Depends(plain)]) -> bool:
        return own is not None

    @apps["Depends(shared), max_age"].get("/")
    async def injected_aging(own: Annotated[Client, Depends(aging)]) -> bool:
        return own is not None

    return {name: WithState(app, {"client": client}) for name, app in apps.items()}


async def measure_gets(rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU per request, of each way, round for round."""
    async with open_shared(plain, aging):
        return await alternate(gets(), rounds, _REQUESTS)


# -- what a call costs -----------------------------------------------------------------------------

_SERVER = """
import asyncio

ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nContent-Type: text/plain\\r\\n\\r\\nok"

class Answering(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        for _ in range(data.count(b"\\r\\n\\r\\n")):
            self.transport.write(ANSWER)

async def main():
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def answering() -> Any:
    """The address of a server that answers anything with the same few bytes, in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@asynccontextmanager
async def callers(
    library: ModuleType, url: str
) -> AsyncIterator[dict[str, Callable[[int], Awaitable[None]]]]:
    """Ways to make some calls one after the other, by name."""
    resource: Any = shared(library.AsyncClient)

    async def repeat(client: Any, calls: int) -> None:
        for _ in range(calls):
            await client.get(url)

    async def limited(client: Any, calls: int) -> None:
        for _ in range(calls):
            async with asyncio.timeout(_LIMIT):
                await client.get(url)

    async with library.AsyncClient() as bare, open_shared(resource):
        fitted = resource.get()
        yield {
            "bare": lambda calls: repeat(bare, calls),
            "bare, in asyncio.timeout": lambda calls: limited(bare, calls),
            "shared, no deadline": lambda calls: repeat(fitted, calls),
            "bare, in a request with a deadline": lambda calls: in_request(lambda: repeat(bare, calls)),
            "shared, in a request with a deadline": lambda calls: in_request(lambda: repeat(fitted, calls)),
        }


async def in_request(work: Call) -> None:
    """Work as the handler of a request that has a deadline."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await TimeoutMiddleware(app, timeout=_LIMIT)(scope, receive, send)


async def measure_calls(name: str, rounds: int, calls: int = 20) -> dict[str, list[float]]:
    """Microseconds of CPU per call on a connection that is open, of each way, round for round."""
    library = importlib.import_module(name)
    found: dict[str, list[float]] = {}
    with answering() as url:
        async with callers(library, url) as ways:
            for way in ways.values():
                await way(calls)
            gc.collect()
            order = list(ways)
            for _ in range(rounds):
                order.append(order.pop(0))
                for way_name in order:
                    before = time.process_time_ns()
                    await ways[way_name](calls)
                    spent = (time.process_time_ns() - before) / calls / 1000
                    found.setdefault(way_name, []).append(spent)
    return {way_name: found[way_name] for way_name in ways}


# -- opening many ----------------------------------------------------------------------------------


@asynccontextmanager
async def _all_of(library: Any) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for _ in range(CLIENTS):
            await stack.enter_async_context(library.AsyncClient())
        yield


WAYS_TO_OPEN: Mapping[str, Callable[[Any], AbstractAsyncContextManager[None]]] = {
    "plain": _all_of,
    "shared": lambda library: open_shared(*[shared(library.AsyncClient) for _ in range(CLIENTS)]),
}


async def opening(way: str, name: str) -> dict[str, float]:
    """The longest stall of the loop while clients are opened, and how long it took in all; milliseconds.

    To be measured in a new process each time: what is shared by a process is made only once.
    """
    lifespan = WAYS_TO_OPEN[way](importlib.import_module(name))
    longest, ends = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not ends:
            before = time.perf_counter()
            await asyncio.sleep(_BEAT)
            longest = max(longest, time.perf_counter() - before - _BEAT)

    await anyio.lowlevel.checkpoint()  # Starlette has imported anyio's other half by then, too
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.02)
    longest, began = 0.0, time.perf_counter()
    async with lifespan:
        took = time.perf_counter() - began
        await asyncio.sleep(0.01)
        ends = True
        await watching
    return {"stall": longest * 1e3, "in all": took * 1e3}


def measure_openings(name: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What `opening` finds of each way, round for round."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS_TO_OPEN}
    for _ in range(rounds):
        for way, samples in found.items():
            command = [sys.executable, "-m", "benchmarks.clients", "--open", way, "--library", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
            samples.append(json.loads(output))
    return found


# -- the tables ------------------------------------------------------------------------------------


def report_gets(found: Mapping[str, list[float]]) -> None:
    base = found["no client"]
    rows = [
        [name, Spread.of(samples).show(2), Spread.of(differences(samples, base)).show(2)]
        for name, samples in found.items()
    ]
    heads = ["way to get it", "in all", "more than without a client"]
    print(table("\na request of FastAPI's: microseconds of CPU", heads, rows))


def report_calls(library: str, found: Mapping[str, list[float]]) -> None:
    base = found["bare"]
    rows = [
        [
            name,
            Spread.of(samples).show(1),
            Spread.of(differences(samples, base)).show(1),
            Spread.of(ratios(samples, base)).show(3),
        ]
        for name, samples in found.items()
    ]
    heads = ["client", "in all", "more than bare", "ratio to bare"]
    print(table(f"\na call of {library}: microseconds of CPU", heads, rows))


def report_openings(library: str, found: Mapping[str, list[dict[str, float]]]) -> Budget:
    rows = [
        [way, *(Spread.of([sample[what] for sample in samples]).show(1) for what in ("stall", "in all"))]
        for way, samples in found.items()
    ]
    heads = ["clients", "longest stall of the loop", "in all"]
    print(table(f"\nopening {CLIENTS} clients of {library}: milliseconds", heads, rows))
    stall = Spread.of([sample["stall"] for sample in found["shared"]]).median
    return Budget(f"stall while {CLIENTS} clients of {library} are opened", LONGEST_STALL, stall, " ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--open", choices=WAYS_TO_OPEN, help="open clients once, and print JSON")
    parser.add_argument("--library", default="httpx")
    options = parser.parse_args()
    if options.open:
        print(json.dumps(asyncio.run(opening(options.open, options.library))))
        return
    print(f"Python {platform.python_version()} on {platform.machine()}; medians, and quartiles in brackets")
    report_gets(asyncio.run(measure_gets(options.rounds)))
    for library in LIBRARIES:
        report_calls(library, asyncio.run(measure_calls(library, options.rounds)))
    budgets = [
        report_openings(library, measure_openings(library, max(2, options.rounds // 10)))
        for library in LIBRARIES
    ]
    print("budgets")
    print("\n".join(map(str, budgets)))


if __name__ == "__main__":
    main()
