"""What workers run in the stress test: calls that do what they should, and calls that do not."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from pickle import PickleBuffer
from typing import Any, NoReturn

from asyncguard import report_progress


class Blob:
    """Bytes that travel beside the pickle, as an array's do."""

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Blob, (PickleBuffer(self.data),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]


class Mischief(Exception):
    """Raised by nobody else."""


class Unbuildable:
    """What can be pickled and not be rebuilt."""

    def __reduce__(self) -> Any:
        return fail, ("never",)


# -- calls that end as they should -------------------------------------------------------------------


def echo(token: str, payload: Any) -> tuple[str, Any]:
    return token, payload


def nap(token: str, seconds: float) -> tuple[str, float]:
    time.sleep(seconds)
    return token, seconds


def chat(token: str, times: int) -> tuple[str, int]:
    for step in range(times):
        logging.getLogger("tests.mischief").info("%s %d", token, step)
        report_progress((step + 1) / times)
    return token, times


def fail(token: str) -> NoReturn:
    raise Mischief(token)


def unpicklable(token: str) -> Any:
    return token, threading.Lock()


def unbuildable(token: str) -> Any:
    return token, Unbuildable()


# -- calls that do not end ---------------------------------------------------------------------------


def sleep() -> None:
    time.sleep(60)


def spin() -> None:
    while True:
        pass


def clean_up() -> None:
    """It takes a moment to end."""
    try:
        time.sleep(60)
    finally:
        time.sleep(0.02)


def swallow() -> None:
    """It will not be told."""
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def count_in_c() -> int:
    """Nothing interrupts it."""
    return sum(range(10**12))


def translate() -> None:
    """It raises something else when it is stopped."""
    try:
        time.sleep(60)
    except BaseException:
        raise Mischief("translated") from None


# -- calls that end the process ----------------------------------------------------------------------


def leave() -> NoReturn:
    os._exit(3)


def leave_politely() -> NoReturn:
    sys.exit(4)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def segfault() -> None:
    ctypes.string_at(0)


def close_everything() -> None:
    """Its own socket as well."""
    os.closerange(3, 1024)
    time.sleep(60)


def close_and_return() -> None:
    """The answer cannot be sent."""
    os.closerange(3, 1024)


def ask_to_be_killed() -> None:
    report_progress(os.getpid())
    time.sleep(60)
