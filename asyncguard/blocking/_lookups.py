"""Look-ups that depend on how CPython, asyncio and uvloop are built inside.

All of them are here, each with a test of its own, so that a new version which changes one of them
fails that test and nothing else. Everything called on the watchdog's thread (`read_stack`,
`running_task`) only reads: no I/O and nothing that waits, since the global interpreter lock (GIL)
must not change hands between the wake-up of the watchdog and the end of its sample.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context, copy_context
from types import CodeType, FrameType
from typing import Any, NamedTuple

__all__ = [
    "RawFrame",
    "RawStack",
    "await_chain",
    "keep_contexts",
    "position",
    "read_stack",
    "running_task",
]

_HANDLE_RUN = asyncio.events.Handle._run.__code__


class RawFrame(NamedTuple):
    """A frame without its locals, so that keeping it keeps no object of the request alive."""

    code: CodeType
    instruction: int
    namespace: dict[str, Any]


class RawStack(NamedTuple):
    """What one thread was doing, innermost frame first.

    Attributes:
        frames: The frames of the callback that the loop was running.
        context: The context of that callback, where the stack shows it (asyncio's own loops).
        callback: A number that tells this callback from its neighbours, or 0 if unknown.
    """

    frames: tuple[RawFrame, ...]
    context: Context | None
    callback: int


def read_stack(frame: FrameType | None, outside: int) -> RawStack:
    """Read the stack that `frame` is the innermost frame of, down to the loop's own machinery.

    On asyncio's own loops every callback runs below `asyncio.Handle._run`, whose `self` holds the
    context that the callback was scheduled with.

    Args:
        frame: The innermost frame.
        outside: The `id` of the frame that runs the loop: it and what called it are left out. 0 if
            unknown.
    """
    frames: list[RawFrame] = []
    while frame is not None and id(frame) != outside:
        code = frame.f_code
        if code is _HANDLE_RUN:
            handle = frame.f_locals.get("self")
            return RawStack(tuple(frames), getattr(handle, "_context", None), id(handle))
        frames.append(RawFrame(code, frame.f_lasti, frame.f_globals))
        frame = frame.f_back
    return RawStack(tuple(frames), None, 0)


class RunningTask(NamedTuple):
    """The task that runs on a loop: a number that tells it from others, and its context."""

    number: int
    context: Context | None


def running_task(loop: asyncio.AbstractEventLoop) -> RunningTask:
    """What runs on `loop` at this moment, asked from any thread."""
    task = asyncio.current_task(loop)
    if task is None:
        return RunningTask(0, None)
    if sys.version_info >= (3, 12):
        return RunningTask(id(task), task.get_context())
    return RunningTask(id(task), _contexts.get(task))


_contexts: weakref.WeakKeyDictionary[asyncio.Task[Any], Context] = weakref.WeakKeyDictionary()
"""On 3.11, which has no `Task.get_context`: the contexts that tasks were made with."""


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
    return asyncio.Task(coroutine, loop=loop, **options)


def keep_contexts(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Have `running_task` know the contexts of the tasks that `loop` makes from now on.

    Needed where no stack shows them (uvloop) and tasks do not tell (3.11): by a task factory, around
    the one that may be there.

    Returns:
        What takes the factory away again.
    """
    if sys.version_info >= (3, 12):
        return lambda: None
    inner = loop.get_task_factory()

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        make: Any = inner or _make_task
        task = make(loop, coroutine, **options)
        _contexts[task] = options.get("context") or copy_context()
        return task

    def remove() -> None:
        if loop.get_task_factory() is factory:
            loop.set_task_factory(inner)

    loop.set_task_factory(factory)
    return remove


def position(code: CodeType, instruction: int) -> tuple[int, int, int, int] | None:
    """First line, last line, first column and last column (in bytes) of an instruction."""
    # Two bytes an instruction: https://docs.python.org/3/reference/datamodel.html#codeobject.co_positions
    for index, place in enumerate(code.co_positions()):
        if index == instruction // 2:
            line, end_line, column, end_column = place
            if line is None or end_line is None or column is None or end_column is None:
                return None
            return line, end_line, column, end_column
    return None


def await_chain(awaitable: Awaitable[Any] | None) -> Iterator[tuple[CodeType, int]]:
    """The code and line of each suspended frame, from `awaitable` inwards to what it waits for.

    Coroutines, generator-based coroutines and asynchronous generators are followed; a future, or
    anything else that is not Python code, ends the chain.
    """
    current: Any = awaitable
    while current is not None:
        frame = _first(current, "cr_frame", "gi_frame", "ag_frame")
        if frame is None:
            return
        yield frame.f_code, frame.f_lineno
        current = _first(current, "cr_await", "gi_yieldfrom", "ag_await")


def _first(thing: object, *names: str) -> Any:
    return next((getattr(thing, name) for name in names if hasattr(thing, name)), None)
