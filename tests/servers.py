"""Real servers in processes of their own, for the end-to-end tests.

A server listens on a free port of the loopback interface, is awaited until it accepts connections, and
is ended by its process id, whatever happens. What it writes is kept, and shown with a failing test.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

__all__ = [
    "COMMANDS",
    "HOST",
    "ROOT",
    "Server",
    "accepts",
    "attach_output",
    "eventually",
    "free_port",
    "serve",
    "start",
]

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[1]

COMMANDS: Mapping[str, str] = {
    "uvicorn-asyncio": "uvicorn --host {host} --port {port} --loop asyncio --http h11 --ws wsproto {app}",
    "uvicorn-uvloop": "uvicorn --host {host} --port {port} --loop uvloop --http h11 --ws wsproto {app}",
    "hypercorn-asyncio": "hypercorn --bind {host}:{port} --worker-class asyncio {app}",
    "hypercorn-trio": "hypercorn --bind {host}:{port} --worker-class trio {app}",
    "hypercorn-uvloop": "hypercorn --bind {host}:{port} --worker-class uvloop {app}",
    "granian": "granian --interface asgi --host {host} --port {port} --loop asyncio {app}",
}
"""How to start each kind of server, after ``python -m``.

uvicorn takes other parsers by itself where they are installed. Which ones it has here is said on purpose; a
test that wants httptools says so in its options, which come later.
"""

_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 20.0
_running: list[Server] = []

T = TypeVar("T")


def eventually(check: Callable[[], T], what: str, timeout: float = 30.0) -> T:
    """Call `check` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether somebody listens on `port`. Sends nothing, so it is no request."""
    with suppress(OSError), socket.create_connection((HOST, port), timeout=5):
        return True
    return False


class Server:
    """A process that listens on a port, and what it has written so far.

    Attributes:
        kind: Which of `COMMANDS` it is; empty if none.
    """

    kind = ""

    def __init__(self, command: Sequence[str], port: int, folder: Path, env: Mapping[str, str], cwd: Path):
        self.port = port
        self._stdout = folder / "stdout"
        self._stderr = folder / "stderr"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
                cwd=cwd,
                start_new_session=True,  # a process group of its own, by which its workers are found
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def await_port(self) -> None:
        """Wait until it accepts connections."""
        eventually(lambda: self.ended or accepts(self.port), f"{self.process.args!r} accepts", _START_TIMEOUT)
        assert not self.ended, f"exit code {self.process.returncode}:\n{self.stdout}{self.stderr}"

    def await_stderr(self, text: str, timeout: float = 30.0) -> None:
        """Wait until `text` has been written to standard error."""
        eventually(lambda: text in self.stderr, f"{text!r} on standard error", timeout)

    def interrupt(self) -> int:
        """Press Ctrl-C, which a terminal sends to all processes of the command, and wait for the end."""
        os.killpg(self.pid, signal.SIGINT)
        return self.process.wait(_STOP_TIMEOUT)

    def terminate(self) -> int:
        """Ask for the end as a supervisor does, and wait for it."""
        if not self.ended:
            self.process.terminate()
        return self.process.wait(_STOP_TIMEOUT)

    def remnants(self) -> bool:
        """Whether processes that it started are still there, after its own end."""
        assert self.ended
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """End it and all that it started at once, whatever state they are in."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def start(
    command: Sequence[str], port: int, *, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[Server]:
    """Start ``python -m COMMAND``, or a program given by its absolute path; without awaiting it."""
    program = [] if Path(command[0]).is_absolute() else [sys.executable, "-m"]
    with tempfile.TemporaryDirectory(prefix="asyncguard-test-") as folder:
        server = Server([*program, *command], port, Path(folder), env or {}, cwd)
        _running.append(server)
        try:
            yield server
        finally:
            _running.remove(server)
            try:
                server.terminate()
            except subprocess.TimeoutExpired:
                pytest.fail(f"{command!r} did not end after SIGTERM:\n{server.stdout}{server.stderr}")
            finally:
                server.kill()


@contextmanager
def serve(
    kind: str, app: str, *options: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[Server]:
    """Serve an application, named by an import string, with one of `COMMANDS`."""
    port = free_port()
    command = COMMANDS[kind].format(host=HOST, port=port, app=app).split()
    with start([*command, *options], port, env=env, cwd=cwd) as server:
        server.kind = kind
        server.await_port()
        yield server


def attach_output(report: pytest.TestReport) -> None:
    """Show with a failing test what the servers that run now have written."""
    if report.failed:
        for server in _running:
            written = f"{server.stdout}{server.stderr}"[-6000:]
            report.sections.append((f"output of {server.process.args!r}", written))
