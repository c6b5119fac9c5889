"""The time that a request has left, as the limit of one call that a client makes for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from asyncguard._request import current_request, remaining

__all__ = ["OUT_OF_TIME", "limited", "onward", "remaining"]

OUT_OF_TIME = "the request that this call is made for has no time left"
"""What the exceptions say that a client raises then."""

_LONGEST = 999_999_999.0
"""The most seconds that a caller can say it waits."""


@contextmanager
def limited(seconds: float) -> Iterator[anyio.CancelScope]:
    """A block that is cancelled when so much time has passed, unless the current request has ended by then.

    What a request has started and left behind has any time: nobody waits for it any more.

    Args:
        seconds: What the request has left.
    """
    record = current_request.get()
    calls = record.endings if record is not None else None
    with anyio.CancelScope(deadline=anyio.current_time() + seconds) as scope:
        if calls is None:
            yield scope
            return

        def lift() -> None:
            scope.deadline = math.inf

        calls[scope] = lift
        try:
            yield scope
        finally:
            calls.pop(scope, None)


def onward() -> tuple[str, str] | None:
    """The header that tells the next service for how many seconds it is waited, and its value.

    `None` if there is no limit, or services do not tell each other.
    """
    record = current_request.get()
    deadline = record.deadline if record is not None else None
    name = deadline.header if deadline is not None else None
    seconds = deadline.left() if deadline is not None else math.inf
    if name is None or math.isinf(seconds):
        return None
    # Rounded down: promise no more than there is.
    return name, f"{math.floor(min(seconds, _LONGEST) * 1000) / 1000:.3f}"
