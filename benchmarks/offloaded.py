"""What the calls of `benchmarks.offload` run, in any process."""

from __future__ import annotations

import time
from collections.abc import Sized
from typing import TypeVar

__all__ = ["echo", "size", "spin"]

T = TypeVar("T")


def echo(value: T) -> T:
    """A call that does nothing."""
    return value


def size(value: Sized) -> int:
    """A call with a large argument."""
    return len(value)


def spin(seconds: float) -> None:
    """A call that is given up."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
