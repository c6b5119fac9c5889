"""Work beside the running task, on asyncio and trio: to be started, called off, and heard of from a thread.

Not by anyio's task groups: they belong to one block of one task, and what uses this outlives blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any

from asyncguard.offloading._loops import running_trio

__all__ = ["scheduler", "start"]

_tasks: set[asyncio.Task[None]] = set()
"""Those that run: asyncio itself keeps no hold of a task."""


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


def start(work: Callable[[], Coroutine[Any, Any, None]], on_end: Callable[[], None]) -> Callable[[], object]:
    """Start a task in a copy of the current context.

    Args:
        work: What it does. It must not raise anything but its cancellation.
        on_end: Called when it has ended, even if it was called off before it had begun.

    Returns:
        What calls it off; to be called on the loop's thread.
    """
    if asyncio._get_running_loop() is not None:
        task = asyncio.create_task(work())
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

    trio.lowlevel.spawn_system_task(run, name="asyncguard-offload", context=copy_context())
    return scope.cancel
