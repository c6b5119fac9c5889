"""A server process for each variant, the load on it, and the CPU that it uses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.apps import VARIABLE, Variant
from tests.raw_client import Connection, Truncated

__all__ = ["CONNECTIONS", "Failed", "Server", "cpu_time", "serve"]

CONNECTIONS = 5
"""How many requests are under way at once."""

_ROOT = Path(__file__).parents[1]
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 20.0


class Failed(Exception):
    """Raised when something could not be measured; says why."""


def cpu_time(pid: int) -> int:
    """The nanoseconds of CPU that all threads of a process have used, those that have ended included.

    Linux makes a clock for every process, as clock_getcpuclockid(3) says. What ``/proc/PID/stat`` has is
    the same in steps of 10 ms.
    """
    return time.clock_gettime_ns(~pid << 3 | 2)


class Server:
    """A process that serves a variant."""

    def __init__(self, variant: Variant, port: int, process: subprocess.Popen[bytes], output: Path) -> None:
        self.variant = variant
        self._port = port
        self._process = process
        self._output = output
        self._connections: list[Connection] = []

    @property
    def cpu_time(self) -> int:
        """The nanoseconds of CPU that it has used so far."""
        self._check_running()
        return cpu_time(self._process.pid)

    def await_answer(self) -> None:
        """Wait until it answers.

        Raises:
            Failed: If it ends instead, or does not answer in time.
        """
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            self._check_running()
            with suppress(ConnectionRefusedError), Connection(self._port) as connection:
                response = connection.get("/")
                if response.status == 200:
                    return
                raise Failed(f"{self.variant.name} answers {response.status}")
            time.sleep(0.05)
        raise Failed(f"{self.variant.name} does not answer within {_START_TIMEOUT:g} s")

    def connect(self) -> None:
        """Open the connections that the load goes through."""
        self._connections += [Connection(self._port) for _ in range(CONNECTIONS)]

    def disconnect(self) -> None:
        """Close them."""
        while self._connections:
            self._connections.pop().socket.close()

    def load(self, requests: int) -> int:
        """Send it that many requests, a few at a time.

        Returns:
            The nanoseconds of CPU that it used for them.

        Raises:
            Failed: If one was not answered as it should be.
        """
        before = self.cpu_time
        try:
            for _ in range(requests // CONNECTIONS):
                for connection in self._connections:
                    connection.send("/")
                for connection in self._connections:
                    status = connection.receive().status
                    if status != 200:
                        raise Failed(f"{self.variant.name} answers {status}")
        except (OSError, Truncated) as error:
            self._check_running()
            raise Failed(f"{self.variant.name} does not answer: {error!r}") from error
        return self.cpu_time - before

    def _check_running(self) -> None:
        if self._process.poll() is not None:
            raise Failed(f"{self.variant.name} ended by itself:\n{self._output.read_text(errors='replace')}")


@contextmanager
def serve(variant: Variant, *, http: str) -> Iterator[Server]:
    """Serve a variant with uvicorn, in a process that is ended whatever happens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    options = ["--port", str(port), "--loop", variant.loop, "--http", http, "--timeout-keep-alive", "600"]
    command = ["-m", "uvicorn", "benchmarks.apps:app", "--no-access-log", "--log-level", "warning", *options]
    with tempfile.TemporaryDirectory(prefix="asyncguard-bench-") as folder:
        output = Path(folder, "output")
        with output.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                # The order of sets is the same in all of them, so that it makes no difference.
                env={**os.environ, "PYTHONHASHSEED": "0", **variant.env, VARIABLE: variant.name},
                cwd=_ROOT,
            )
        server = Server(variant, port, process, output)
        try:
            yield server
        finally:
            server.disconnect()
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
