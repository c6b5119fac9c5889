"""Servers that tests take away and bring back: stopped or frozen, then there again on the same port."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.servers import eventually

__all__ = ["Service"]

_STOP_TIMEOUT = 20.0


class Service:
    """A program that serves on a port which stays the same.

    Attributes:
        command: What starts it.
        options: More of what `subprocess.Popen` takes.
        log: The file that it writes to.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, command: Sequence[str], log: Path, **options: Any) -> None:
        self.command = command
        self.log = log
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[int] = []

    def is_ready(self) -> bool:
        """Whether it serves; asked again and again while it starts."""
        raise NotImplementedError

    def processes(self) -> Iterable[int]:
        """The ids of the processes that it has started itself."""
        return ()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        assert self._process is None
        with self.log.open("a") as log:
            self._process = process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is not for it: its clients end first
                **self.options,
            )
        eventually(lambda: process.poll() is not None or self.is_ready(), f"{self.command[0]} is ready")
        assert process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        """End it with all of its connections, as an operator does; if need be by force."""
        self.thaw()
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(self.stop_signal)
            try:
                process.wait(_STOP_TIMEOUT)
            finally:
                process.kill()
                process.wait()

    def freeze(self) -> None:
        """Have it answer nothing, while its connections stay and new ones are taken."""
        assert self._process is not None
        self._frozen = [self._process.pid, *self.processes()]
        for pid in self._frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Have it go on."""
        frozen, self._frozen = self._frozen, []
        for pid in reversed(frozen):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have it run for as long as this is open, but for what the test does to it."""
        try:
            self.start()
            yield
        finally:
            self.stop()
