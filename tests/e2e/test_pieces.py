"""The loop held in small pieces: no stall each, but too much together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pieces import PIECE, PIECES
from tests.e2e.recording import Recording, marked
from tests.raw_client import WebSocket, get
from tests.servers import Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests/e2e/pieces.py"


@dataclass
class Guarded:
    server: Server
    recording: Recording
    busy_file: Path

    @property
    def port(self) -> int:
        return self.server.port

    def busy(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.busy_file.read_text().splitlines()]

    def await_busy(self, count: int) -> list[dict[str, Any]]:
        eventually(lambda: len(self.busy()) >= count, f"{count} busy reports")
        return self.busy()


@pytest.fixture(scope="module", params=["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-asyncio"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Recording, Path]]:
    folder = tmp_path_factory.mktemp("reports")
    recording, busy_file = Recording(folder), folder / "busy.jsonl"
    env = {**recording.env, "ASYNCGUARD_TEST_BUSY": str(busy_file)}
    with serve(request.param, "tests.e2e.pieces:app", env=env) as server:
        with recording.during(server.port):
            get(server.port, "/few-pieces")
        yield server, recording, busy_file
        server.terminate()
        assert "Traceback" not in server.stderr


@pytest.fixture
def guarded(server: tuple[Server, Recording, Path]) -> Guarded:
    """With nothing told so far."""
    server[2].write_text("")
    return Guarded(*server)


@pytest.mark.parametrize("kind", ["computing", "waiting"])
def test_many_pieces_are_no_stall_but_a_busy_request(guarded: Guarded, kind: str) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        truth = get(guarded.port, f"/pieces/{kind}").json()
    assert recorded.reports == [], str(recorded)
    (busy,) = guarded.await_busy(1)
    assert busy["request"] == "GET /pieces/{kind}"
    assert PIECE * PIECES * 0.8 <= busy["loop_time"] <= truth * 1.2
    assert busy["loop_time"] <= busy["window"]
    assert busy["longest"] >= PIECE * 0.8
    assert PIECES / 4 <= busy["turns"] <= PIECES + 1
    assert busy["line"]["line"] == marked(APP, "pieces")
    assert busy["line"]["function"] == "pieces"
    assert busy["advice"]["docs"] == "cures/#busy-requests"


@pytest.mark.parametrize("path", ["/few-pieces", "/slow-pieces"])
def test_few_pieces_or_over_a_long_time_are_nothing(guarded: Guarded, path: str) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        assert get(guarded.port, path).json() == "done"
    # Reports come in order: once this one is there, one for the other request would be.
    get(guarded.port, "/pieces/computing")
    assert [busy["request"] for busy in guarded.await_busy(1)] == ["GET /pieces/{kind}"]
    assert recorded.reports == [], str(recorded)


def test_a_stall_does_not_count_again_in_pieces(guarded: Guarded) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        get(guarded.port, "/stall-and-pieces")
    get(guarded.port, "/pieces/computing")
    assert [busy["request"] for busy in guarded.await_busy(1)] == ["GET /pieces/{kind}"]
    assert recorded.only.line is not None
    assert recorded.only.line.line == marked(APP, "stall")


def test_a_busy_websocket_is_told_of_once_while_it_lives(guarded: Guarded) -> None:
    with guarded.recording.during(guarded.port) as recorded, WebSocket(guarded.port, "/chat") as websocket:

        def say(seconds: float) -> None:
            websocket.send(str(seconds))
            assert websocket.receive() == "done"

        for _ in range(300):
            if guarded.busy():
                break
            say(0.01)
        else:
            pytest.fail("not told of")
        for _ in range(30):
            say(0.01)
    (busy,) = guarded.busy()
    assert busy["request"] == "WS /chat"
    assert recorded.reports == [], str(recorded)


def test_a_burst_of_ready_callbacks_is_one_stall(guarded: Guarded) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        truth = get(guarded.port, "/burst").json()
    report = recorded.only
    assert truth >= PIECE * PIECES
    assert abs(report.duration - truth) <= max(0.2 * truth, 0.01)
    assert report.line is not None
    assert report.line.line in (marked(APP, "burst"), *range(marked(APP, "loop"), marked(APP, "loop") + 2))
    assert report.request == "GET /burst"
    assert report.task is None
    assert report.pieces > 1
