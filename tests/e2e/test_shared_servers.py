"""Shared things under real servers: one of each per process, from the first request to the last."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.shared_servers import FILE, WELL_ENDED, Sharing, sharing
from tests.raw_client import Connection, WebSocket, get
from tests.servers import accepts, eventually

pytestmark = pytest.mark.e2e

OPENED = ["+first", "+second", "+third"]
CLOSED = ["-third", "-second", "-first"]

KINDS = ["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-asyncio", "hypercorn-trio", "granian"]
WAYS = ("/injected", "/in-thread", "/from-thread", "/child")


def answers(found: Sharing) -> set[str]:
    """What all ways to get the thing answer, many requests at a time."""

    def one(number: int) -> str:
        answer = get(found.port, WAYS[number % len(WAYS)])
        assert answer.status == 200, found.written
        return str(answer.json())

    with ThreadPoolExecutor(8) as pool:
        return set(pool.map(one, range(24)))


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_first_request_to_the_last(kind: str, tmp_path: Path, pipe: Path) -> None:
    with sharing(kind, tmp_path) as found:
        assert found.life() == OPENED
        (said,) = answers(found)
        assert get(found.port, "/states").json() == ["open"] * 3
        assert get(found.port, "/health").json() == {"first": True, "second": True, "third": True}
        with WebSocket(found.port, "/socket") as socket:
            for _ in range(2):
                socket.send("?")
                assert socket.receive() == said
        found.await_event("socket True")
        assert get(found.port, "/background").json() == "later"
        found.await_event(f"background {said}")
        found.await_event(f"background thread {said}")

        with Connection(found.port) as last:
            last.send(f"/wait?pipe={pipe}")
            found.await_event("waiting")
            found.server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)  # hypercorn shows nothing of having begun to stop
            with pipe.open("wb"):  # opens when the endpoint has opened it for reading
                pass
            assert last.receive().json() == said
        assert found.server.process.wait(20) in WELL_ENDED
        assert found.life()[-4:] == ["waited", *CLOSED]
        assert found.life().count("+second") == 1
        found.assert_quiet()


@pytest.mark.parametrize("kind", ["uvicorn-workers", "gunicorn"])
def test_each_worker_has_its_own(kind: str, tmp_path: Path) -> None:
    """gunicorn imports the application before it forks: nothing may be opened by then."""
    workers = {"uvicorn-workers": 2, "gunicorn": 1}[kind]
    with sharing(kind, tmp_path) as found:
        found.await_event("+third", workers)
        said: set[str] = set()

        def all_have_answered() -> bool:
            said.update(answers(found))
            return len(said) == workers

        eventually(all_have_answered, "each worker has answered")
        assert len({answer.split()[-1] for answer in said}) == workers
        assert found.server.terminate() in WELL_ENDED
        eventually(lambda: not found.server.remnants(), "no process is left")
        assert list(found.lives().values()) == [OPENED + CLOSED] * workers
        assert found.server.pid not in found.lives()
        found.assert_quiet()


def test_a_reload_closes_the_old_and_opens_anew(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    source = project / "reloaded.py"
    text = "from tests.e2e.shared_app import app\n"
    source.write_text(text)
    options = ["--reload", "--reload-dir", str(project), "--reload-delay", "0.05"]
    with sharing("uvicorn-asyncio", tmp_path, *options, app="reloaded:app", cwd=project) as found:
        (old,) = found.lives()
        source.write_text(text + "\n")
        os.utime(source, (2e9, 2e9))
        found.await_event("+third", 2)
        lives = found.lives()
        assert lives.pop(old) == OPENED + CLOSED
        ((new, life),) = lives.items()
        assert life == OPENED
        eventually(lambda: accepts(found.port), "it listens again")
        assert str(get(found.port, "/injected").json()).endswith(f" in {new}")
        found.server.terminate()
        eventually(lambda: not found.server.remnants(), "no process is left")
        assert found.lives()[new] == OPENED + CLOSED
        found.assert_quiet()


@pytest.mark.parametrize("kind", ["uvicorn-workers", "hypercorn-trio", "granian"])
def test_ctrl_c(kind: str, tmp_path: Path) -> None:
    options = ["--graceful-timeout", "1"] if kind == "hypercorn-trio" else []
    with sharing(kind, tmp_path, *options) as found:
        socket = WebSocket(found.port, "/socket")
        with socket._connection:  # it has no chance to say goodbye
            socket.send("?")
            socket.receive()
            found.server.interrupt()
        eventually(lambda: not found.server.remnants(), "no process is left")
        # granian does not wait for websockets, whose thing may be closed then; the others do.
        ends = {"socket True", "socket False"} if kind == "granian" else {"socket True"}
        for life in found.lives().values():
            assert [event for event in life if event not in ends] == OPENED + CLOSED
        found.assert_quiet()


def test_without_a_lifespan_it_says_how_to_mend_that(tmp_path: Path) -> None:
    with sharing("uvicorn-asyncio", tmp_path, "--lifespan", "off", wait=False) as found:
        found.server.await_port()
        said = get(found.port, "/missing").json()
        assert said.startswith(f"the shared resource 'second' (declared at {FILE}:")
        assert "pass shared=[second] to asyncguard.install(app)" in said
        assert "async with asyncguard.open_shared(second):" in said
        assert get(found.port, "/injected").status == 500
        found.server.await_stderr(said)
        assert get(found.port, "/states").json() == ["closed"] * 3
    assert found.life() == []
