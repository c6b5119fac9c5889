"""A stall that does not end is told of while it lasts, and ends the worker where that is wanted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.recording import Recording, marked
from tests.raw_client import Connection, get
from tests.servers import Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests/e2e/hangs.py"
HANG = "the loop has been blocked for"


@pytest.fixture(params=["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-trio"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, Recording]]:
    recording = Recording(tmp_path)
    with serve(request.param, "tests.e2e.hangs:app", env=recording.env) as server:
        with recording.during(server.port):
            for path in ("/pid", "/let-go-soon?seconds=0"):
                get(server.port, path)
        yield server, recording


def test_a_hang_is_logged_once_with_the_stack_of_every_thread(server: tuple[Server, Recording]) -> None:
    process, recording = server
    with recording.during(process.port) as recorded:
        assert get(process.port, "/short").status == 200
        get(process.port, "/let-go-soon?seconds=1.5")
        assert get(process.port, "/deadlock/a").json() == "a"
    assert process.stderr.count(HANG) == 1, process.stderr
    told = process.stderr[process.stderr.index(HANG) :]
    # While it lasted: before the report of it.
    assert told.index("thread holder-of-the-lock") < told.index("blocked the loop for")
    assert "by GET /deadlock/{name}, and still is" in told.splitlines()[0]
    assert f"{APP}:{marked(APP, 'deadlock')} in deadlock: with lock:" in told
    assert "Thread._bootstrap" not in told
    assert f"{APP}:{marked(APP, 'holder')} in keep_the_lock: let_go.wait(30)" in told
    assert [report.request for report in recorded.reports] == ["GET /short", "GET /deadlock/{name}"]
    report = recorded.reports[1]
    assert report.line is not None
    assert report.line.line == marked(APP, "deadlock")
    assert report.advice is not None


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop"])
def test_a_hanging_worker_is_ended_and_replaced(kind: str, tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    env = {**recording.env, "ASYNCGUARD_TEST_ON_HANG": "abort"}
    with serve(kind, "tests.e2e.hangs:app", "--workers", "2", env=env) as server:
        first = eventually(lambda: _pids(server.port, 2), "two workers")
        with Connection(server.port) as connection:
            connection.send("/deadlock/a")
            eventually(lambda: HANG in server.stderr, "the hang is told of")
            # uvicorn's supervisor replaces who has died.
            eventually(lambda: _pids(server.port, 2) - first, "another worker")
        assert len(first & _pids(server.port, 2)) == 1
        assert server.stderr.count(HANG) == 1


def test_a_single_server_ends_by_sigabrt(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    env = {**recording.env, "ASYNCGUARD_TEST_ON_HANG": "abort"}
    with serve("uvicorn-asyncio", "tests.e2e.hangs:app", env=env) as server:
        get(server.port, "/pid")
        with Connection(server.port) as connection:
            connection.send("/deadlock/a")
            assert server.process.wait(30) == -signal.SIGABRT
        assert f"{APP}:{marked(APP, 'deadlock')} in deadlock: with lock:" in server.stderr


def _pids(port: int, count: int) -> set[int]:
    """The processes that answer at this time; none unless there are so many."""
    found = set()
    with suppress(OSError, AssertionError):
        for _ in range(60):
            found.add(get(port, "/pid").json())
    return found if len(found) == count else set()
