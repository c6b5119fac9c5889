"""What asyncguard knows of ASGI itself, whatever the framework."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable
from http import HTTPStatus
from types import FunctionType, MethodType

from starlette.types import Message, Receive, Scope, Send

__all__ = ["ProblemAnswer", "checked_app", "is_asgi_app", "is_factory"]


def is_asgi_app(app: object) -> bool:
    """Whether `app` looks like an ASGI 3 application: ``await app(scope, receive, send)``.

    The rule is uvicorn's: a coroutine function, or an object whose ``__call__`` is one.
    """
    # By the type, not by the object: a proxy would answer for another, or fail to.
    while issubclass(type(app), functools.partial):
        app = app.func  # type: ignore[attr-defined]
    if issubclass(type(app), FunctionType | MethodType):
        return inspect.iscoroutinefunction(app)
    return inspect.iscoroutinefunction(type(app).__call__) if callable(app) else False


def is_factory(candidate: object) -> bool:
    """Whether `candidate` is a plain function that can be called without arguments."""
    if not inspect.isroutine(candidate) or inspect.iscoroutinefunction(candidate):
        return False
    try:
        inspect.signature(candidate).bind()
    except (TypeError, ValueError):
        return False
    return True


def checked_app(app: object, *, called_by: str) -> None:
    """Refuse what is no ASGI application.

    Raises:
        TypeError: If `app` cannot be called as ``await app(scope, receive, send)``.
    """
    if not is_asgi_app(app):
        hint = "; call the factory and pass what it returns" if is_factory(app) else ""
        raise TypeError(f"{called_by} takes an ASGI application, not {app!r}{hint}")


class ProblemAnswer:
    """An ASGI application that answers every request with the same problem, as RFC 9457 has it.

    Args:
        status: The HTTP status code.
        detail: What is wrong, for a person to read.
        headers: More headers.
    """

    def __init__(self, status: int, detail: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        problem = {"type": "about:blank", "title": _phrase(status), "status": status, "detail": detail}
        self._body = json.dumps(problem).encode()
        self._start: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/problem+json"),
                (b"content-length", str(len(self._body)).encode()),
                *headers,
            ],
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Middlewares add to what they pass on.
        await send({**self._start, "headers": list(self._start["headers"])})
        await send({"type": "http.response.body", "body": self._body})


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"
