"""What a FastAPI application under uvicorn is told of its stalls, on asyncio and on uvloop.

That every kind of call is named, wherever it is, is the business of `test_pitfalls`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from asyncguard import BlockReport
from asyncguard.events import Cause
from tests.e2e.recording import STALL, THRESHOLD, Recording, marked
from tests.raw_client import WebSocket, get
from tests.servers import Server, serve

pytestmark = pytest.mark.e2e

SCENARIOS = "tests/e2e/scenarios.py"


@dataclass
class Guarded:
    """The running application."""

    server: Server
    recording: Recording

    @property
    def port(self) -> int:
        return self.server.port


@pytest.fixture(scope="module", params=["uvicorn-asyncio", "uvicorn-uvloop"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    recording = Recording(tmp_path_factory.mktemp("reports"))
    app = "tests.e2e.scenarios:app"
    with serve(request.param, app, env=recording.env) as server:
        with recording.during(server.port):
            # What the start-up blocks, and the first use of a library, is nobody's concern here.
            assert get(server.port, "/hello").status == 200
        yield Guarded(server, recording)
        server.terminate()
        assert "Traceback" not in server.stderr


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
    Case("/fan-out", "fan_out", "time.sleep", "unbounded-fan-out"),
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
