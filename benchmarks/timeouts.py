"""What a request timeout costs those in time, next to what is usually done: `scripts/bench timeouts`.

In process, without a server: the microseconds of CPU per request that each way adds to a middleware that
does nothing, and its ratio to the bare application. All variants take turns within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import platform
import subprocess
import sys
from typing import Any

import anyio
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import asyncguard
from benchmarks.apps import PassThrough, bare_asgi, hello
from benchmarks.inprocess import alternate
from benchmarks.summary import Budget, Spread, differences, ratios, table

__all__ = ["measure"]

MOST_MICROSECONDS = 4.0
LIMIT = 30.0
_REQUESTS = {"bare ASGI": 1000, "FastAPI": 100}


class AsyncioTimeout(PassThrough):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(LIMIT):
            await self.app(scope, receive, send)


class AnyioFailAfter(PassThrough):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.fail_after(LIMIT):
            await self.app(scope, receive, send)


class WaitFor(BaseHTTPMiddleware):
    """The recipe that is found most often."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        try:
            return await asyncio.wait_for(call_next(request), LIMIT)
        except TimeoutError:
            return PlainTextResponse("late", 504)


def variants(kind: str) -> dict[str, ASGIApp]:
    """Ways of guarding one application, by name."""

    def make() -> Any:
        return bare_asgi if kind == "bare ASGI" else hello()

    found: dict[str, ASGIApp] = {
        "bare": make(),
        "pass-through": PassThrough(make()),
        "asyncguard, one layer": asyncguard.TimeoutMiddleware(make(), timeout=LIMIT),
    }
    if kind == "FastAPI":
        installed = hello()
        asyncguard.install(installed, block_threshold=None, timeout=LIMIT)
        found["asyncguard, installed"] = installed
    found["asyncio.timeout"] = AsyncioTimeout(make())
    found["anyio.fail_after"] = AnyioFailAfter(make())
    found["BaseHTTPMiddleware + wait_for"] = WaitFor(make())
    return found


async def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """The microseconds per request, of each application and variant, round for round."""
    return {kind: await alternate(variants(kind), rounds, requests) for kind, requests in _REQUESTS.items()}


def report(loop: str, results: dict[str, dict[str, list[float]]]) -> list[Budget]:
    """Print the tables of one loop."""
    budgets = []
    for kind, times in results.items():
        rows = []
        for name, samples in times.items():
            added = Spread.of(differences(samples, times["pass-through"]))
            ratio = Spread.of(ratios(samples, times["bare"]))
            rows.append([name, Spread.of(samples).show(2), added.show(2), ratio.show(3)])
            if name.startswith("asyncguard"):
                what = f"{name}, {kind} on {loop}"
                budgets.append(Budget(what, MOST_MICROSECONDS, added.median, " us"))
        title = f"\n{kind} on {loop}: microseconds of CPU per request"
        print(table(title, ["variant", "in all", "more than pass-through", "ratio to bare"], rows))
    return budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], help="measure on it, and print JSON")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    if options.loop:
        loop: Any = importlib.import_module(options.loop)
        print(json.dumps(loop.run(measure(options.rounds))))
        return
    print(f"Python {platform.python_version()} on {platform.machine()}; medians, and quartiles in brackets")
    budgets = []
    for name in ("asyncio", "uvloop"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.timeouts",
            "--loop",
            name,
            "--rounds",
            str(options.rounds),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
        budgets += report(name, json.loads(output))
    print("\nbudgets")
    print("\n".join(map(str, budgets)))


if __name__ == "__main__":
    main()
