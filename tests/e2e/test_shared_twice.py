"""One application object on several event loops of one process: at the same time, and in turn.

Each loop has things of its own; nobody ever gets those of another loop.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.shared_servers import Sharing
from tests.raw_client import get
from tests.servers import ROOT, accepts, eventually, free_port, start

pytestmark = pytest.mark.e2e

OPENED = ["+first", "+second", "+third"]
CLOSED = ["-third", "-second", "-first"]


@contextmanager
def served(how: str, ports: list[int], folder: Path) -> Iterator[Sharing]:
    journal = folder / "journal"
    command = ["tests.e2e.shared_twice", how, *map(str, ports)]
    env = {"ASYNCGUARD_TEST_JOURNAL": str(journal), "PYTHONPATH": str(ROOT)}
    with start(command, ports[0], env=env) as server:
        yield Sharing(server, journal)


def thing_of(port: int) -> str:
    """What all ways to get it say of the thing that a server's requests get: that it is the same."""
    said = {get(port, path).json() for path in ("/injected", "/in-thread", "/from-thread", "/child") * 3}
    assert len(said) == 1, said
    return str(said.pop())


def test_together(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    with served("together", ports, tmp_path) as found:
        for port in ports:
            eventually(lambda port=port: accepts(port), "it listens")  # type: ignore[misc]
        found.await_event("+third", 3)
        things = [thing_of(port) for port in ports]
        assert len(set(things)) == 3
        found.server.process.send_signal(signal.SIGUSR1)  # the first one ends, and takes only its own along
        found.await_event("-first")
        assert [thing_of(port) for port in ports[1:]] == things[1:]
        assert found.server.terminate() == 0
        life = found.life()
        assert sorted(life[:9]) == sorted(OPENED * 3)
        assert life[9:12] == CLOSED
        assert sorted(life[12:]) == sorted(CLOSED * 2)
        found.assert_quiet()


def test_in_turn(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    with served("in-turn", ports, tmp_path) as found:
        for number, port in enumerate(ports, 1):
            eventually(lambda port=port: accepts(port), "it listens")  # type: ignore[misc]
            found.await_event("+third", number)
            thing_of(port)
            found.server.process.send_signal(signal.SIGUSR1)
            found.await_event("-first", number)
        assert found.server.process.wait(20) == 0
        assert found.life() == (OPENED + CLOSED) * 3
        found.assert_quiet()
