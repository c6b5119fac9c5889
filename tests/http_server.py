"""A real HTTP server of the tests' own, which can be taken away and brought back."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.outages import Service
from tests.servers import COMMANDS, HOST, ROOT, accepts, free_port

__all__ = ["HttpServer", "run_http_server"]


class HttpServer(Service):
    """A server that runs.

    Attributes:
        url: Where it is.
    """

    def __init__(self, port: int, command: Sequence[str], log: Path) -> None:
        super().__init__(command, log, cwd=ROOT)
        self.port = port
        self.url = f"http://{HOST}:{port}"

    def is_ready(self) -> bool:
        return accepts(self.port)


@contextmanager
def run_http_server(app: str) -> Iterator[HttpServer]:
    """Serve an application, named by an import string, by uvicorn."""
    port = free_port()
    options = COMMANDS["uvicorn-asyncio"].format(host=HOST, port=port, app=app).split()
    with tempfile.TemporaryDirectory(prefix="asyncguard-test-") as folder:
        # It would wait for connections that are kept, which are all that its clients have.
        command = [sys.executable, "-m", *options, "--timeout-graceful-shutdown", "1"]
        server = HttpServer(port, command, Path(folder, "log"))
        with server.running():
            yield server
