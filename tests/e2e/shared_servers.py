"""Servers of applications that share things, and what those note of their lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.servers import COMMANDS, HOST, ROOT, Server, eventually, free_port, start

__all__ = ["APP", "FILE", "SERVERS", "WELL_ENDED", "Sharing", "sharing"]

APP = "tests.e2e.shared_app:app"
FILE = "tests/e2e/shared_app.py"

SERVERS: Mapping[str, str] = {
    **COMMANDS,
    "uvicorn-workers": f"{COMMANDS['uvicorn-asyncio']} --workers 2",
    "gunicorn": "gunicorn --bind {host}:{port} --worker-class uvicorn_worker.UvicornWorker --workers 1 "
    "--preload --worker-tmp-dir /dev/shm --no-control-socket {app}",
}

WELL_ENDED = (0, -15)
"""The exit codes after SIGTERM."""

_LEFT_LYING = ("Exception ignored", "never retrieved", "never awaited", "was destroyed", "ResourceWarning")


class Sharing:
    """A server and the journal of its application.

    Attributes:
        server: The server.
    """

    def __init__(self, server: Server, journal: Path) -> None:
        self.server = server
        self._journal = journal

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def written(self) -> str:
        return self.server.stdout + self.server.stderr

    def lives(self) -> dict[int, list[str]]:
        """What happened in each process, in order."""
        found: dict[int, list[str]] = {}
        with suppress(FileNotFoundError):
            for line in self._journal.read_text().splitlines():
                pid, _, event = line.partition(" ")
                found.setdefault(int(pid), []).append(event)
        return found

    def life(self) -> list[str]:
        """What happened in the one process that noted anything."""
        lives = self.lives()
        assert len(lives) <= 1, lives
        return [event for events in lives.values() for event in events]

    def await_event(self, event: str, times: int = 1) -> None:
        def has_come() -> bool:
            return sum(events.count(event) for events in self.lives().values()) >= times

        eventually(has_come, f"{event!r} in {self.lives()}\n{self.written}")

    def assert_quiet(self) -> None:
        """Nothing was said that tells of a thing left lying about, or of anything going wrong."""
        for sign in (*_LEFT_LYING, "Traceback", "the shared resource"):
            assert sign not in self.written, self.written


@contextmanager
def sharing(
    kind: str,
    folder: Path,
    *options: str,
    app: str = APP,
    fault: str = "",
    cwd: Path = ROOT,
    wait: bool = True,
) -> Iterator[Sharing]:
    """Serve an application with one of `SERVERS`."""
    port = free_port()
    command = [*SERVERS[kind].format(host=HOST, port=port, app=app).split(), *options]
    journal = folder / "journal"
    env = {"ASYNCGUARD_TEST_JOURNAL": str(journal), "ASYNCGUARD_TEST_FAULT": fault, "PYTHONPATH": str(ROOT)}
    with start(command, port, env=env, cwd=cwd) as server:
        server.kind = kind
        found = Sharing(server, journal)
        if wait:
            server.await_port()
            found.await_event("+third")  # hypercorn listens before that
        yield found
