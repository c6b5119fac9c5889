"""Putting every guard in its right place: `install` for Starlette and FastAPI, `guard` for any ASGI app."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypedDict, Unpack

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from asyncguard._asgi import checked_app
from asyncguard._options import checked_answer, checked_error_status, checked_flag, checked_seconds
from asyncguard.blocking import SHORTEST_THRESHOLD, BlockingMiddleware, LoopMonitor
from asyncguard.clients import Shared, WatchClients, checked_resources, with_shared
from asyncguard.events import BlockReport, BusyReport, ClientReport, HangReport, TimeoutReport
from asyncguard.offloading import ANSWERS, with_pool
from asyncguard.timeouts import InnerLayer, TimeoutMiddleware

__all__ = ["guard", "install"]


def install(
    app: Starlette,
    *,
    block_threshold: float | None = 0.1,
    busy_threshold: float | None = 1.0,
    hang_after: float | None = 10.0,
    on_hang: Literal["log", "abort"] | Callable[[HangReport], object] = "log",
    on_block: Callable[[BlockReport], object] | None = None,
    on_busy: Callable[[BusyReport], object] | None = None,
    project_root: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    idle_timeout: float | None = 60.0,
    body_timeout: float | None = 30.0,
    timeout_grace: float = 5.0,
    timeout_status_code: int = 504,
    timeout_answer: ASGIApp | None = None,
    deadline_header: str | None = None,
    cancel_on_disconnect: bool = False,
    on_timeout: Callable[[TimeoutReport], object] | None = None,
    offload_workers: int | None = None,
    shared: Iterable[Shared[Any]] = (),
    watch_clients: bool = True,
    on_client: Callable[[ClientReport], object] | None = None,
    log: bool = True,
) -> None:
    """Guard a Starlette or FastAPI application, in place.

    Call it anywhere before the application is served: middlewares added before and after end up inside
    the guard, whatever the order.

    Args:
        app: The application.
        block_threshold: The shortest stall of the event loop to report, in seconds; `None` switches
            blocking detection off.
        busy_threshold: For how many seconds a request may hold the loop in pieces that are no stalls by
            themselves, before that is reported. `None` for any time.
        hang_after: After how many seconds a stall that goes on is logged, with the stack of every thread.
            `None` for never.
        on_hang: What else to do then: ``"log"`` for nothing, ``"abort"`` to end the process, or a function
            that is called with the `HangReport`.
        on_block: Called with each `BlockReport`, on a thread of its own.
        on_busy: Called with each `BusyReport`, in the same way.
        project_root: The directory whose files are yours. By default, everything that is neither in
            the standard library nor in a ``site-packages`` folder.
        timeout: In how many seconds each response has to begin. `None` switches request timeouts off, all of
            the following and `@timeout` included.
        idle_timeout: For how many seconds a response that has begun may be silent. `None` for any time.
        body_timeout: For how many seconds a client may be silent while its body is waited for. `None` for any
            time.
        timeout_grace: After how many seconds what was cancelled and still runs is cancelled again.
        timeout_status_code: The status of the answer to a request that ran out of time.
        timeout_answer: An ASGI application, such as a Starlette `Response`, that gives that answer.
        deadline_header: The name of a header in which callers say for how many seconds they will wait, and
            shared HTTP clients tell the services that they call what is left.
        cancel_on_disconnect: Whether to cancel a handler when its client leaves.
        on_timeout: Called with each `TimeoutReport`, on a thread of its own.
        offload_workers: How many worker processes `@offload` has: started with the application, and ended
            with it. By default they are started as calls need them, up to as many as there are CPUs.
        shared: What `asyncguard.shared` has declared: opened before the application's own lifespan begins,
            and closed after it has ended.
        watch_clients: Whether to report lines that build a client for each request, to throw it away.
        on_client: Called with each `ClientReport`, on a thread of its own.
        log: Whether to log to ``asyncguard.blocking``, ``asyncguard.timeouts`` and ``asyncguard.clients``.

    Raises:
        TypeError: If `app` is neither a Starlette nor a FastAPI application, or an option is of the
            wrong type.
        ValueError: If an option is out of range.
        RuntimeError: If the application is being served already, or guarded already.
    """
    if not isinstance(app, Starlette):
        raise TypeError(
            f"install() takes a Starlette or FastAPI application, not {app!r}; "
            "wrap any other ASGI application with asyncguard.guard(app)"
        )
    if app.middleware_stack is not None:
        raise RuntimeError(
            f"install() came too late: {app!r} is being served already; call it where the app is built"
        )
    build = app.build_middleware_stack
    if isinstance(build, _GuardedStack):
        raise RuntimeError(f"install() was called twice for {app!r}; pass all options in one call")
    timeouts = TimeoutMiddleware(
        app.router,
        timeout=timeout,
        idle_timeout=idle_timeout,
        body_timeout=body_timeout,
        grace=checked_seconds("timeout_grace", timeout_grace),
        status_code=checked_error_status("timeout_status_code", timeout_status_code),
        answer=checked_answer("timeout_answer", timeout_answer),
        deadline_header=deadline_header,
        cancel_on_disconnect=cancel_on_disconnect,
        on_timeout=on_timeout,
        project_root=project_root,
        log=log,
    )
    blocking = _blocking(
        app.router,
        block_threshold,
        busy_threshold=busy_threshold,
        hang_after=hang_after,
        on_hang=on_hang,
        on_block=on_block,
        on_busy=on_busy,
        project_root=project_root,
        log=log,
    )
    clients = WatchClients(app.router, on_client=on_client, project_root=project_root, log=log)
    watching = clients if checked_flag("watch_clients", watch_clients) else None
    if offload_workers is not None:
        from asyncguard.offloading import OffloadPool

        OffloadPool(offload_workers)  # so that it is checked here
        lifespan: Any = app.router.lifespan_context
        spanning: Any = with_pool(lifespan, lambda: OffloadPool(offload_workers))
        app.router.lifespan_context = spanning
    resources = checked_resources("shared must be a list of", shared)
    if resources:
        app.router.lifespan_context = with_shared(app.router.lifespan_context, resources)
    if blocking is not None or timeout is not None or watching is not None or offload_workers is not None:
        stack = _GuardedStack(app, blocking, timeouts if timeout is not None else None, watching)
        app.build_middleware_stack = stack  # type: ignore[method-assign]


def guard(
    app: ASGIApp, *, block_threshold: float | None = 0.1, **options: Unpack[BlockingOptions]
) -> ASGIApp:
    """Wrap any ASGI application from outside, without a change to it.

    Args:
        app: The ASGI application.
        block_threshold: The shortest stall of the event loop to report, in seconds; `None` switches
            blocking detection off.
        **options: As for `install`.

    Returns:
        The guarded ASGI application; `app` itself if every guard is off.

    Raises:
        TypeError: If `app` is no ASGI application, or an option is of the wrong type.
        ValueError: If an option is out of range.
    """
    checked_app(app, called_by="guard()")
    return _blocking(app, block_threshold, **options) or app


class BlockingOptions(TypedDict, total=False):
    """The options of blocking detection, but for the one that switches it off; see `install`."""

    busy_threshold: float | None
    hang_after: float | None
    on_hang: Literal["log", "abort"] | Callable[[HangReport], object]
    on_block: Callable[[BlockReport], object] | None
    on_busy: Callable[[BusyReport], object] | None
    project_root: str | os.PathLike[str] | None
    log: bool


def _blocking(
    app: ASGIApp, threshold: float | None, **options: Unpack[BlockingOptions]
) -> BlockingMiddleware | None:
    """The guard against blocking; `None` if it is off. Its options are checked in either case."""
    if threshold is None:
        LoopMonitor(**options)
        return None
    # Checked here as well, for the sake of the name that the caller knows it by.
    threshold = checked_seconds("block_threshold", threshold, minimum=SHORTEST_THRESHOLD)
    return BlockingMiddleware(app, threshold=threshold, **options)


class _GuardedStack:
    """What builds the application's middlewares, with a guard around all of them.

    Starlette calls it when the first message arrives. Until then the guard holds the bare router: it is
    made at once, so that its options are checked where they were written.
    """

    def __init__(
        self,
        app: Starlette,
        blocking: BlockingMiddleware | None,
        timeouts: TimeoutMiddleware | None,
        clients: WatchClients | None,
    ) -> None:
        self._app = app
        self._build = app.build_middleware_stack
        self._blocking = blocking
        self._timeouts = timeouts
        self._clients = clients

    def __call__(self) -> ASGIApp:
        app = self._app
        for error, answer in ANSWERS.items():
            if app.exception_handlers.keys().isdisjoint(set(error.__mro__) - {Exception}):
                app.add_exception_handler(error, answer)
        if self._timeouts is None:
            stack = self._build()
        else:
            stack = self._build_with_inner_layer()
            self._timeouts.has_inner_layer = True
        # From the inside out.
        for layer in (self._clients, self._timeouts, self._blocking):
            if layer is not None:
                layer.app = stack
                stack = layer
        return stack

    def _build_with_inner_layer(self) -> ASGIApp:
        app = self._app
        # The innermost of the application's middlewares, for as long as they are put together.
        own = app.user_middleware
        app.user_middleware = [*own, Middleware(InnerLayer)]
        try:
            stack = self._build()
        finally:
            app.user_middleware = own
        return stack
