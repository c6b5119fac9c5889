"""Clients that are built for single requests, on real servers: each line is told of once, by its own name."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.recording import marked
from tests.raw_client import WebSocket, get
from tests.servers import Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests/e2e/rebuilt.py"
BUILDING = {
    "async-with": "httpx.AsyncClient",
    "never-closed": "httpx2.AsyncClient",
    "in-a-dependency": "httpx.AsyncClient",
    "in-a-thread": "httpx.Client",
    "shorthand": "httpx.Client",
    "in-a-middleware": "httpx2.AsyncClient",
}
"""What requests to each path build."""
SOUND = ("shared", "kept")


@pytest.fixture(scope="module", params=["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-trio"])
def server(request: pytest.FixtureRequest, upstream_env: dict[str, str]) -> Iterator[Server]:
    with serve(request.param, "tests.e2e.rebuilt:app", env=upstream_env) as server:
        yield server


def reported(server: Server, request: str) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = get(server.port, "/reports").json()
    return [report for report in reports if report["request"] == request]


def request_until_reported(server: Server, path: str) -> None:
    """Some requests may begin before the client of the one before has been closed, and do not count."""

    def request_again() -> bool:
        assert get(server.port, f"/{path}").status in (200, 404)
        return bool(reported(server, f"GET /{path}"))

    eventually(request_again, f"a report of /{path}")


@pytest.mark.parametrize("path", BUILDING)
def test_a_line_that_builds_clients_is_told_of_once(server: Server, path: str) -> None:
    request_until_reported(server, path)
    for _ in range(6):
        get(server.port, f"/{path}")
    (report,) = reported(server, f"GET /{path}")
    assert report["client"] == BUILDING[path]
    assert report["line"]["line"] == marked(APP, path, "builds")
    assert report["exact"]
    assert "asyncguard.shared" in report["advice"]["text"]
    assert 0 < report["seconds"] < 30


def test_a_websocket_that_builds_one_for_each_message(server: Server) -> None:
    with WebSocket(server.port, "/messages") as websocket:
        for _ in range(6):
            websocket.send("more")
            assert websocket.receive() == "at last"
        eventually(lambda: reported(server, "WS /messages"), "a report")
    (report,) = reported(server, "WS /messages")
    assert report["line"]["line"] == marked(APP, "messages", "builds")


@pytest.mark.parametrize("path", SOUND)
def test_clients_that_are_shared_are_never_told_of(server: Server, path: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: get(server.port, f"/{path}").status, range(40)))
    assert answers == [200] * 40


def test_the_log_has_each_line_once_and_nothing_else(upstream_env: dict[str, str]) -> None:
    with serve("uvicorn-asyncio", "tests.e2e.rebuilt:app", env=upstream_env) as server:
        for path in BUILDING:
            request_until_reported(server, path)
        server.terminate()
        said = [line for line in server.stderr.splitlines() if " builds its own " in line]
    assert [line.partition(" at ")[0] for line in said] == [
        f"GET /{path} builds its own {client}" for path, client in BUILDING.items()
    ]
    assert all(line.endswith("(cures/#client-per-request)") for line in said)
