"""Servers that offload, all processes that come of them, and what those write to files."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.raw_client import get
from tests.servers import HOST, ROOT, Server, eventually, free_port, start

__all__ = [
    "APP",
    "COMMANDS",
    "GRACE",
    "SUPERVISED",
    "Family",
    "Offloading",
    "assert_free",
    "in_time",
    "offloading",
    "pool_of",
    "run_marked",
    "server_of",
]

APP = "tests.e2e.offload_app:app"
GRACE = 1
"""Seconds that each server gives requests to end."""

_UVICORN = f"uvicorn --host {{host}} --port {{port}} --http h11 --timeout-graceful-shutdown {GRACE}"
COMMANDS: Mapping[str, str] = {
    "uvicorn": f"{_UVICORN} --loop asyncio",
    "uvicorn-workers": f"{_UVICORN} --loop uvloop --workers 2",
    "gunicorn": "gunicorn --bind {host}:{port} --worker-class uvicorn_worker.UvicornWorker --workers 1 "
    f"--graceful-timeout {GRACE} --worker-tmp-dir /dev/shm --no-control-socket",
    "hypercorn-trio": f"hypercorn --bind {{host}}:{{port}} --worker-class trio --graceful-timeout {GRACE}",
    "granian": "granian --interface asgi --host {host} --port {port} --loop asyncio "
    f"--workers-kill-timeout {GRACE}",
}
"""How to start each kind of server, after ``python -m``."""

SUPERVISED = ("uvicorn-workers", "gunicorn")
"""Those that start another server process in place of a dead one."""

_MARK = "ASYNCGUARD_TEST_MARK"
_LEFT_LYING = ("Exception ignored", "never retrieved", "never awaited", "was destroyed", "ResourceWarning")


def in_time(seconds: float) -> float:
    """So many seconds; more on a machine that has more to do than it can."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Family:
    """All processes with a certain mark in their environment, which they have from one that was given it.

    A zombie has none. So whoever is not in it any more has ended, though perhaps nobody has waited for it.
    """

    def __init__(self) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"

    @property
    def env(self) -> dict[str, str]:
        name, _, value = self._mark.partition("=")
        return {name: value}

    def pids(self) -> set[int]:
        return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and self._has(path)}

    def _has(self, process: Path) -> bool:
        try:
            return self._mark.encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def await_end(self, pids: set[int] | None = None, timeout: float = 30.0) -> None:
        """Wait until none of them is left; by default none at all."""
        eventually(lambda: not (self.pids() if pids is None else self.pids() & pids), "their end", timeout)

    def send(self, number: int) -> None:
        """Send all of them a signal, as supervisors do that know the process tree."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        while self.pids():
            self.send(signal.SIGKILL)


class Offloading:
    """A server that is ready, and has a family and a folder.

    Attributes:
        server: The process that was started.
        family: That process and all that came of it.
        folder: Where they write.
    """

    def __init__(self, server: Server, family: Family, folder: Path) -> None:
        self.server = server
        self.family = family
        self.folder = folder

    @property
    def port(self) -> int:
        return self.server.port

    def noted(self, name: str) -> list[int]:
        """The ids of the processes that wrote to that file."""
        with suppress(FileNotFoundError):
            return [int(line) for line in (self.folder / name).read_text().splitlines()]
        return []

    def await_noted(self, *names: str) -> list[int]:
        """Wait until there is something in each of these files; returns the first id in each."""
        eventually(lambda: all(map(self.noted, names)), f"{names} are written")
        return [self.noted(name)[0] for name in names]

    def pids(self) -> tuple[int, int]:
        """Those of a process that serves, and of one of its workers."""
        found = get(self.port, "/pids").json()
        return found["server"], found["worker"]

    def assert_quiet(self) -> None:
        """Nothing was said that tells of a thing left lying about."""
        written = self.server.stdout + self.server.stderr
        for sign in _LEFT_LYING:
            assert sign not in written, written


@contextmanager
def offloading(
    kind: str,
    folder: Path,
    *options: str,
    app: str = APP,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    wait: bool = True,
) -> Iterator[Offloading]:
    """Serve an application with one of `COMMANDS`; afterwards nothing of it is left, whatever happened."""
    family, port = Family(), free_port()
    command = [*COMMANDS[kind].format(host=HOST, port=port).split(), *options, app]
    with run_marked(command, port, family, folder, env=env, cwd=cwd) as found:
        if wait:
            found.server.await_port()
        yield found


@contextmanager
def run_marked(
    command: list[str],
    port: int,
    family: Family,
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Iterator[Offloading]:
    """Start a program that is to listen on `port`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    settings = {"ASYNCGUARD_TEST_FOLDER": str(folder), "PYTHONPATH": path, **family.env, **(env or {})}
    try:
        with start(command, port, env=settings, cwd=cwd) as server:
            yield Offloading(server, family, folder)
    finally:
        family.end()


def assert_free(port: int) -> None:
    """Nobody listens there: it can be had."""

    def can_be_had() -> bool:
        with suppress(OSError), socket.create_server((HOST, port)):
            return True
        return False

    eventually(can_be_had, "its port is free")


def server_of(worker: int) -> int:
    """The process that has the pool of a worker."""
    return _parent(_parent(worker))


def pool_of(server: int, family: Family) -> set[int]:
    """All worker processes of a server process, and those that they were forked from."""
    pids = family.pids()
    parents = {pid: _parent(pid) for pid in pids}
    zygotes = {pid for pid in pids if parents[pid] == server and _is_zygote(pid)}
    return zygotes | {pid for pid in pids if parents[pid] in zygotes}


def _is_zygote(pid: int) -> bool:
    with suppress(OSError):
        return b"offloading._zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
