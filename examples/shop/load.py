"""A quarter of a minute of customers: `python -m shop.load http://127.0.0.1:8000`.

Visits every healthy route, then every unhealthy one, each time in a small crowd of customers who
only want a price or a ping. Prints a line per route (the longest of its visits) and a line per
answer that should not have been; the exit code is 1 if there was one or the shop is not there.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import httpx

ROUTES = (
    "/checkout",
    "/exchange-rates",
    "/catalogue",
    "/recommendations/7",
    "/price-history",
    "/offers",
    "/price-list",
)


@dataclass(frozen=True)
class Tour:
    """A route to visit, how often, how patiently (in seconds), and what may come of it."""

    path: str
    times: int
    patience: float = 15.0
    expected: tuple[int | str, ...] = (200,)


# Nobody hears from the carrier: the shop says so (504), or the customer gives up.
TOURS = (
    *(Tour(f"/healthy{route}", times=2) for route in ROUTES),
    Tour("/healthy/delivery-date", times=2, expected=(504,)),
    *(Tour(f"/unhealthy{route}", times=2) for route in ROUTES),
    Tour("/unhealthy/delivery-date", 1, patience=2.0, expected=("no answer within 2.0 s", 504)),
)


@dataclass(frozen=True)
class Visit:
    """One request: the status of its answer, or what happened instead, and how long it took."""

    path: str
    outcome: int | str
    seconds: float

    def __str__(self) -> str:
        """Return the line to print."""
        if isinstance(self.outcome, str):
            return f"  {self.outcome}  GET {self.path}"
        return f"  {self.outcome} {self.seconds * 1000:6.0f} ms  GET {self.path}"


async def visit(client: httpx.AsyncClient, path: str, patience: float = 15.0) -> Visit:
    """Send one request and wait for its answer as long as patience lasts."""
    outcome: int | str
    start = time.perf_counter()
    try:
        outcome = (await client.get(path, timeout=patience)).status_code
    except httpx.ReadTimeout:
        outcome = f"no answer within {patience} s"
    except httpx.TransportError as error:
        outcome = f"not reached ({type(error).__name__})"
    return Visit(path, outcome, time.perf_counter() - start)


async def crowd(client: httpx.AsyncClient, skus: Iterable[int], apart: float) -> list[Visit]:
    """Let customers arrive some seconds apart; every other one looks at a price."""
    visits = []
    async with asyncio.TaskGroup() as customers:
        for sku in skus:
            path = f"/healthy/prices/{sku}" if sku % 2 else "/ping"
            visits.append(customers.create_task(visit(client, path)))
            await asyncio.sleep(apart)
    return [each.result() for each in visits]


async def visit_in_crowd(client: httpx.AsyncClient, tour: Tour) -> tuple[Visit, list[Visit]]:
    """Visit a route while four customers are being served and four more arrive."""
    async with asyncio.TaskGroup() as group:
        earlier = group.create_task(crowd(client, range(11, 15), apart=0.001))
        await asyncio.sleep(0.008)
        target = group.create_task(visit(client, tour.path, tour.patience))
        later = group.create_task(crowd(client, range(15, 19), apart=0.02))
    return target.result(), [*earlier.result(), *later.result()]


async def go(client: httpx.AsyncClient, tour: Tour) -> list[Visit]:
    """Make the visits of a tour, print its lines, and return what went wrong."""
    visits, failures = [], []
    for _ in range(tour.times):
        target, neighbours = await visit_in_crowd(client, tour)
        visits.append(target)
        failures += [target] if target.outcome not in tour.expected else []
        failures += [each for each in neighbours if each.outcome != 200]
        if failures:
            break
        await asyncio.sleep(0.05)  # so that one stall does not run into the next

    slowest = max(visits, key=lambda each: each.seconds)
    for each in dict.fromkeys([slowest, *failures]):
        print(each, flush=True)
    return failures


async def main(base_url: str) -> int:
    """Make all tours, one after the other, and return the exit code."""
    failures = []
    # Connections expire here before the server drops them, so that no request meets a dead one.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=base_url, limits=limits) as client:
        for tour in TOURS:
            failures += await go(client, tour)
            if any(isinstance(each.outcome, str) for each in failures):
                break  # the shop is not there, or hangs
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Visit all routes of the shop, in a crowd.")
    parser.add_argument("base_url")
    sys.exit(asyncio.run(main(parser.parse_args().base_url)))
