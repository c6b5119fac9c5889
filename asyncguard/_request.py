"""The one record of a request in flight, and the context variable that leads to it.

Whichever guard comes first makes the record and puts it into the scope under `SCOPE_KEY`; guards
further in find it there. The context variable leads from any code that runs for the request, child
tasks and callbacks included, back to the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from sys import getrefcount
from types import FrameType
from typing import Any, Protocol
from uuid import UUID

from asyncguard import _clock

__all__ = ["ALONE", "SCOPE_KEY", "Deadline", "RequestRecord", "current_request", "remaining"]

SCOPE_KEY = "asyncguard.request"

current_request: ContextVar[RequestRecord | None] = ContextVar("asyncguard.request", default=None)
"""The request that the running code works for, or `None`."""


def _references_to_local() -> int:
    thing = object()
    return getrefcount(thing)


ALONE = _references_to_local()
"""How many references there are to what only a local variable refers to, as this Python counts them."""


class Deadline(Protocol):
    """By when a request is to be answered. Both methods may be called from any thread."""

    @property
    def header(self) -> str | None:
        """The name of the header in which services tell each other what is left; `None` if they do not."""

    def left(self) -> float:
        """Seconds that are left, 0 at least; plus infinity once they do not count any more."""

    def retune(self, seconds: float | None) -> None:
        """Give the request this many seconds in all; `None` for any time."""


class Builds(Protocol):
    """What wants to know of the clients that requests build for themselves. Called from any thread."""

    def begin(
        self, record: RequestRecord, kind: Any, thing: object, part: object, frame: FrameType
    ) -> Build | None:
        """A client is about to be built, by `frame`; `None` if nobody wants to know more."""


class Build(Protocol):
    """What wants to know how the building of one client goes on."""

    def end(self, seconds: float) -> None:
        """It has been built, in so many seconds."""

    def fail(self) -> None:
        """It could not be built."""


class RequestRecord:
    """What asyncguard knows of one request: HTTP or websocket.

    One is made for every request, so what most requests never change is kept in the class.

    Attributes:
        started: When the request reached the outermost guard, on asyncguard's monotonic clock.
        loop_time: Seconds for which its coroutine has held the loop so far.
        released: When its coroutine last gave the loop back; minus infinity before it first did.
        finished_at: When the request ended; plus infinity before that.
        coroutine: The application's coroutine, while the request is in flight.
        receive: What the server gave for receiving, while the request is in flight.
        limited: Whether its endpoint has been called and has set a limit of its own.
        deadline: By when it is to be answered, where it is guarded by timeouts and in flight.
        arrived: When its data reached this machine, where that was asked for and is known.
        turn_since: When its last turn on the loop began.
        builds: What wants to know of the clients that it builds, while it is in flight.
        at_end: What is called when the request ends, by what it is called for; `None` for nothing.
        busy_at: From which `loop_time` on its turns are to be added up; plus infinity for never, `None` for
            what holds for all.
    """

    loop_time: float = 0.0
    released: float = -math.inf
    finished_at: float = math.inf
    coroutine: Coroutine[Any, Any, Any] | None = None
    busy_at: float | None = None
    arrived: float | None = None
    deadline: Deadline | None = None
    limited: bool = False
    builds: Builds | None = None
    at_end: dict[object, Callable[[], object]] | None = None

    _kept: tuple[Any, ...] = ()

    def __init__(self, scope: Mapping[str, Any], started: float, receive: object = None) -> None:
        self._scope: Mapping[str, Any] | None = scope
        self.started: float = started
        self.turn_since: float = started
        self.receive: object = receive

    def finish(self) -> None:
        """Let go of the scope and the coroutine, keeping only what names the request; make its last calls.

        A task that runs on holds this record; it must not keep alive all that the scope leads to.
        """
        if self._scope is not None:
            self._kept = tuple(map(self._scope.get, _KEPT))
            self._scope = None
        self.finished_at = _clock.monotonic()
        self.coroutine = self.receive = self.deadline = self.builds = None
        calls, self.at_end = self.at_end, None
        if calls is None:
            return
        for key in tuple(calls):
            call = calls.pop(key, None)  # or a thread that runs on has taken it back: it came too late
            if call is not None:
                call()

    @property
    def endings(self) -> dict[object, Callable[[], object]] | None:
        """`at_end`, to be added to, from any thread; `None` once the request has ended."""
        calls: dict[object, Callable[[], object]] | None = vars(self).setdefault("at_end", {})  # in one step
        return calls

    def __deepcopy__(self, memo: object) -> RequestRecord:
        """The same record: a copied scope is still of the same request."""
        return self

    @property
    def _naming(self) -> Mapping[str, Any]:
        """The scope, or what is left of it; asked from any thread."""
        scope = self._scope
        return dict(zip(_KEPT, self._kept, strict=True)) if scope is None else scope

    @property
    def endpoint(self) -> object:
        """The function or class that answers the request; `None` before routing."""
        return self._naming.get("endpoint")

    @property
    def connection(self) -> object:
        """What tells its connection from others, where one carries only one request at a time (HTTP/1).

        `None` elsewhere.
        """
        client = self._naming.get("client")
        # Behind a proxy, servers put the user's address here, and 0 for the port that they do not know.
        known = client and client[1] and str(self._naming.get("http_version")).startswith("1")
        return client if known else None

    @property
    def label(self) -> str:
        """Method and route template (``GET /users/{id}``); the bare path where no route matched.

        What a client chose is shown with its unprintable characters escaped, and cut at 200.
        """
        scope = self._naming
        method = "WS" if scope.get("type") == "websocket" else scope.get("method") or ""
        path = scope.get("path") or ""
        template = getattr(scope.get("route"), "path", None) or ""
        # Starlette's Mount moves `root_path` along and keeps the server's own in `app_root_path`.
        root = scope.get("app_root_path")
        root = (scope.get("root_path") if root is None else root) or ""
        root = root.rstrip("/")
        if root and path.startswith(root + "/"):
            path = path[len(root) :]
        if template:
            path = full_template(path, template, scope.get("path_params") or {})
        label = f"{method} {path}"
        return label[:200] if label.isprintable() else _escaped(label[:200])


def remaining() -> float:
    """How many seconds the current request has left until it must have been answered.

    In a request it may be called anywhere: in the endpoint, its dependencies, the tasks that it started and
    its worker threads.

    Returns:
        The seconds that are left, 0 at least. Plus infinity outside a request, in one without a limit, and
        once the response has begun.
    """
    record = current_request.get()
    deadline = record.deadline if record is not None else None
    return math.inf if deadline is None else deadline.left()


_KEPT = (
    "app_root_path",
    "client",
    "endpoint",
    "http_version",
    "method",
    "path",
    "path_params",
    "root_path",
    "route",
    "type",
)
"""What of a scope is kept when its request has ended."""


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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
