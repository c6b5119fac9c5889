"""Offloading under real servers: they end, by request or by force, and nothing of theirs is left."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.offload_servers import (
    COMMANDS,
    GRACE,
    SUPERVISED,
    Family,
    Offloading,
    assert_free,
    in_time,
    offloading,
    pool_of,
    run_marked,
    server_of,
)
from tests.raw_client import Connection, Truncated, get
from tests.servers import ROOT, eventually, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CANCELS = ("uvicorn", "uvicorn-workers", "hypercorn-trio")
"""Servers that cancel the requests that are under way when the grace is over. Others kill the process."""
WITHIN = 60.0
"""Seconds. Both the server's grace and the pool's are over long before, unless the machine is busy."""


@contextmanager
def busy(found: Offloading, name: str) -> Iterator[tuple[list[Connection], list[int]]]:
    """Two requests under way: one worker is in a loop of Python's, and one holds the GIL in a loop of C's.

    Yields their connections and the ids of the two workers.
    """
    with ExitStack() as stack:
        spins, counts = [stack.enter_context(Connection(found.port)) for _ in range(2)]
        spins.send(f"/one/spin/spin-{name}")
        counts.send(f"/count/count-{name}")
        yield [spins, counts], found.await_noted(f"begun-spin-{name}", f"begun-count-{name}")


# -- the end that a supervisor asks for ------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMANDS)
def test_sigterm_while_workers_are_busy(kind: str, tmp_path: Path) -> None:
    with offloading(kind, tmp_path) as found:
        servers = 2 if kind == "uvicorn-workers" else 1
        eventually(lambda: len(found.noted("lifespans")) == servers, "all of them have started")
        with busy(found, "last") as (_, workers):
            family = found.family.pids()
            assert {found.server.pid, *workers, *map(server_of, workers)} < family
            began = time.monotonic()
            found.server.process.terminate()
            assert found.server.process.wait(WITHIN) in (0, -signal.SIGTERM)
            found.family.await_end(timeout=WITHIN)
            # The server's grace, the pool's, and what it takes to end a process or two.
            assert time.monotonic() - began < in_time(GRACE + 0.5 + 5)
            assert_free(found.port)
        assert found.noted("ended-count-last") == []
        if kind in CANCELS:
            assert found.noted("ended-spin-last") == workers[:1]
            assert sorted(found.noted("lifespan-ends")) == sorted(found.noted("lifespans"))
        # No worker took itself for a server, though it has imported the application.
        assert len(found.noted("lifespans")) == servers
        assert not {*found.noted("lifespans")} & {*workers}
        found.assert_quiet()


# -- the end that nobody asked for -----------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMANDS)
def test_sigkill_while_workers_are_busy(kind: str, tmp_path: Path) -> None:
    with offloading(kind, tmp_path) as found:
        with busy(found, "first") as (connections, workers):
            servers = {server_of(worker) for worker in workers}
            left = set[int]().union(*(pool_of(server, found.family) for server in servers))
            assert {*workers} < left
            for server in servers:
                os.kill(server, signal.SIGKILL)
            found.family.await_end(left | servers, in_time(2))
            assert all(connection.is_closed() for connection in connections)
        if kind in SUPERVISED:
            # The supervisor starts another server process, which has a pool of its own; then all of them are
            # killed but those that only we know of.
            eventually(lambda: serves(found, not_in=servers), "another process serves")
            with busy(found, "second") as (connections, workers):
                assert not {server_of(worker) for worker in workers} & servers
                os.killpg(found.server.pid, signal.SIGKILL)
                found.family.await_end(timeout=in_time(2))
                assert all(connection.is_closed() for connection in connections)
        else:
            found.server.process.wait(WITHIN)
            found.family.await_end(timeout=WITHIN)
        assert_free(found.port)
        for name in ("first", "second"):
            assert found.noted(f"ended-spin-{name}") == []


def serves(found: Offloading, *, not_in: set[int]) -> bool:
    try:
        return found.pids()[0] not in not_in
    except (OSError, Truncated):
        return False


def test_sigkill_after_the_thread_has_ended_that_opened_the_pool(tmp_path: Path) -> None:
    """What `PR_SET_PDEATHSIG` is bound to is that thread."""
    port = free_port()
    command = ["tests.e2e.offload_threads", str(port)]
    env = {"ASYNCGUARD_TEST_WORKERS": "0"}  # so that the application has no other pool
    with run_marked(command, port, Family(), tmp_path, env=env) as found:
        found.server.await_port()
        with busy(found, "here") as (_, workers):
            assert found.noted("in-thread") == workers[1:], "the thread's end was not its end"
            assert {server_of(worker) for worker in workers} == {found.server.pid}
            assert found.family.pids() > {found.server.pid, *workers}
            found.server.process.kill()
            found.family.await_end(timeout=in_time(2))
        assert_free(found.port)


# -- a reload --------------------------------------------------------------------------------------


def test_reload_while_workers_are_busy(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    source = project / "main.py"
    shutil.copy(ROOT / "tests/e2e/offload_app.py", source)
    options = ["--reload", "--reload-dir", str(project), "--reload-delay", "0.05"]
    with offloading("uvicorn", tmp_path, *options, app="main:app", cwd=project) as found:
        with busy(found, "old") as (_, workers):
            (old,) = {server_of(worker) for worker in workers}
            assert old != found.server.pid
            pool = pool_of(old, found.family)
            assert pool > {*workers}
            source.write_text(source.read_text().replace("return os.getpid()", "return -os.getpid()", 1))
            os.utime(source, (2e9, 2e9))
            found.family.await_end({old, *pool})
        eventually(lambda: serves(found, not_in={old}), "the new server serves")
        server, worker = found.pids()
        # The workers have the new code as well.
        assert server_of(-worker) == server
        assert found.noted("ended-spin-old") == workers[:1]
        assert found.noted("lifespans") == [old, server]
        found.server.process.terminate()
        assert found.server.process.wait(WITHIN) in (0, -signal.SIGTERM)
        found.family.await_end(timeout=WITHIN)
        assert_free(found.port)
        found.assert_quiet()


# -- answers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["uvicorn", "hypercorn-trio", "granian"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offloading]:
    with offloading(request.param, tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def worker(served: Offloading) -> Iterator[int]:
    """The only worker of the pool `one`, which is idle, and is the same afterwards."""
    before = get(served.port, "/one/pid").json()
    yield before
    assert get(served.port, "/one/pid").json() == before


def test_a_full_queue_is_answered_503(served: Offloading, worker: int) -> None:
    with Connection(served.port) as waits:
        with Connection(served.port) as runs:
            runs.send("/one/spin/runs")
            served.await_noted("begun-runs")
            waits.send("/one/spin/waits")
            eventually(lambda: get(served.port, "/one/queued").json(), "it has come, and waits")
            refused = get(served.port, "/one/spin/refused")
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["title"] == "Service Unavailable"
            assert not served.noted("begun-waits")
        # The client has left: its call is stopped, and the next one begins.
        assert served.await_noted("ended-runs", "begun-waits") == [worker, worker]
    assert served.await_noted("ended-waits") == [worker]
    assert served.noted("begun-refused") == []


@pytest.mark.parametrize("how", ["late", "timeout"])
def test_a_call_that_is_too_late_is_answered_504_and_stopped(
    how: str, served: Offloading, worker: int
) -> None:
    response = get(served.port, f"/one/{how}/{how}")
    assert response.status == 504
    assert response.json()["title"] == "Gateway Timeout"
    assert served.await_noted(f"begun-{how}", f"ended-{how}") == [worker, worker]


def test_a_call_for_a_client_that_left_is_stopped(served: Offloading, worker: int) -> None:
    with Connection(served.port) as connection:
        connection.send("/one/spin/left")
        served.await_noted("begun-left")
        assert served.noted("ended-left") == []
    assert served.await_noted("ended-left") == [worker]
