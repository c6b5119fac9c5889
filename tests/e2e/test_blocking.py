"""What a FastAPI application under uvicorn is told of its stalls, on asyncio and on uvloop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from asyncguard import BlockReport
from asyncguard.events import Cause
from tests.e2e.recording import STALL, THRESHOLD, Recording, marked
from tests.raw_client import Connection, WebSocket, get
from tests.servers import Server, serve

pytestmark = pytest.mark.e2e

SCENARIOS = "tests/e2e/scenarios.py"
QUIET = ("/awaited", "/thread", "/to-thread", "/upstream")
"""Requests that take long and block nobody."""


@dataclass
class Guarded:
    """The running application."""

    kind: str
    server: Server
    upstream: Server
    recording: Recording

    @property
    def port(self) -> int:
        return self.server.port


@pytest.fixture(scope="module", params=["uvicorn-asyncio", "uvicorn-uvloop"])
def guarded(
    request: pytest.FixtureRequest,
    upstream: Server,
    upstream_env: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guarded]:
    recording = Recording(tmp_path_factory.mktemp("reports"))
    app = "tests.e2e.scenarios:app"
    with serve(request.param, app, env={**upstream_env, **recording.env}) as server:
        with recording.during(server.port):
            # What the start-up blocks, and the first use of a library, is nobody's concern here.
            for path in ("/hello", *QUIET):
                ask_three_times_at_once(server.port, path)
        yield Guarded(request.param, server, upstream, recording)
        server.terminate()
        assert "Traceback" not in server.stderr


def ask_three_times_at_once(port: int, path: str) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(port)) for _ in range(3)]
        for connection in connections:
            connection.send(path)
        assert [connection.receive().status for connection in connections] == [200] * 3


@dataclass(frozen=True)
class Case:
    """A request that blocks the loop, and what is to be said of it.

    Attributes:
        path: What to ask for.
        marker: The name at the line that is to blame.
        call: What that line calls; `None` where the line has several calls or none.
        advice: The anchors in the documentation that will do.
        cause: Why it blocked; `None` where that depends on the machine.
        template: The path of the route, where it differs from `path`.
        least: The shortest time it can have blocked, in seconds.
        exact: Whether the line itself was seen, not only its endpoint.
    """

    path: str
    marker: str
    call: str | None
    advice: str | tuple[str, ...]
    cause: Cause | None = "waiting"
    template: str = ""
    least: float = STALL
    exact: bool = True


SLEEP = ("time.sleep", "sleep")

CASES = [
    Case("/sleep", "sleep", *SLEEP),
    Case("/requests", "requests", "requests.get", "synchronous-http"),
    Case("/loop/4000000", "loop", None, "computing", "cpu", "/loop/{count}", THRESHOLD),
    Case("/json", "json", "json.dumps", "big-json", "cpu", least=THRESHOLD),
    Case("/serialised", "serialisation", "", ("computing", "big-json"), "cpu", least=THRESHOLD, exact=False),
    Case("/fsync", "fsync", None, "files", None),
    Case("/clients", "clients", "httpx.AsyncClient", "client-per-request", "cpu", least=THRESHOLD),
    Case("/create-task", "create_task", *SLEEP),
    Case("/gather", "gather", *SLEEP),
    Case("/task-group", "task_group", *SLEEP),
    Case("/fan-out", "fan_out", "time.sleep", "unbounded-fan-out"),
    Case("/background", "background", *SLEEP),
    Case("/stream", "stream", *SLEEP),
    Case("/dependency/a", "dependency", *SLEEP, template="/dependency/{name}"),
    Case("/asgi/items/3", "asgi_middleware", *SLEEP, template="/asgi/items/{item}"),
    Case("/base/items/3", "base_middleware", *SLEEP, template="/base/items/{item}"),
    Case("/mounted/acme/items/3", "mounted", *SLEEP, template="/mounted/{tenant}/items/{item}"),
    Case("/nested/acme/items/3", "nested", *SLEEP, template="/nested/{tenant}/items/{item}"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.marker)
def test_blocking_line_is_named(guarded: Guarded, case: Case) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        response = get(guarded.port, case.path)
    assert response.status == 200
    check(recorded.only, case, f"GET {case.template or case.path}", recorded.elapsed)
    assert recorded.pids == [guarded.server.pid]


def test_middleware_is_not_blamed_for_serialisation(guarded: Guarded) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        assert get(guarded.port, "/quick/rows").status == 200
    advice = ("computing", "big-json")
    case = Case("", "serialisation_behind", "", advice, "cpu", least=THRESHOLD, exact=False)
    check(recorded.only, case, "GET /quick/rows", recorded.elapsed)


def check(report: BlockReport, case: Case, request: str, elapsed: float) -> None:
    assert report.line is not None, repr(report)
    assert report.line.file == SCENARIOS
    assert report.line.line == marked(SCENARIOS, case.marker), repr(report)
    assert report.line.source.endswith(f"# blocks: {case.marker}")
    assert report.exact is case.exact
    assert report.request == request
    if case.call is not None:
        assert report.call == case.call
    if case.cause is not None:
        assert report.cause == case.cause
    # uvloop tells when code of no guarded turn began to within a tenth of the threshold.
    assert case.least - THRESHOLD / 5 <= report.duration <= elapsed
    anchors = (case.advice,) if isinstance(case.advice, str) else case.advice
    assert report.advice is not None
    assert report.advice.docs in [f"cures/#{anchor}" for anchor in anchors]
    assert not report.starting


def test_duration_is_of_the_stall_alone(guarded: Guarded) -> None:
    """Not of the request around it, which takes longer."""
    with guarded.recording.during(guarded.port) as recorded:
        assert get(guarded.port, "/sleep").status == 200
    assert STALL <= recorded.only.duration < 3 * STALL + 1.0


def test_read_of_a_file_that_takes_long(guarded: Guarded, tmp_path: Path) -> None:
    """A pipe gives nothing until the test lets it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with guarded.recording.during(guarded.port) as recorded, Connection(guarded.port) as connection:
        connection.send(f"/pipe?path={pipe}")
        with pipe.open("wb") as writer:  # opens when the endpoint has opened it for reading
            time.sleep(STALL)
            writer.write(b"12345")
        assert connection.receive().json() == 5
    case = Case("/pipe", "read", "….read_bytes", "files")
    check(recorded.only, case, "GET /pipe", recorded.elapsed)


def test_websocket(guarded: Guarded) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        with WebSocket(guarded.port, "/rooms/blue") as websocket:
            websocket.send("hello")
            assert websocket.receive() == "blue: hello"
    check(recorded.only, Case("", "websocket", *SLEEP), "WS /rooms/{room}", recorded.elapsed)


@pytest.mark.parametrize(("path", "body"), [("/stream", b"first last"), ("/background", b"sent before")])
def test_response_around_a_stall_is_whole(guarded: Guarded, path: str, body: bytes) -> None:
    with guarded.recording.during(guarded.port):
        assert get(guarded.port, path).body == body


# -- quiet -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", QUIET)
def test_waiting_request_blocks_nobody(guarded: Guarded, path: str) -> None:
    with guarded.recording.during(guarded.port) as recorded:
        ask_three_times_at_once(guarded.port, path)
    assert recorded.reports == [], str(recorded)


def test_crowd_of_quick_requests_blocks_nobody(guarded: Guarded) -> None:
    with guarded.recording.during(guarded.port) as recorded, ExitStack() as stack:
        connections = [stack.enter_context(Connection(guarded.port)) for _ in range(16)]
        for _ in range(20):
            for connection in connections:
                connection.send("/hello")
            for connection in connections:
                assert connection.receive().json() == "hello"
    assert recorded.reports == [], str(recorded)


# -- who suffered ----------------------------------------------------------------------------------


def test_who_asks_one_thing_after_the_other_never_waits(guarded: Guarded) -> None:
    """The next request comes right after the stall, but it was sent after the answer."""
    with guarded.recording.during(guarded.port) as recorded, Connection(guarded.port) as connection:
        for _ in range(5):
            for path in ("/sleep", "/hello", "/hello"):
                assert connection.get(path).status == 200
    assert [report.request for report in recorded.reports] == ["GET /sleep"] * 5
    assert [victim.request for report in recorded.reports[:-1] for victim in report.victims] == []


def test_victims_are_those_who_were_due(guarded: Guarded) -> None:
    """Those who came during the stall and those whose upstream answered during it; nobody else.

    Every step waits for the one before it: gates at the upstream show that a request has got there.
    """

    def at_gate(name: str, act: str) -> None:
        assert get(guarded.upstream.port, f"/gates/{guarded.kind}-{name}/{act}").status == 200

    def gate(name: str) -> str:
        return f"{guarded.kind}-{name}"

    with guarded.recording.during(guarded.port) as recorded, ExitStack() as stack:

        def connect() -> Connection:
            return stack.enter_context(Connection(guarded.port))

        bystander, due, culprit, open_before = connect(), connect(), connect(), connect()
        assert open_before.get("/hello").status == 200
        bystander.send(f"/wait/{gate('bystander')}")
        at_gate("bystander", "arrived")
        due.send(f"/due/{gate('due')}")
        at_gate("due", "arrived")
        culprit.send(f"/fetch/{gate('culprit')}")
        at_gate("culprit", "arrived")
        # From here on the loop is blocked.
        at_gate("due", "open")
        open_before.send("/items/1")
        newcomers = [connect(), connect()]
        for newcomer in newcomers:
            newcomer.send("/hello")
        time.sleep(STALL)
        at_gate("culprit", "open")
        for connection in (culprit, due, open_before, *newcomers):
            assert connection.receive().status == 200
        # Whoever has a turn right after a stall counts as having waited for it: not before that is over.
        guarded.recording.await_report("GET /fetch/{gate}")
        at_gate("bystander", "open")
        assert bystander.receive().json() == "through"

    report = recorded.only
    assert report.request == "GET /fetch/{gate}"
    assert report.line is not None
    assert report.line.line == marked(SCENARIOS, "gate")
    assert sorted(victim.request for victim in report.victims) == [
        "GET /due/{gate}",
        "GET /hello",
        "GET /hello",
        "GET /items/{item}",
    ]
    waits = [victim.waited for victim in report.victims]
    assert waits == sorted(waits, reverse=True)
    assert all(STALL <= wait <= recorded.elapsed for wait in waits)
    assert "4 requests waited, the longest up to" in str(report)


# -- what is logged --------------------------------------------------------------------------------


def test_each_line_is_logged_once(guarded: Guarded) -> None:
    for _ in range(2):
        with guarded.recording.during(guarded.port):
            get(guarded.port, "/sleep")
    logged = [line for line in guarded.server.stderr.splitlines() if line.startswith("GET /sleep blocked")]
    assert len(logged) == 1
    where = f"{SCENARIOS}:{marked(SCENARIOS, 'sleep')} in sleep: time.sleep(STALL)"
    assert where in logged[0]
    assert "(cures/#sleep)" in logged[0]
