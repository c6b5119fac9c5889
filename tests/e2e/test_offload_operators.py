"""What operators and supervisors do to a server that offloads, besides asking it to end once."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.e2e.offload_servers import (
    APP,
    COMMANDS,
    Family,
    assert_free,
    offloading,
    pool_of,
    run_marked,
    server_of,
)
from tests.raw_client import Connection
from tests.servers import HOST, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WITHIN = 60.0
KINDS = ["uvicorn", "hypercorn-trio"]


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_lets_calls_end(number: signal.Signals, tmp_path: Path) -> None:
    """As systemd sends SIGTERM to all of a unit: it is the server that decides what that means."""
    with offloading("uvicorn", tmp_path, "--timeout-graceful-shutdown", "60") as found:
        with Connection(found.port) as connection:
            connection.send("/wait/now")
            (worker,) = found.await_noted("begun-now")
            family = found.family.pids()
            found.family.send(number)
            found.server.await_stderr("Shutting down")
            assert found.family.pids() == family
            (tmp_path / "now").touch()
            assert connection.receive().json() == worker
        assert found.server.process.wait(WITHIN) in (0, -number)
        found.family.await_end(timeout=WITHIN)
        found.assert_quiet()
        assert "Traceback" not in found.server.stderr


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn-trio", "granian"])
def test_ctrl_c_twice(kind: str, tmp_path: Path) -> None:
    """The second one is for those who do not want to wait for the grace."""
    with offloading(kind, tmp_path) as found:
        with Connection(found.port) as spins, Connection(found.port) as counts:
            spins.send("/one/spin/spin")
            counts.send("/count/count")
            found.await_noted("begun-spin", "begun-count")
            for _ in range(2):
                os.killpg(found.server.pid, signal.SIGINT)
                time.sleep(0.1)  # two that come at once are one
            found.server.process.wait(WITHIN)
            found.family.await_end(timeout=WITHIN)
            assert_free(found.port)
        found.assert_quiet()


def test_sigterm_again_and_again(tmp_path: Path) -> None:
    with offloading("uvicorn", tmp_path) as found:
        with Connection(found.port) as connection:
            connection.send("/one/spin/spin")
            found.await_noted("begun-spin")
            while not found.server.ended:
                found.family.send(signal.SIGTERM)
                time.sleep(0.01)
            found.family.await_end(timeout=WITHIN)
        assert found.noted("ended-spin")
        found.assert_quiet()


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_while_the_pool_starts(kind: str, tmp_path: Path) -> None:
    """Workers that are being forked, and a zygote that is importing, end as well."""
    with offloading(kind, tmp_path, wait=False) as found:
        found.await_noted("lifespans")
        found.server.process.terminate()
        found.server.process.wait(WITHIN)
        found.family.await_end(timeout=WITHIN)
        assert_free(found.port)
        found.assert_quiet()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_that_nobody_opened(kind: str, tmp_path: Path) -> None:
    """It is to end with the loop, and no server waits for that."""
    with offloading(kind, tmp_path, env={"ASYNCGUARD_TEST_WORKERS": "0"}) as found:
        with Connection(found.port) as connection:
            connection.send("/count/count")
            found.await_noted("begun-count")
            found.server.process.terminate()
            found.server.process.wait(WITHIN)
            found.family.await_end(timeout=WITHIN)
        found.assert_quiet()


def test_the_zygote_is_killed(tmp_path: Path) -> None:
    """Calls that run go on, and the next worker has another one."""
    with offloading("uvicorn", tmp_path) as found:
        with Connection(found.port) as connection:
            connection.send("/wait/now")
            (worker,) = found.await_noted("begun-now")
            pool = pool_of(found.server.pid, found.family)
            os.kill(parent := parent_of(worker), signal.SIGKILL)
            found.family.await_end({parent}, WITHIN)
            (tmp_path / "now").touch()
            assert connection.receive().json() == worker
        for number in range(3):
            with Connection(found.port) as connection:
                connection.send(f"/wait/killed-{number}")
                (last,) = found.await_noted(f"begun-killed-{number}")
                os.kill(last, signal.SIGKILL)
                assert connection.receive().status == 500
        found.pids()
        assert pool_of(found.server.pid, found.family) - pool
        found.server.process.terminate()
        found.server.process.wait(WITHIN)
        found.family.await_end(timeout=WITHIN)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- servers that end by themselves, or have another take their place ------------------------------


def test_a_limit_of_requests(tmp_path: Path) -> None:
    """The server ends after so many, and not before a call that is under way."""
    options = ["--limit-max-requests", "2", "--timeout-graceful-shutdown", "60"]
    with offloading("uvicorn", tmp_path, *options) as found:
        with Connection(found.port) as connection:
            connection.send("/wait/now")
            (worker,) = found.await_noted("begun-now")
            for _ in range(2):
                found.pids()
            found.server.await_stderr("Shutting down")
            (tmp_path / "now").touch()
            assert connection.receive().json() == worker
        assert found.server.process.wait(WITHIN) == 0
        found.family.await_end(timeout=WITHIN)
        assert found.noted("lifespan-ends") == found.noted("lifespans") == [found.server.pid]


def test_gunicorn_replaces_a_server_process(tmp_path: Path) -> None:
    """The old one and its pool are there until the last call has ended."""
    with offloading("gunicorn", tmp_path) as found:
        with Connection(found.port) as connection:
            connection.send("/wait/now")
            (worker,) = found.await_noted("begun-now")
            old = server_of(worker)
            pool = pool_of(old, found.family)
            assert worker in pool
            found.server.process.send_signal(signal.SIGHUP)
            eventually(lambda: len(found.noted("lifespans")) == 2, "another one starts")
            assert old in found.family.pids()
            (tmp_path / "now").touch()
            assert connection.receive().json() == worker
        found.family.await_end({old, *pool})
        server, worker = found.pids()
        assert [old, server] == found.noted("lifespans")
        assert server_of(worker) == server
        found.server.process.terminate()
        assert found.server.process.wait(WITHIN) == 0
        found.family.await_end(timeout=WITHIN)
        assert_free(found.port)
        found.assert_quiet()


# -- servers that do not come up, or end badly -----------------------------------------------------


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn", "hypercorn-trio"])
def test_a_lifespan_that_fails_at_its_start(kind: str, tmp_path: Path) -> None:
    with offloading(kind, tmp_path, env={"ASYNCGUARD_TEST_LIFESPAN_FAILS": "start"}, wait=False) as found:
        found.server.process.wait(WITHIN)
        found.family.await_end(timeout=WITHIN)
        assert "the lifespan's own error" in found.server.stdout + found.server.stderr
        assert found.noted("lifespan-ends") == []
        found.assert_quiet()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lifespan_that_fails_at_its_end(kind: str, tmp_path: Path) -> None:
    with offloading(kind, tmp_path, env={"ASYNCGUARD_TEST_LIFESPAN_FAILS": "end"}) as found:
        found.pids()
        found.server.process.terminate()
        found.server.process.wait(WITHIN)
        found.family.await_end(timeout=WITHIN)
        if kind == "uvicorn":  # hypercorn says nothing of it
            assert "the lifespan's own error" in found.server.stderr
        found.assert_quiet()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """By the time that uvicorn finds out, the pool is open; the others look before."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        command = [*COMMANDS["uvicorn"].format(host=HOST, port=port).split(), APP]
        with run_marked(command, port, Family(), tmp_path) as found:
            assert found.server.process.wait(WITHIN) != 0
            found.family.await_end(timeout=WITHIN)
            assert found.noted("lifespan-ends") == found.noted("lifespans") == [found.server.pid]
            found.assert_quiet()
