"""The one record of a request in flight, and the context variable that leads to it.

Whichever guard comes first makes the record and puts it into the scope under `SCOPE_KEY`; guards
further in find it there. The context variable leads from any code that runs for the request, child
tasks and callbacks included, back to the record.
"""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from asyncguard import _clock

__all__ = ["SCOPE_KEY", "RequestRecord", "current_request"]

SCOPE_KEY = "asyncguard.request"

current_request: ContextVar[RequestRecord | None] = ContextVar("asyncguard.request", default=None)
"""The request that the running code works for, or `None`."""


class RequestRecord:
    """What asyncguard knows of one request: HTTP or websocket.

    Attributes:
        connection: What tells its connection from others, where one carries only one request at a time
            (HTTP/1); `None` elsewhere.
        started: When the request reached the outermost guard, on asyncguard's monotonic clock.
        loop_time: Seconds for which its coroutine has held the loop so far.
        released: When its coroutine last gave the loop back; minus infinity before it first did.
        finished_at: When the request ended; plus infinity before that.
        coroutine: The application's coroutine, while the request is in flight.
    """

    __slots__ = (
        "_endpoint",
        "_label",
        "_scope",
        "connection",
        "coroutine",
        "finished_at",
        "loop_time",
        "released",
        "started",
    )

    def __init__(self, scope: MutableMapping[str, Any], started: float) -> None:
        self._scope: MutableMapping[str, Any] | None = scope
        self._label: tuple[str, str, str, Mapping[str, Any], str] | None = None
        self._endpoint: object = None
        self.connection: object = _connection(scope)
        self.started: float = started
        self.released: float = -math.inf
        self.finished_at: float = math.inf
        self.loop_time: float = 0.0
        self.coroutine: Coroutine[Any, Any, Any] | None = None

    def finish(self) -> None:
        """Let go of the scope and the coroutine, keeping only what names the request.

        The scope holds this record: without this, every request would leave a cycle to the garbage
        collector.
        """
        scope = self._scope
        if scope is not None:
            self._label = _label_parts(scope)
            self._endpoint = scope.get("endpoint")
            self._scope = None
        self.finished_at = _clock.monotonic()
        self.coroutine = None

    def __deepcopy__(self, memo: object) -> RequestRecord:
        """The same record: a copied scope is still of the same request."""
        return self

    @property
    def endpoint(self) -> object:
        """The function or class that answers the request; `None` before routing."""
        scope = self._scope
        return self._endpoint if scope is None else scope.get("endpoint")

    @property
    def label(self) -> str:
        """Method and route template (``GET /users/{id}``); the bare path where no route matched.

        What a client chose is shown with its unprintable characters escaped, and cut at 200.
        """
        scope = self._scope
        parts = _label_parts(scope) if scope is not None else self._label
        assert parts is not None
        method, path, template, params, root = parts
        if root and path.startswith(root + "/"):
            path = path[len(root) :]
        label = f"{method} {full_template(path, template, params) if template else path}"
        return label[:200] if label.isprintable() else _escaped(label[:200])


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _connection(scope: MutableMapping[str, Any]) -> object:
    client = scope.get("client")
    # Behind a proxy, servers put the user's address here, and 0 for the port that they do not know.
    return client if client and client[1] and str(scope.get("http_version")).startswith("1") else None


def _label_parts(
    scope: MutableMapping[str, Any],
) -> tuple[str, str, str, Mapping[str, Any], str]:
    """Method, path, template, parameters and root; the scope may be in any state by then."""
    return (
        "WS" if scope.get("type") == "websocket" else scope.get("method") or "",
        scope.get("path") or "",
        getattr(scope.get("route"), "path", None) or "",
        scope.get("path_params") or {},
        # Starlette's Mount moves `root_path` along and keeps the server's own in `app_root_path`.
        (scope.get("app_root_path", scope.get("root_path")) or "").rstrip("/"),
    )


def full_template(path: str, template: str, params: Mapping[str, Any]) -> str:
    """The whole route template of a request, from the last router's share of it.

    ``scope["route"].path`` covers only what the innermost router matched: mounts and, from FastAPI's
    nested routers on, prefixes of included routers are missing. They are put back from the path, with
    the values of the outer parameters turned back into their names.

    Args:
        path: The path of the request.
        template: The path of the route that matched, such as ``/items/{id:int}``.
        params: The path parameters of the request, of all routers together.

    Returns:
        A template such as ``/v1/{tenant}/items/{id:int}``.
    """
    filled, inner = template, set[str]()
    # Only values whose text is known to be harmless: a convertor may have made any object of it.
    params = {name: value for name, value in params.items() if type(value) in _PLAIN}
    for name, value in params.items():
        for placeholder in (f"{{{name}}}", *(f"{{{name}:{kind}}}" for kind in _CONVERTORS)):
            if placeholder in filled:
                filled = filled.replace(placeholder, str(value))
                inner.add(name)
    if not path.endswith(filled):
        return template
    segments = path[: len(path) - len(filled)].split("/")
    for name, value in params.items():
        if name not in inner and str(value) in segments:
            # The last one, since parameters mostly follow what they belong to.
            last = len(segments) - 1 - segments[::-1].index(str(value))
            segments[last] = f"{{{name}}}"
    return "/".join(segments) + template


_PLAIN = (str, int, float, UUID)
_CONVERTORS = ("str", "path", "int", "float", "uuid")
