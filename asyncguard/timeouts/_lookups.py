"""Look-ups in the insides of anyio and asyncio, for which there is no public way.

Each has a test of its own that fails loudly when a new version changes it, and does no harm then.
"""

from __future__ import annotations

import asyncio
import sys
from sys import modules as _modules
from types import FrameType
from typing import Any

__all__ = ["awaited_future", "cancel_scope", "is_in_thread", "is_shielded", "transport_of", "worker_frame"]


def cancel_scope(task: asyncio.Task[Any]) -> object:
    """The innermost cancel scope of anyio's that an asyncio task is in; `None` if it is in none.

    Without anyio, or if a version keeps it elsewhere, it is in none.
    """
    backend: Any = _modules.get("anyio._backends._asyncio")
    if backend is None:
        return None
    states: Any = getattr(backend, "_task_states", ())
    return getattr(states[task], "cancel_scope", None) if task in states else None


def is_shielded(task: asyncio.Task[Any], outside: object) -> bool:
    """Whether an asyncio task is in a shielded cancel scope of anyio's that it has entered inside `outside`.

    That is so in ``CancelScope(shield=True)`` and while anyio waits for a worker thread; `Task.cancel` would
    break both.
    """
    scope: Any = cancel_scope(task)
    while scope is not None and scope is not outside:
        if scope.shield:
            return True
        scope = getattr(scope, "_parent_scope", None)
    return False


def awaited_future(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """What an asyncio task waits for; `None` if it is about to go on, or if asyncio does not tell."""
    future = getattr(task, "_fut_waiter", None)
    return None if future is None or future.done() else future


_THREADS = {
    "run_sync_in_worker_thread": "anyio",
    "to_thread_run_sync": "trio",
    "to_thread": "asyncio",
}
"""The functions in which a coroutine waits for a thread."""


def is_in_thread(frame: FrameType) -> bool:
    """Whether a suspended frame waits for the end of a function in a worker thread."""
    package = _THREADS.get(frame.f_code.co_name)
    return package is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package


def worker_frame(frame: FrameType) -> FrameType | None:
    """What the worker thread runs that a suspended frame waits for; `None` where that is not known.

    Only anyio on asyncio tells: by a local variable of the function that waits.
    """
    ident = getattr(frame.f_locals.get("worker"), "ident", None)
    return sys._current_frames().get(ident) if ident is not None else None


def transport_of(send: object) -> asyncio.Transport | None:
    """The connection that a server's `send` writes to, under uvicorn; `None` elsewhere.

    uvicorn's `send` is a method of what holds the connection, which carries one request at a time.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    return transport if hasattr(transport, "abort") else None
