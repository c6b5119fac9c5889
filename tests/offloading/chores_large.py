"""What workers run in the tests of large payloads and of the libraries that they come from."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from asyncguard import report_progress


def same(value: Any) -> Any:
    return value


def is_same(first: Any, second: Any, third: Any = None) -> tuple[bool, bool]:
    """Whether arguments are one object."""
    return first is second, first is third


def pid() -> int:
    return os.getpid()


def length(value: Any) -> int:
    return len(value)


def total(value: Any) -> float:
    return float(value.sum())


def fill(array: Any, value: int) -> Any:
    """It may write to what it was given."""
    array[...] = value
    return array


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": number, "name": f"row {number}", "share": number / 3} for number in range(count)]


MAKERS: dict[str, Callable[[int], Any]] = {
    "bytes": lambda size: np.arange(size // 8).tobytes(),
    "bytearray": lambda size: bytearray(np.arange(size // 8).tobytes()),
    "text": lambda size: "0123456789" * (size // 10),
    "array": lambda size: np.arange(size // 8),
    "columns": lambda size: np.asfortranarray(np.arange(size // 80 * 10).reshape(-1, 10)),
    "strided": lambda size: np.arange(size // 8 * 2)[::2],
    "view": lambda size: memoryview(np.arange(size // 8).tobytes()),
    "frame": lambda size: frame(size // 16),
    "table": lambda size: table(size // 16),
}


def frame(length: int) -> Any:
    import pandas as pd  # type: ignore[import-untyped]  # not in workers that do without: it takes its time

    return pd.DataFrame({"a": np.arange(length), "b": np.arange(length) / 2})


def table(length: int) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    return pa.table({"a": np.arange(length), "b": np.arange(length) / 2})


def make(kind: str, size: int) -> Any:
    """Something of about so many bytes."""
    return MAKERS[kind](size)


# -- what a process holds ----------------------------------------------------------------------------


def descriptors() -> list[str]:
    """What this process has open, but for the listing itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        found.append(re.sub(r"\d+", "", target))
    return sorted(found)


def memory() -> int:
    """The bytes that this process has, shared ones included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shared_memory(least: int = 10_000_000) -> list[str]:
    """The files there that a payload may have left; others have theirs there, too."""
    found = []
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_size >= least:
                found.append(path.name)
    return sorted(found)


# -- what is pickled or rebuilt at a moment of the test's choosing -----------------------------------

gate = threading.Event()
"""In the test's process."""
arrived = threading.Event()
"""Whether somebody stands at the gate."""


class Gated:
    """Cannot be pickled before the gate is open."""

    def __reduce__(self) -> Any:
        arrived.set()
        assert gate.wait(30)
        return int, ()


class SlowToRebuild:
    """Says so by a file, and then takes its time, in the worker."""

    def __init__(self, begun: str) -> None:
        self.begun = begun

    def __reduce__(self) -> Any:
        return linger, (self.begun,)


class SlowToPickle:
    """The same on the way home."""

    def __init__(self, begun: str) -> None:
        self.begun = begun

    def __reduce__(self) -> Any:
        linger(self.begun)
        return int, ()


def linger(begun: str) -> int:
    Path(begun).touch()
    time.sleep(60)
    return 0


def slow_to_pickle(begun: str, size: int) -> tuple[bytes, SlowToPickle, Any]:
    return bytes(size), SlowToPickle(begun), np.zeros(size, np.uint8)


class Huge:
    """Small here, large on the way."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> Any:
        return len, (bytes(self.size),)


def huge(size: int) -> Huge:
    return Huge(size)


def start_threads() -> int:
    """NumPy's own, in C; how many there are."""
    matrix = np.ones((400, 400))
    matrix @ matrix
    return len(os.listdir("/proc/self/task"))


# -- calls that take long, in C ----------------------------------------------------------------------


def multiply() -> None:
    """A product of matrices: it lets go of the GIL, and looks at no signal."""
    matrix = np.ones((3000, 3000), np.int64)
    report_progress(0)
    matrix @ matrix


def sort() -> None:
    array = np.random.default_rng(1).random(16_000_000).astype(np.longdouble)
    report_progress(0)
    np.sort(array, kind="stable")


def count() -> int:
    """It keeps the GIL."""
    report_progress(0)
    return sum(range(10**10))


def match() -> object:
    report_progress(0)
    return re.match(r"(a+)+$", "a" * 60 + "b")


def sleep() -> None:
    report_progress(0)
    time.sleep(60)


# -- what is still read when the call has ended ---------------------------------------------------------

kept: Any = None


def keep(value: Any) -> None:
    global kept
    kept = value


def total_of_kept() -> int:
    return int(kept.sum())


def fork_and_total(value: Any, go: str, answer: str) -> None:
    """A child adds up later, when the call has ended."""
    if os.fork() == 0:
        end = time.monotonic() + 60
        while not os.path.exists(go) and time.monotonic() < end:
            time.sleep(0.01)
        Path(answer + "~").write_text(str(int(value.sum())))
        os.rename(answer + "~", answer)
        os._exit(0)


def total_later(value: Any, seconds: float) -> int:
    time.sleep(seconds)
    return int(value.sum())
