"""Who is accused, and who is said to have waited, when many requests are in flight."""

from __future__ import annotations

import resource
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from asyncguard import BlockReport
from tests.e2e.recording import STALL, Recording, marked
from tests.raw_client import Connection, get
from tests.servers import HOST, Server, eventually, serve

pytestmark = pytest.mark.e2e

CROWD = "tests/e2e/crowd.py"
MANY = 1000
FILES = 4 * MANY


@dataclass
class Crowd:
    """The running application."""

    server: Server
    upstream: Server
    recording: Recording

    @property
    def port(self) -> int:
        return self.server.port

    def new_gate(self) -> Gate:
        return Gate(self.upstream.port, uuid.uuid4().hex)


@dataclass
class Gate:
    """A gate at the upstream, which holds up those who ask for it until it is opened."""

    port: int
    name: str

    def await_somebody(self) -> None:
        self._ask("arrived")

    def await_count(self, **count: int) -> None:
        """Wait until so many are `waiting` there, or have `passed` and been answered."""

        def counted() -> bool:
            return get(self.port, f"/gates/{self.name}/count").json().items() >= count.items()  # type: ignore[no-any-return]

        eventually(counted, f"{count} at a gate")

    def open(self) -> None:
        self._ask("open")

    def _ask(self, act: str) -> None:
        assert get(self.port, f"/gates/{self.name}/{act}").status == 200


@pytest.fixture(scope="module")
def many_files() -> Iterator[None]:
    """Let this process, and those that it starts, open as many files as a thousand requests need."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module", params=["uvicorn-asyncio", "uvicorn-uvloop"])
def crowd(
    request: pytest.FixtureRequest, many_files: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    recording = Recording(tmp_path_factory.mktemp("reports"))
    quiet = ("--log-level", "warning")
    with ExitStack() as stack:
        # One of its own, which may have as many connections.
        upstream = stack.enter_context(serve("uvicorn-asyncio", "tests.e2e.upstream:app", *quiet))
        env = {"ASYNCGUARD_TEST_UPSTREAM": f"http://{HOST}:{upstream.port}", **recording.env}
        server = stack.enter_context(serve(request.param, "tests.e2e.crowd:app", *quiet, env=env))
        running = Crowd(server, upstream, recording)
        gate = running.new_gate()
        gate.open()
        with recording.during(server.port):
            # What the start-up blocks, and the first use of a library, is nobody's concern here.
            for path in ("block", "answered", "bystander", "parked", "parked-and-due"):
                for prefix in ("", "/behind"):
                    assert get(server.port, f"{prefix}/{path}/{gate.name}").status == 200
            for path in ("/first/0", "/second/0", "/new/1", "/open/1"):
                for prefix in ("", "/behind"):
                    assert get(server.port, prefix + path).status == 200
        yield running
        server.terminate()
        assert "Traceback" not in server.stderr


def assert_accused(report: BlockReport, request: str, marker: str) -> None:
    assert report.request == request, repr(report)
    assert report.line is not None, repr(report)
    assert (report.line.file, report.line.line) == (CROWD, marked(CROWD, marker)), repr(report)
    assert report.exact
    assert report.cause == "waiting"


# -- who suffered ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/behind"], ids=["plain", "behind-three-base-middlewares"])
def test_victims_are_those_who_were_due_with_their_delays(crowd: Crowd, prefix: str) -> None:
    """Those who came during the stall, whose upstream answered or whose sleep ended in it; nobody else.

    Every step waits for the one before it: gates at the upstream show that a request has got there.
    """
    bystanders, answer, culprits = (crowd.new_gate() for _ in range(3))
    with crowd.recording.during(crowd.port) as recorded, ExitStack() as stack:

        def connect() -> Connection:
            return stack.enter_context(Connection(crowd.port))

        bystander, answered, timer, culprit, open_before = (connect() for _ in range(5))
        assert open_before.get("/new/1").status == 200
        bystander.send(f"{prefix}/bystander/{bystanders.name}")
        bystanders.await_somebody()
        answered.send(f"{prefix}/answered/{answer.name}")
        answer.await_somebody()
        timer.send(f"{prefix}/timer/{answer.name}/0.5")
        assert get(crowd.port, f"/asleep/{answer.name}").status == 200
        due_before = time.monotonic() + 0.5
        began = time.monotonic()
        culprit.send(f"/block/{culprits.name}")
        culprits.await_somebody()
        # From here on the loop is blocked.
        answer.open()
        answer.await_count(passed=1)
        was_answered = time.monotonic()
        open_before.send(f"{prefix}/open/2")
        newcomer = connect()
        newcomer.send(f"{prefix}/new/3")
        had_sent = time.monotonic()
        time.sleep(due_before - time.monotonic() + STALL)
        culprits.open()
        assert culprit.receive().status == 200
        answered_at = answered.receive().json()
        opened_at = open_before.receive().json()
        new_at = newcomer.receive().json()
        timer_due, timer_at = timer.receive().json()
        # Whoever has a turn right after a stall counts as having waited for it: not before that is over.
        crowd.recording.await_report("GET /block/{gate}")
        bystanders.open()
        assert bystander.receive().json() == "through"

    report = recorded.only
    assert_accused(report, "GET /block/{gate}", "gate")
    waited = {victim.request.removeprefix(f"GET {prefix}"): victim.waited for victim in report.victims}
    assert sorted(waited) == ["/answered/{gate}", "/new/{item}", "/open/{item}", "/timer/{name}/{seconds}"]
    assert len(report.victims) == 4
    assert "4 requests waited, the longest up to" in str(report)
    waits = [victim.waited for victim in report.victims]
    assert waits == sorted(waits, reverse=True)

    # Since when in the stall they waited is not known of all: so long at least, and so long at most.
    for path, due, at in [
        ("/answered/{gate}", was_answered, answered_at),
        ("/timer/{name}/{seconds}", timer_due, timer_at),
        ("/open/{item}", had_sent, opened_at),
        ("/new/{item}", had_sent, new_at),
    ]:
        assert at - due >= STALL
        assert at - due - 0.01 <= waited[path] <= at - began + 0.01, (path, report)


@pytest.mark.parametrize("prefix", ["", "/behind"], ids=["plain", "behind-three-base-middlewares"])
def test_wait_of_a_sleeper_begins_when_its_sleep_should_have_ended(crowd: Crowd, prefix: str) -> None:
    """That the loop was blocked before then is nothing to it."""
    culprits = crowd.new_gate()
    with crowd.recording.during(crowd.port) as recorded, ExitStack() as stack:
        sleepers = [stack.enter_context(Connection(crowd.port)) for _ in range(3)]
        for number, (sleeper, seconds) in enumerate(zip(sleepers, (0.5, 0.6, 0.7), strict=True)):
            name = f"{culprits.name}-{number}"
            sleeper.send(f"{prefix}/timer/{name}/{seconds}")
            assert get(crowd.port, f"/asleep/{name}").status == 200
        all_due = time.monotonic() + 0.7
        culprit = stack.enter_context(Connection(crowd.port))
        culprit.send(f"/block/{culprits.name}")
        culprits.await_somebody()
        # From here on the loop is blocked.
        time.sleep(all_due - time.monotonic() + STALL)
        culprits.open()
        assert culprit.receive().status == 200
        delays = [at - due for due, at in (sleeper.receive().json() for sleeper in sleepers)]
        crowd.recording.await_report("GET /block/{gate}")

    report = recorded.only
    assert_accused(report, "GET /block/{gate}", "gate")
    assert STALL <= min(delays) <= max(delays) <= report.duration - 0.1, "not all were due in the stall"
    assert [victim.request for victim in report.victims] == [f"GET {prefix}/timer/{{name}}/{{seconds}}"] * 3
    for victim, delay in zip(report.victims, delays, strict=True):
        assert abs(victim.waited - delay) <= max(delay / 5, 0.01), (report.victims, delays)


def test_who_has_been_answered_does_not_wait(crowd: Crowd) -> None:
    """Behind `BaseHTTPMiddleware` it would: the server learns of its end some turns after the last byte."""
    for _ in range(5):
        with crowd.recording.during(crowd.port) as recorded, ExitStack() as stack:
            answered, culprit = [stack.enter_context(Connection(crowd.port)) for _ in range(2)]
            assert culprit.get("/open/1").status == 200
            assert answered.get("/new/1").status == 200
            assert culprit.get(f"/first/{STALL}").status == 200
            crowd.recording.await_report("GET /first/{seconds}")
        assert recorded.only.victims == ()


# -- several culprits ------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [(STALL, STALL), (STALL, STALL / 2)], ids=["equal", "unequal"])
def test_two_culprits_in_one_iteration_are_both_named(crowd: Crowd, seconds: tuple[float, float]) -> None:
    """Both become ready while a third one blocks, and then run one right after the other."""
    culprits = crowd.new_gate()
    with crowd.recording.during(crowd.port) as recorded, ExitStack() as stack:
        blocker, first, second = (stack.enter_context(Connection(crowd.port)) for _ in range(3))
        for connection in (first, second):
            assert connection.get("/open/1").status == 200
        blocker.send(f"/block/{culprits.name}")
        culprits.await_somebody()
        # From here on the loop is blocked.
        first.send(f"/first/{seconds[0]}")
        second.send(f"/second/{seconds[1]}")
        time.sleep(STALL)
        opened = time.monotonic()
        culprits.open()
        for connection in (blocker, first, second):
            assert connection.receive().status == 200
        elapsed = time.monotonic() - opened

    by_request = {report.request: report for report in recorded.reports}
    assert len(recorded.reports) == 3, str(recorded)
    assert_accused(by_request["GET /block/{gate}"], "GET /block/{gate}", "gate")
    for name, least in zip(("first", "second"), seconds, strict=True):
        report = by_request[f"GET /{name}/{{seconds}}"]
        assert_accused(report, f"GET /{name}/{{seconds}}", name)
        assert report.duration >= least
    # The later one had to wait for the earlier, and each has its own part of the time.
    earlier, later = (report for report in recorded.reports if report.request != "GET /block/{gate}")
    assert later.request in [victim.request for victim in earlier.victims]
    assert earlier.request not in [victim.request for victim in later.victims]
    parts = [by_request[f"GET /{name}/{{seconds}}"].duration for name in ("first", "second")]
    assert sum(parts) <= elapsed


def test_who_waits_for_two_stalls_in_a_row_is_a_victim_of_both(crowd: Crowd) -> None:
    culprits = crowd.new_gate()
    with crowd.recording.during(crowd.port) as recorded, ExitStack() as stack:
        blocker, second, victim = (stack.enter_context(Connection(crowd.port)) for _ in range(3))
        for connection in (second, victim):
            assert connection.get("/open/1").status == 200
        blocker.send(f"/block/{culprits.name}")
        culprits.await_somebody()
        # From here on the loop is blocked, and then once more, before it comes to the last one.
        second.send(f"/second/{STALL}")
        victim.send("/open/2")
        time.sleep(STALL)
        culprits.open()
        for connection in (blocker, second, victim):
            assert connection.receive().status == 200
        crowd.recording.await_report("GET /second/{seconds}")

    victims = {report.request: [each.request for each in report.victims] for report in recorded.reports}
    assert sorted(victims["GET /block/{gate}"]) == ["GET /open/{item}", "GET /second/{seconds}"], victims
    assert victims["GET /second/{seconds}"] == ["GET /open/{item}"], victims


# -- a thousand of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("due", [0, 200], ids=["none-due", "200-due"])
def test_of_a_thousand_in_flight_those_who_were_due_are_victims(crowd: Crowd, due: int) -> None:
    parking, answer, culprits = (crowd.new_gate() for _ in range(3))
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(crowd.port)) for _ in range(MANY)]
        # The arrival of so many may block, but that is nobody's concern here.
        with crowd.recording.during(crowd.port):
            for connection in connections[:due]:
                connection.send(f"/parked-and-due/{answer.name}")
            for connection in connections[due:]:
                connection.send(f"/parked/{parking.name}")
            answer.await_count(waiting=due)
            parking.await_count(waiting=MANY - due)

        with crowd.recording.during(crowd.port) as recorded:
            culprit = stack.enter_context(Connection(crowd.port))
            culprit.send(f"/block/{culprits.name}")
            culprits.await_somebody()
            # From here on the loop is blocked.
            answer.open()
            answer.await_count(passed=due)
            time.sleep(STALL)
            culprits.open()
            assert culprit.receive().status == 200
            for connection in connections[:due]:
                assert connection.receive().json() == "through"
            crowd.recording.await_report("GET /block/{gate}")

        parking.open()
        for connection in connections[due:]:
            assert connection.receive().json() == "through"

    # On a slow machine, so many that go on at once may be a stall as well, of their route or of nobody.
    report, *crowds = recorded.reports
    assert {crowd.request for crowd in crowds} <= {"GET /parked-and-due/{gate}", None}, str(recorded)
    assert_accused(report, "GET /block/{gate}", "gate")
    assert [victim.request for victim in report.victims] == ["GET /parked-and-due/{gate}"] * due
    assert all(victim.waited >= STALL for victim in report.victims)
