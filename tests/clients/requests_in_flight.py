"""Requests that clients work for, with a real clock and without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from asyncguard import _clock
from asyncguard._request import RequestRecord, current_request

__all__ = ["FakeDeadline", "request_with"]


class FakeDeadline:
    """A deadline so many seconds from now.

    Attributes:
        header: The name of the header in which it is sent onward.
    """

    def __init__(self, seconds: float, header: str | None = None) -> None:
        self._at = _clock.monotonic() + seconds
        self.header = header

    def left(self) -> float:
        return max(0.0, self._at - _clock.monotonic())

    def retune(self, seconds: float | None) -> None:
        raise AssertionError("a client changes nothing")


@contextmanager
def request_with(seconds: float, header: str | None = None) -> Iterator[RequestRecord]:
    """The block runs for a request that has so many seconds left."""
    record = RequestRecord({"type": "http"}, 0.0)
    record.deadline = FakeDeadline(seconds, header)
    token = current_request.set(record)
    try:
        yield record
    finally:
        current_request.reset(token)
