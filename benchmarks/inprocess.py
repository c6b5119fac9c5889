"""What a middleware costs where nothing else is: the application called by hand, without a server.

    python -m benchmarks.inprocess --loop uvloop --rounds 100

Prints, as JSON, the microseconds of CPU per request of each round. The variants take turns of a few
milliseconds, so that whatever else the machine does meets them all.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import time
from typing import Any

from starlette.types import ASGIApp, Message

import asyncguard
from benchmarks.apps import PassThrough, bare_asgi, hello

__all__ = ["alternate", "measure"]

_SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "server": ("127.0.0.1", 8000),
    "client": ("127.0.0.1", 50000),
    "scheme": "http",
    "root_path": "",
    "method": "GET",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "headers": [(b"host", b"127.0.0.1:8000")],
}
"""What uvicorn makes of the simplest request."""

_REQUESTS = {"bare ASGI": 1000, "FastAPI": 100}
"""In one round: a few milliseconds, since a stall is none of what is measured here."""


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(_: Message) -> None:
    pass


async def _round(app: ASGIApp, requests: int) -> float:
    before = time.process_time_ns()
    for _ in range(requests):
        await app({**_SCOPE, "state": {}}, _receive, _send)
    return (time.process_time_ns() - before) / requests / 1000


async def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """The microseconds per request, of each application and variant, round for round."""
    results = {}
    for kind, requests in _REQUESTS.items():
        guarded: Any = hello()
        apps: dict[str, ASGIApp] = {
            "bare": bare_asgi if kind == "bare ASGI" else hello(),
            "pass-through": PassThrough(bare_asgi if kind == "bare ASGI" else hello()),
        }
        if kind == "bare ASGI":
            guarded = asyncguard.guard(bare_asgi)
        else:
            asyncguard.install(guarded)
        apps["asyncguard"] = guarded
        results[kind] = await alternate(apps, rounds, requests)
    return results


async def alternate(apps: dict[str, ASGIApp], rounds: int, requests: int) -> dict[str, list[float]]:
    """The microseconds per request of each application, round for round; the order changes every time."""
    order = list(apps)
    for name in order:
        for _ in range(5):
            await _round(apps[name], requests)
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(rounds):
        order.append(order.pop(0))
        for name in order:
            times[name].append(await _round(apps[name], requests))
            await asyncio.sleep(0)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    loop = importlib.import_module(options.loop)
    print(json.dumps(loop.run(measure(options.rounds))))


if __name__ == "__main__":
    main()
