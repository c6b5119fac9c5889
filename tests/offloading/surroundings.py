"""What is around a call: the processes of this one, and the request that the call is made for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncguard._request import RequestRecord, current_request

__all__ = ["children_of_this_process", "request_with"]


def children_of_this_process() -> set[str]:
    """Those of all its threads, zombies included."""
    found: set[str] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has just ended
            found.update(path.read_text().split())
    return found


class _Deadline:
    header = None

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def left(self) -> float:
        return self._seconds

    def retune(self, seconds: float | None) -> None: ...


@contextmanager
def request_with(seconds: float) -> Iterator[None]:
    """The block runs for a request that has so many seconds left, and does not use them up."""
    record = RequestRecord({"type": "http"}, 0.0)
    record.deadline = _Deadline(seconds)
    token = current_request.set(record)
    try:
        yield
    finally:
        current_request.reset(token)
