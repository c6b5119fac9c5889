"""Beginnings and ends: of servers, loops and processes, and of all that a request makes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

import asyncguard
from asyncguard import BlockReport
from tests.e2e.recording import STALL, THRESHOLD, Recorded, Recording, marked
from tests.raw_client import Connection, Truncated, WebSocket, get
from tests.servers import HOST, ROOT, eventually, free_port, serve, start

pytestmark = pytest.mark.e2e

APP = "tests.e2e.lifecycles:app"
FILE = "tests/e2e/lifecycles.py"


def blamed(report: BlockReport, marker: str, file: str = FILE) -> bool:
    """Whether the report names the line that bears the marker."""
    return report.line is not None and (report.line.file, report.line.line) == (file, marked(file, marker))


def pid_of(port: int) -> int | None:
    """The process that answers; `None` while nobody does."""
    with suppress(Truncated, ConnectionError):
        return int(get(port, "/hello").body.split()[-1])
    return None


# -- the beginning and the end ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-asyncio", "hypercorn-trio"])
def test_start_up_and_shutdown_are_reported_as_what_they_are(kind: str, recording: Recording) -> None:
    """A stall of the start-up harms nobody; the first request and the shutdown are no start-up."""
    env = {**recording.env, "ASYNCGUARD_TEST_LIFESPAN": "slow"}
    with serve(kind, APP, env=env) as server:
        # hypercorn listens before that is over: a request would wait for it.
        eventually(lambda: recording.read().reports, "the report of the start-up")
        assert get(server.port, "/sleep/first").body == b"done"
        assert server.terminate() in (0, -signal.SIGTERM)
        assert "Traceback" not in server.stdout + server.stderr
    reports = recording.read().reports
    assert len(reports) == 3, "\n".join(map(str, reports))
    start_up, first, shutdown = reports
    assert blamed(start_up, "start_up"), repr(start_up)
    assert (start_up.request, start_up.starting, start_up.victims, start_up.advice) == (None, True, (), None)
    assert str(start_up).startswith("start-up blocked the loop for ")
    assert blamed(first, "sleep"), repr(first)
    assert (first.request, first.starting) == ("GET /sleep/{name}", False)
    assert blamed(shutdown, "shutdown"), repr(shutdown)
    assert (shutdown.request, shutdown.starting) == (None, False)


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-asyncio", "hypercorn-trio"])
def test_application_without_a_lifespan(kind: str, recording: Recording, pipe: Path) -> None:
    """It fails when it is asked to start up, and servers go on; nobody tells the guard of the end either."""
    with serve(kind, "tests.e2e.lifecycles:bare", env=recording.env) as server:
        assert get(server.port, "/sleep/first").body == b"done"
        with Connection(server.port) as last:
            last.send(f"/pipe?path={pipe}")
            with pipe.open("wb"):  # opens when the endpoint has opened it for reading
                server.process.send_signal(signal.SIGTERM)
                time.sleep(STALL)
            assert last.receive().body == b"0"
        assert server.process.wait(20) in (0, -signal.SIGTERM)
    first, second = recording.read().reports
    assert blamed(first, "sleep"), repr(first)
    assert blamed(second, "read"), repr(second)
    assert [first.request, second.request] == ["GET /sleep/{name}", "GET /pipe"]
    assert [first.starting, second.starting] == [False, False]


# -- several processes -----------------------------------------------------------------------------

MAIN = """\
import os, time
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
import asyncguard
from tests.e2e.recording import STALL, THRESHOLD, add_barrier, write


async def hello(request):
    return PlainTextResponse(f"hello from {os.getpid()}")


async def slow(request):
    time.sleep(STALL)
    return PlainTextResponse("first")


app = Starlette(routes=[Route("/hello", hello), Route("/slow", slow)])
asyncguard.install(app, block_threshold=THRESHOLD, on_block=write)
add_barrier(app)
"""


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop"])
def test_after_a_reload_the_new_process_reports(kind: str, tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    project = tmp_path / "project"
    project.mkdir()
    source = project / "main.py"
    source.write_text(MAIN)
    env = {**recording.env, "PYTHONPATH": str(ROOT)}
    options = ["--reload", "--reload-dir", str(project), "--reload-delay", "0.05"]
    with serve(kind, "main:app", *options, env=env, cwd=project) as server:
        assert get(server.port, "/slow").body == b"first"
        recording.await_report("GET /slow")
        (old,) = {pid_of(server.port)} - {None}
        # With two lines more above it, so that the reports tell the one file from the other.
        source.write_text("\n\n" + MAIN.replace('"first"', '"second"'))
        os.utime(source, (2e9, 2e9))
        new = eventually(lambda: {pid_of(server.port)} - {None, old}, "a new process answers").pop()
        eventually(lambda: not Path(f"/proc/{old}").exists(), "the old process has ended")
        with recording.during(server.port) as recorded:
            assert get(server.port, "/slow").body == b"second"
        line = MAIN.splitlines().index("    time.sleep(STALL)") + 1
        before = recording.read()
        assert before.pids == [old, new]
        assert [report.line.line for report in before.reports if report.line] == [line, line + 2]
        assert recorded.only.request == "GET /slow"
        assert recorded.only.line is not None
        assert recorded.only.line.source == "time.sleep(STALL)"
        server.terminate()
        eventually(lambda: not server.remnants(), "no process is left")
        assert "Traceback" not in server.stderr


def test_worker_in_place_of_a_killed_one_reports(recording: Recording) -> None:
    with serve("uvicorn-asyncio", APP, "--workers", "2", env=recording.env) as server:

        def answering() -> set[int]:
            # While one worker is blocked, the other takes the next connection.
            with ExitStack() as stack:
                connections = [stack.enter_context(Connection(server.port)) for _ in range(4)]
                for connection in connections[:2]:
                    connection.send("/sleep/well")
                for connection in connections[2:]:
                    connection.send("/hello")
                bodies = [connection.receive().body for connection in connections]
            return {int(body.split()[-1]) for body in bodies[2:]}

        def workers() -> set[int]:
            with suppress(Truncated, ConnectionError):
                seen.update(answering())
            return seen if len(seen) == 2 else set()

        seen: set[int] = set()
        before = set(eventually(workers, "answers of both workers"))
        killed, spared = sorted(before)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{killed}/fd").exists(), "the worker is gone")
        seen.clear()
        after = set(eventually(workers, "answers of both workers again"))
        assert spared in after
        (new,) = after - before

        def named(pid: int) -> bool:
            workers()
            recorded = recording.read()
            return any(
                each == pid and blamed(report, "sleep")
                for each, report in zip(recorded.pids, recorded.reports, strict=True)
            )

        eventually(lambda: named(new), "a report of the new worker")
        server.terminate()
        eventually(lambda: not server.remnants(), "no process is left")
    assert set(recording.read().pids) <= before | after


@pytest.mark.parametrize("what", ["app", "monitor"])
@pytest.mark.parametrize(
    ("kind", "child"),
    [("uvicorn-asyncio", "asyncio"), ("uvicorn-uvloop", "asyncio-uvloop"), ("hypercorn-trio", "trio")],
)
def test_fork_in_a_request(kind: str, child: str, what: str, recording: Recording) -> None:
    """The child leaves the loop, has one of its own and reports what blocks that; the parent goes on."""
    env = {**recording.env, "ASYNCGUARD_TEST_CHILD": child}
    with serve(kind, APP, env=env) as server:
        parent = pid_of(server.port)  # hypercorn serves in a child
        for _ in range(2):
            with recording.during(server.port) as before:
                assert get(server.port, "/sleep/before").body == b"done"
            with recording.during(server.port) as forked:
                assert get(server.port, f"/fork/{what}").body == b"0", server.stderr
            with recording.during(server.port) as after:
                assert get(server.port, "/sleep/after").body == b"done"
            for recorded in (before, after):
                assert recorded.pids == [parent]
                assert blamed(recorded.only, "sleep"), repr(recorded.only)
            theirs = of_others(forked, parent)
            assert [blamed(report, "sleep" if what == "app" else "in_child") for report in theirs] == [True]
            assert theirs[0].victims == ()
        server.terminate()
        assert "Traceback" not in server.stdout + server.stderr
        eventually(lambda: not server.remnants(), "no process is left")


def of_others(recorded: Recorded, pid: int | None) -> list[BlockReport]:
    """The reports that other processes wrote; a fork may be a stall by itself."""
    pairs = zip(recorded.pids, recorded.reports, strict=True)
    return [report for each, report in pairs if each != pid]


# -- several loops ---------------------------------------------------------------------------------


def test_two_loops_in_two_threads(recording: Recording, pipe: Path) -> None:
    """One application, served by two servers: each loop has its own stalls, victims and end."""
    ports = {"asyncio": free_port(), "uvloop": free_port()}
    command = ["tests.e2e.lifecycles", *map(str, ports.values())]
    with start(command, ports["asyncio"], env=recording.env) as server:
        server.await_port()
        eventually(lambda: pid_of(ports["uvloop"]), "the other server answers")
        for blocked, free in (("asyncio", "uvloop"), ("uvloop", "asyncio")):
            assert not reports_by(blocked, recording)
            with recording.during(ports[blocked]) as recorded, ExitStack() as stack:
                culprit, victim = [stack.enter_context(Connection(ports[blocked])) for _ in range(2)]
                culprit.send(f"/pipe?path={pipe}")
                with pipe.open("wb"):
                    victim.send("/hello")
                    # The other loop answers while this one is blocked.
                    for _ in range(5):
                        assert pid_of(ports[free]) == server.pid
                    time.sleep(STALL)
                assert culprit.receive().body == b"0"
                assert victim.receive().status == 200
                # Whoever comes right after a stall may have waited for it: not before that is over.
                eventually(partial(reports_by, blocked, recording), "the report")
            assert blamed(recorded.only, "read"), repr(recorded.only)
            assert (recorded.only.thread, recorded.only.request) == (blocked, "GET /pipe")
            assert [each.request for each in recorded.only.victims] == ["GET /hello"]
        # Both at the same time.
        with recording.during(ports["asyncio"]) as recorded, ExitStack() as stack:
            connections = [stack.enter_context(Connection(port)) for port in ports.values()]
            for connection in connections:
                connection.send("/sleep/well")
            assert [connection.receive().body for connection in connections] == [b"done", b"done"]
            with recording.during(ports["uvloop"]):
                pass
        assert sorted(report.thread for report in recorded.reports) == ["asyncio", "uvloop"]
        assert all(blamed(report, "sleep") for report in recorded.reports), str(recorded)
        # One ends, and the other goes on.
        server.process.send_signal(signal.SIGUSR1)
        eventually(lambda: pid_of(ports["asyncio"]) is None, "the first server has ended")
        with recording.during(ports["uvloop"]) as recorded:
            assert get(ports["uvloop"], "/sleep/on").body == b"done"
        assert blamed(recorded.only, "sleep"), repr(recorded.only)
        assert recorded.only.thread == "uvloop"
        assert server.terminate() == 0
        assert server.stdout.endswith("left: []\n"), server.stdout
        assert "Traceback" not in server.stderr


def reports_by(thread: str, recording: Recording) -> list[BlockReport]:
    return [report for report in recording.read().reports if report.thread == thread]


BACKENDS: dict[str, Any] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


@pytest.mark.parametrize("with_lifespan", [True, False], ids=["lifespan", "no-lifespan"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loops_that_come_and_go(backend: str, with_lifespan: bool) -> None:
    """As in a test suite: one application, and a new loop for each test or even for each request."""
    reports: list[BlockReport] = []
    threads = asyncguard_threads()
    app = small_app(reports)
    for count in range(1, 5):
        client = TestClient(app, **BACKENDS[backend])
        with client if with_lifespan else ExitStack():
            assert client.get("/slow").text == "done"
        eventually(lambda count=count: len(of_slow(reports)) == count, "the report")  # type: ignore[misc]
    found = of_slow(reports)
    assert all(blamed(report, "of_small_app", "tests/e2e/test_lifecycles.py") for report in found), found
    assert {report.victims for report in found} == {()}
    eventually(lambda: asyncguard_threads() <= threads, "the watches have ended")


def of_slow(reports: list[BlockReport]) -> list[BlockReport]:
    """On a slow machine, a client's own start may be a stall as well."""
    return [report for report in reports if report.request == "GET /slow"]


def small_app(reports: list[BlockReport]) -> asyncguard.BlockingMiddleware:
    async def slow(_: Request) -> Response:
        time.sleep(STALL)  # blocks: of_small_app
        return PlainTextResponse("done")

    return asyncguard.BlockingMiddleware(
        Starlette(routes=[Route("/slow", slow)]), threshold=THRESHOLD, on_block=reports.append, log=False
    )


def asyncguard_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncguard-")}


# -- a storm ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "hook"), [("asyncio", "quick"), ("uvloop", "quick"), ("asyncio", "slow")])
def test_five_hundred_stalls_a_second(loop: str, hook: str) -> None:
    """For ten seconds: the log and the memory stay calm, none is lost uncounted, and the loop gets on."""
    command = [sys.executable, "-m", "tests.e2e.storm", loop, hook]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    print(done.stdout)
    found = json.loads(done.stdout)
    assert median(found["guarded"]) >= 0.7 * median(found["bare"])
    assert found["told"] >= found["stalls"]
    assert found["reported"] > 0
    assert (found["dropped"] > 0) is (hook == "slow")
    # The first of each line; which line has a stall as short as that depends on where the look falls.
    assert 1 <= found["logged"] <= 50
    assert found["growth"] <= 8 << 20


# -- what is left ----------------------------------------------------------------------------------


def use_in_every_way(port: int) -> None:
    """Requests that end well, fail, are cancelled, lose their client or block; and websockets."""
    with Connection(port) as connection:
        for path in ("/hello", "/with-tasks", "/cancelled", "/with-tasks"):
            assert connection.get(path).status == 200
    assert get(port, "/failing").status == 500
    with WebSocket(port, "/echo") as websocket:
        for text in "abc":
            websocket.send(text)
            assert websocket.receive() == text
    with Connection(port) as gone:  # in the middle of the response
        gone.send("/endless")
        assert gone.receive_head()[0] == 200
    with Connection(port) as gone:  # in the middle of the request
        gone.socket.sendall(b"POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nhalf")
    with socket.create_connection((HOST, port)) as handshake:  # before the websocket is one
        handshake.sendall(
            b"GET /echo HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-trio"])
def test_nothing_is_left_of_requests(kind: str, recording: Recording) -> None:
    """After thousands of them the server has no more of anything than after the first few."""
    with serve(kind, APP, env=recording.env) as server:

        def many(rounds: int) -> None:
            for number in range(rounds):
                use_in_every_way(server.port)
                if number % 10 == 0:
                    assert get(server.port, "/blink").body == b"done"

        def quiet() -> bool:
            now.clear()
            now.update(connection.get("/counts").json())
            return now["in flight"] == 1

        def no_more() -> bool:
            return quiet() and not more()

        def more() -> dict[str, tuple[int, int]]:
            return {kind: (before.get(kind, 0), now[kind]) for kind in now if now[kind] > before.get(kind, 0)}

        now: dict[str, int] = {}
        many(5)
        with Connection(server.port) as connection:
            eventually(quiet, "all that was begun has ended")
        before = dict(now)
        many(400)
        with Connection(server.port) as connection:
            # On one connection: hypercorn gives one up some seconds after its client.
            with suppress(AssertionError):
                eventually(no_more, "nothing is left")
        assert more() == {}
    # Of 41, as far as the machine was not too busy to tell.
    assert len(recording.read().reports) >= 10
