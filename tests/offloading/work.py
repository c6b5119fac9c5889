"""What workers run in the tests."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from asyncguard import report_progress

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Marker(Exception):
    """Raised by nobody else."""


def add(a: int, b: int = 0) -> int:
    return a + b


def same(value: Any) -> Any:
    return value


def pid() -> int:
    return os.getpid()


def fail(error: BaseException) -> None:
    raise error


def sleep(seconds: float, begun: str = "", ended: str = "") -> None:
    """Sleep; both files are made, the second even if that is interrupted."""
    try:
        if begun:
            Path(begun).touch()
        time.sleep(seconds)
    finally:
        if ended:
            Path(ended).touch()


def loop(begun: str = "", ended: str = "") -> None:
    """A loop of Python's that does not end."""
    try:
        if begun:
            Path(begun).touch()
        while True:
            pass
    finally:
        if ended:
            Path(ended).touch()


def hold(begun: str, go_on: str) -> int:
    """Wait until it may go on."""
    Path(begun).touch()
    while not Path(go_on).exists():
        time.sleep(0.005)
    return os.getpid()


def append(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def count_in_c() -> int:
    """A loop of C's that nothing interrupts."""
    return sum(range(10**12))


def match() -> object:
    """A regular expression that does not end."""
    return re.match(r"(a+)+$", "a" * 60 + "b")


def swallow(begun: str = "") -> str:
    """What will not be told."""
    if begun:
        Path(begun).touch()
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def outlive() -> str:
    """It returns though it was interrupted."""
    try:
        time.sleep(60)
    except BaseException:
        return "swallowed"
    return "slept"


def leave(code: int) -> None:
    os._exit(code)


def leave_politely(code: int) -> None:
    sys.exit(code)


def crash() -> None:
    ctypes.string_at(0)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def close_everything() -> None:
    """Its own socket as well."""
    os.closerange(3, 4096)
    time.sleep(60)


def log(text: str, level: int = logging.WARNING) -> None:
    logging.getLogger("app.work").log(level, "%s", text, extra={"colour": "red"})


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=1)


def say(text: str) -> None:
    print(text, flush=True)


def listen() -> str:
    return sys.stdin.read()


def niceness() -> int:
    return os.nice(0)


def threads() -> int:
    return threading.active_count()


def unpicklable() -> Any:
    return threading.Lock()


class Unbuildable:
    """What can be pickled and not be rebuilt."""

    def __reduce__(self) -> Any:
        return fail, (Marker("never"),)


def unbuildable() -> Unbuildable:
    return Unbuildable()


def large(size: int) -> bytearray:
    return bytearray(size)


def length(data: Any) -> int:
    return len(data)


def progress() -> str:
    for step in range(1, 5):
        report_progress(step / 4)
    return "done"


def read_tenant() -> str:
    return tenant.get()
