"""The demonstration: the shop, its upstream and its clients, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

__all__ = ["run_demo"]

_HOST = "127.0.0.1"
_START_TIMEOUT = 60.0
_LOAD_TIMEOUT = 180.0
_STOP_TIMEOUT = 15.0


def run_demo(*, threshold: float, loop: str) -> int:
    """Run it once, with everything on standard output and standard error.

    Returns:
        The exit code: 0 if every request of the load was answered as planned.

    Raises:
        RuntimeError: If something it needs is missing, or a server does not start.
    """
    examples = _examples()
    missing = [name for name in ("fastapi", "requests", "uvicorn") if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the demonstration needs {', '.join(missing)}: pip install 'asyncguard[demo]'")
    upstream_port, shop_port = _free_port(), _free_port()
    environment = {
        **os.environ,
        "SHOP_UPSTREAM": f"http://{_HOST}:{upstream_port}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(examples), os.environ.get("PYTHONPATH", "")])),
    }
    quiet = ["--host", _HOST, "--log-level", "critical", "--timeout-graceful-shutdown", "1"]
    upstream = ["uvicorn", "shop.upstream:app", "--port", str(upstream_port), *quiet]
    shop = ["asyncguard", "run", "shop.main:app", "--port", str(shop_port), "--loop", loop, *quiet]
    shop += ["--threshold", str(threshold), "--project-root", str(examples / "shop")]
    print(f"asyncguard demo: a shop with every pitfall in it, on {_HOST}:{shop_port}", flush=True)
    with (
        _serving(upstream, upstream_port, environment),
        _serving(shop, shop_port, environment),
    ):
        return subprocess.run(
            [sys.executable, "-m", "shop.load", f"http://{_HOST}:{shop_port}"],
            env=environment,
            timeout=_LOAD_TIMEOUT,
            check=False,
        ).returncode


def _examples() -> Path:
    """Where the shop is: in the installed package, or in the checkout."""
    package = Path(__file__).parent
    for folder in (package / "_examples", package.parent / "examples"):
        if (folder / "shop" / "main.py").is_file():
            return folder
    raise RuntimeError("the demonstration's shop is missing from this installation")


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def _serving(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    """Run a server for the time of a ``with`` block; it is ended whatever happens inside."""
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment)
    try:
        _await_port(process, command, port)
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_port(process: subprocess.Popen[bytes], command: list[str], port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection((_HOST, port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {' '.join(command[:2])}")
