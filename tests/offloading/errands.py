"""What workers of a Dask cluster run in the tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from asyncguard import offload
from tests.offloading.work import Marker, tenant

PATIENCE = 60.0


@offload
def double(number: int) -> int:
    return 2 * number


@offload(context=[tenant])
def whose() -> str:
    return tenant.get()


def note(path: str, text: str = "") -> None:
    """Add a line to a file: one write, so that lines of several processes do not mix."""
    with open(path, "a") as file:
        file.write(f"{text or os.getpid()}\n")


def die(path: str) -> None:
    note(path)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(path: str, gate: str, text: str = "") -> int:
    """Say that it has begun, and wait until a file is there; returns the worker's process id."""
    note(path, text)
    deadline = time.monotonic() + PATIENCE
    while not Path(gate).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return os.getpid()


def loop(begun: str, ended: str) -> None:
    """A loop of Python's, whose end is told."""
    try:
        note(begun)
        while True:
            pass
    finally:
        note(ended)


class Stubborn:
    """Its end takes long, and what is raised in that is lost."""

    def __init__(self, begun: str, between: str) -> None:
        self._begun, self._between = begun, between

    def __del__(self) -> None:
        try:
            note(self._begun)
            while True:
                pass
        finally:
            note(self._between)


def loop_twice(begun: str, between: str, ended: str) -> None:
    """The first loop swallows what is to stop it."""
    try:
        stubborn = Stubborn(begun, between)
        del stubborn
        while True:
            pass
    finally:
        note(ended)


class Odd(Exception):
    """Its constructor takes more than `args` has."""

    def __init__(self, text: str, *, number: int) -> None:
        super().__init__(text)
        self.number = number


def raise_odd() -> None:
    """From what cannot be pickled."""
    raise Odd("odd", number=7) from KeyError(threading.Lock())


def raise_several() -> None:
    raise ExceptionGroup("several", [Marker("one"), ValueError("two")])


def total(array: Any) -> tuple[float, bool]:
    """Its sum, and whether it may be written to."""
    return float(array.sum()), bool(array.flags.writeable)


def ones(size: int) -> Any:
    import numpy

    return numpy.ones(size)


def wait_and_note(begun: str, gate: str, ended: str) -> None:
    wait_for(begun, gate)
    note(ended)
