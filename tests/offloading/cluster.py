"""A Dask cluster on this machine: a scheduler and two workers with a thread each, all in processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from distributed import Client

PATIENCE = 60.0
"""Seconds after which a test has failed."""

ROOT = Path(__file__).parents[2]


class Cluster:
    """A scheduler, a worker that a nanny would start again, and one that nobody would.

    Args:
        folder: Where they may write.
        port: That of the scheduler; by default one that is free.
    """

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._folder = folder
        self._started = 0
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start what is not there, and wait until it is."""
        if self.scheduler is None:
            self.scheduler = self._run(
                "scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard",
                "--idle-timeout", "10 minutes",
            )  # fmt: skip
        for kind in ("--nanny", "--no-nanny"):
            worker = self.workers.get(kind)
            if worker is None or worker.poll() is not None:
                self.workers[kind] = self._run(
                    "worker", self.address, kind, "--nthreads", "1", "--no-dashboard",
                    "--death-timeout", "60",
                    "--local-directory", str(self._folder),
                )  # fmt: skip
        self.ask(self._wait_for_workers)

    async def _wait_for_workers(self, client: Client) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            # One that was killed a moment ago may still be counted: each has to answer.
            with contextlib.suppress(Exception):
                if len(await client.run(os.getpid)) == len(self.workers):
                    return
            assert time.monotonic() < deadline, "the cluster does not come up"
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        """End all of it."""
        for worker in self.workers.values():
            end(worker)
        self.workers = {}
        self.stop_scheduler()

    def stop_scheduler(self, number: int = signal.SIGTERM) -> None:
        """End that alone."""
        scheduler, self.scheduler = self.scheduler, None
        if scheduler is not None:
            end(scheduler, number)

    def ask(self, question: Callable[[Client], Any]) -> Any:
        """What a client of its own is answered."""

        async def ask() -> Any:
            client: Any = Client(  # type: ignore[no-untyped-call]
                self.address, asynchronous=True, set_as_default=False, timeout=PATIENCE
            )
            async with client:
                return await question(client)

        return asyncio.run(ask())

    def _run(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        self._started += 1
        with open(self._folder / f"{what}-{self._started}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """Have it tidy up, and see that it is gone."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        process.wait(PATIENCE / 3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def tasks_of(scheduler: Any) -> list[str]:
    """What a scheduler has to do, and the records that it keeps of what was begun; runs there."""
    once = scheduler.plugins.get("asyncguard-once-1")
    kept = [] if once is None else [*once._begun]
    return [*map(str, scheduler.tasks), *map(str, kept)]
