"""Sessions of aiohttp: they give up when the request that they work for has no time left.

They keep their own limits too, and raise what they always do when time is up: `TimeoutError`. aiohttp is not
imported.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from asyncguard.clients._deadline import OUT_OF_TIME, limited, onward, remaining

__all__ = ["fit_session"]


def fit_session(session: Any) -> None:
    """Have a ``ClientSession`` keep to the deadlines of requests, its websocket handshakes included."""
    own = vars(session)
    if "_request" not in own:
        # Past `__setattr__`, which discourages this in development mode.
        own["_request"] = _Requesting(session)


class _Requesting:
    """What a session sends its requests by."""

    def __init__(self, session: Any) -> None:
        self._session = session

    async def __call__(self, method: str, url: Any, **options: Any) -> Any:
        left, session = remaining(), self._session
        if math.isinf(left):
            return await type(session)._request(session, method, url, **options)
        if left <= 0:
            raise TimeoutError(f"{OUT_OF_TIME}; nothing was sent")
        self._send_onward(options)
        with limited(left):
            response = await type(session)._request(session, method, url, **options)
            _limit_body(response)
            return response
        raise TimeoutError(f"{OUT_OF_TIME}: {left:.3g} s were left when it began")

    def _send_onward(self, options: dict[str, Any]) -> None:
        """Add the time that is left to the headers of a request, unless they have it."""
        rest, defaults = onward(), self._session.headers
        if rest is not None and rest[0] not in defaults:
            headers = type(defaults)(options.get("headers") or ())
            headers.setdefault(*rest)
            options["headers"] = headers


def _limit_body(response: Any) -> None:
    """Have each piece of a response's body come in time."""
    content: Any = getattr(response, "content", None)
    # Not a subclass: all responses without a body share one of those.
    if type(content).__name__ == "StreamReader" and hasattr(content, "_timer"):
        content._timer = _Timer(content._timer)


class _Timer:
    """What a body is waited for under: the session's own limit, and the request's.

    Args:
        own: That of the session.
    """

    __slots__ = ("_limit", "_own")

    def __init__(self, own: Any) -> None:
        self._own = own
        self._limit: AbstractContextManager[object] | None = None

    def assert_timeout(self) -> None:
        """Raise `TimeoutError` if the session's own limit has passed."""
        self._own.assert_timeout()

    def __enter__(self) -> _Timer:
        left = remaining()
        if left <= 0:
            raise TimeoutError(OUT_OF_TIME)
        self._own.__enter__()
        if not math.isinf(left):
            self._limit = limited(left)
            self._limit.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        limit, self._limit = self._limit, None
        if limit is not None and limit.__exit__(kind, error, traceback):
            self._own.__exit__(None, None, None)
            raise TimeoutError(f"{OUT_OF_TIME}: its response began, but did not end")
        return self._own.__exit__(kind, error, traceback)
