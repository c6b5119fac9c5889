"""The same application under other servers, and what happens around the requests."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.recording import STALL, Recorded, Recording, marked
from tests.raw_client import Connection, get
from tests.servers import COMMANDS, Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests.e2e.plain:app"
PLAIN = "tests/e2e/plain.py"


def assert_blamed(recorded: Recorded, marker: str, request: str) -> None:
    report = recorded.only
    assert report.line is not None, repr(report)
    assert (report.line.file, report.line.line) == (PLAIN, marked(PLAIN, marker)), repr(report)
    assert report.request == request
    assert report.exact
    assert report.cause == "waiting"
    assert not report.starting


# -- every server ----------------------------------------------------------------------------------

OTHER = [kind for kind in COMMANDS if not kind.startswith("uvicorn")]


@pytest.fixture(scope="module", params=[*OTHER, "uvicorn-asyncio-no-lifespan", "uvicorn-uvloop-no-lifespan"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Recording]]:
    kind, _, without = request.param.partition("-no-")
    recording = Recording(tmp_path_factory.mktemp("reports"))
    options = ["--lifespan", "off"] if without else []
    with serve(kind, APP, *options, env=recording.env) as server:
        with recording.during(server.port):  # the first use of a library may block as well
            for path in ("/hello", "/child/first"):
                assert get(server.port, path).status == 200
        yield server, recording
        server.terminate()
        assert "Traceback" not in server.stdout + server.stderr


@pytest.mark.parametrize("path", ["sleep", "child"])
def test_blocking_line_is_named_on_every_server(served: tuple[Server, Recording], path: str) -> None:
    server, recording = served
    with recording.during(server.port) as recorded:
        assert get(server.port, f"/{path}/well").body == b"done"
    assert_blamed(recorded, path, f"GET /{path}/{{name}}")
    assert recorded.only.call == "time.sleep"
    assert recorded.only.advice is not None
    assert recorded.only.advice.docs == "cures/#sleep"
    assert STALL - 0.01 <= recorded.only.duration <= recorded.elapsed


def test_quiet_requests_block_nobody_on_any_server(served: tuple[Server, Recording]) -> None:
    server, recording = served
    with recording.during(server.port) as recorded, ExitStack() as stack:
        waiting, *quick = [stack.enter_context(Connection(server.port)) for _ in range(8)]
        waiting.send("/awaited")
        for _ in range(5):
            for connection in quick:
                connection.send("/hello")
            for connection in quick:
                assert connection.receive().body == b"hello"
        assert waiting.receive().body == b"done"
    assert recorded.reports == [], str(recorded)


def test_request_that_came_during_a_stall_is_a_victim(served: tuple[Server, Recording], pipe: Path) -> None:
    server, recording = served
    with recording.during(server.port) as recorded, ExitStack() as stack:
        victim, culprit = [stack.enter_context(Connection(server.port)) for _ in range(2)]
        culprit.send(f"/pipe?path={pipe}")
        with pipe.open("wb"):  # opens when the endpoint has opened it for reading
            victim.send("/hello")
            time.sleep(STALL)
        assert culprit.receive().body == b"0"
        assert victim.receive().body == b"hello"
        recording.await_report("GET /pipe")
    assert_blamed(recorded, "read", "GET /pipe")
    assert [each.request for each in recorded.only.victims] == ["GET /hello"]


# -- the beginning and the end ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-trio"])
def test_first_and_last_request(kind: str, recording: Recording, pipe: Path) -> None:
    """The very first request is watched, and one that still blocks when the server is told to stop.

    The server ends with the report, even if the hook takes its time.
    """
    with serve(kind, APP, env={**recording.env, "ASYNCGUARD_TEST_HOOK": "slow"}) as server:
        assert get(server.port, "/sleep/first").body == b"done"
        with Connection(server.port) as last:
            last.send(f"/pipe?path={pipe}")
            with pipe.open("wb"):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(STALL)
            assert last.receive().body == b"0"
        assert server.process.wait(20) in (0, -signal.SIGTERM)
    first, second = recording.read().reports
    assert first.line is not None
    assert second.line is not None
    assert [first.line.line, second.line.line] == [marked(PLAIN, "sleep"), marked(PLAIN, "read")]
    assert [first.request, second.request] == ["GET /sleep/{name}", "GET /pipe"]


def test_two_workers_report_each_for_itself(recording: Recording) -> None:
    with serve("uvicorn-asyncio", APP, "--workers", "2", env=recording.env) as server:

        def both() -> bool:
            # While one worker is blocked, the other takes the next connection.
            with ExitStack() as stack:
                connections = [stack.enter_context(Connection(server.port)) for _ in range(4)]
                for connection in connections:
                    connection.send("/sleep/well")
                assert [connection.receive().status for connection in connections] == [200] * 4
            return len(set(recording.read().pids)) == 2

        eventually(both, "reports of both workers")
        recorded = recording.read()
        server.terminate()
        eventually(lambda: not server.remnants(), "the workers have ended as well")
    assert server.pid not in recorded.pids
    # Where several requests share a stall, no single one of them is accused.
    assert {report.request for report in recorded.reports} <= {"GET /sleep/{name}", None}
    named = {
        pid
        for pid, report in zip(recorded.pids, recorded.reports, strict=True)
        if report.line is not None and report.line.line == marked(PLAIN, "sleep")
    }
    assert named == set(recorded.pids)
    # Each worker counts its own.
    assert sum(report.id == 1 for report in recorded.reports) == 2


# -- errors ----------------------------------------------------------------------------------------


def test_failing_handler_is_answered_as_ever(recording: Recording) -> None:
    with serve("uvicorn-asyncio", APP, env=recording.env) as server:
        with recording.during(server.port) as recorded:
            response = get(server.port, "/failing")
            assert get(server.port, "/hello").status == 200
        assert response.status == 500
        assert response.body == b"Internal Server Error"
        assert_blamed(recorded, "failing", "GET /failing")
        eventually(lambda: "handler's own error" in server.stderr, "the error is logged")
        server.terminate()
        assert server.stderr.count("LookupError: the handler's own error") == 1
        assert server.stderr.count("Traceback") == 1


def test_failing_hook_is_logged_once_and_harms_nobody(recording: Recording) -> None:
    env = {**recording.env, "ASYNCGUARD_TEST_HOOK": "fails"}
    with serve("uvicorn-asyncio", APP, env=env) as server:
        with recording.during(server.port) as recorded:
            for _ in range(3):
                assert get(server.port, "/sleep/well").body == b"done"
        assert len(recorded.reports) == 3
        server.terminate()
        assert server.stderr.count("the on_block hook") == 1
        assert server.stderr.count("ValueError: the hook's own error") == 1
        assert server.stderr.count("Traceback") == 1
