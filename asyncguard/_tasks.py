"""Which loop runs here, and work beside the running task: to be started, called off, and outwaited.

On asyncio and trio alike. Not by anyio's task groups: they belong to one block of one task, and what uses
this outlives blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any

import anyio

__all__ = ["current_loop", "leave_behind", "outwait", "own_task", "running_trio", "scheduler", "start"]

_tasks: set[asyncio.Task[None]] = set()
"""Those that run: asyncio itself keeps no hold of a task."""


def running_trio() -> Any:
    """Trio, which is optional, and which this thread is in.

    Raises:
        RuntimeError: If it is not.
    """
    trio: Any = sys.modules.get("trio")
    if trio is None or not trio.lowlevel.in_trio_run():
        raise RuntimeError("no event loop runs in this thread")
    return trio


def current_loop() -> object | None:
    """What stands for the event loop that runs in this thread: asyncio's loop, or trio's token; or `None`."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return loop
    trio: Any = sys.modules.get("trio")
    if trio is None or not trio.lowlevel.in_trio_run():
        return None
    token: object = trio.lowlevel.current_trio_token()
    return token


def scheduler() -> Callable[[Callable[[], object]], None]:
    """How to have the running loop call something soon, from any thread; if it has ended, nothing happens."""
    loop = asyncio._get_running_loop()
    schedule: Callable[[Callable[[], object]], object]
    if loop is not None:
        schedule = loop.call_soon_threadsafe
    else:
        schedule = running_trio().lowlevel.current_trio_token().run_sync_soon

    def soon(call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):
            schedule(call)

    return soon


def start(
    work: Callable[[], Coroutine[Any, Any, None]],
    on_end: Callable[[], object],
    *,
    name: str = "asyncguard",
    context: Context | None = None,
) -> Callable[[], object]:
    """Start a task.

    Args:
        work: What it does. It must not raise anything but its cancellation.
        on_end: Called when it has ended, even if it was called off before it had begun.
        name: What the loop is to know it by.
        context: The context variables that it sees; a copy of the current ones by default.

    Returns:
        What calls it off; to be called on the loop's thread.
    """
    if asyncio._get_running_loop() is not None:
        task = asyncio.create_task(work(), name=name, context=context)
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        task.add_done_callback(lambda _: on_end())
        return task.cancel

    import trio  # optional: whoever runs it has it

    scope = trio.CancelScope()

    async def run() -> None:
        try:
            with scope:
                await work()
        finally:
            on_end()

    trio.lowlevel.spawn_system_task(run, name=name, context=copy_context() if context is None else context)
    return scope.cancel


def own_task() -> asyncio.Task[Any] | None:
    """The running task of asyncio; `None` on trio."""
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


def leave_behind(task: asyncio.Task[Any] | None) -> None:
    """Have the loop end without waiting for a task that does not heed its cancellation.

    `asyncio.run` cancels all tasks that are left, and waits for each of them, for ever if it has to. Trio
    leaves no task behind.
    """
    if task is not None:
        # https://docs.python.org/3/library/asyncio-extending.html#task-lifetime-support
        asyncio.tasks._unregister_task(task)
        task._log_destroy_pending = False  # type: ignore[attr-defined] # it has been said


async def outwait(event: anyio.Event, seconds: float = math.inf) -> asyncio.CancelledError | None:
    """Wait for `event`, whatever is cancelled meanwhile; for `seconds` at most.

    Returns:
        A cancellation of this very task that came in the meantime, to be raised once all is done. One that
        a cancel scope keeps up is no such thing: it comes again by itself.
    """
    cancelled = None
    with anyio.move_on_after(seconds, shield=True) as scope:
        while not event.is_set():
            try:
                await event.wait()
            except asyncio.CancelledError as error:
                if scope.cancel_called:
                    raise
                cancelled = error
    return cancelled
