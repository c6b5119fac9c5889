"""Look-ups that depend on how CPython, asyncio and uvloop are built inside.

All of them are here, each with a test of its own, so that a new version which changes one of them
fails that test and nothing else. Everything called on the watchdog's thread (`read_stack`,
`running_request`) only reads: no I/O and nothing that waits, since the global interpreter lock (GIL)
must not change hands between the wake-up of the watchdog and the end of its sample.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import gc
import itertools
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context
from types import CodeType, FrameType
from typing import Any, NamedTuple

from asyncguard._request import RequestRecord, current_request

__all__ = [
    "RawFrame",
    "RawStack",
    "await_chain",
    "keep_requests",
    "position",
    "read_stack",
    "running_request",
]

_HANDLE_RUN = asyncio.events.Handle._run.__code__
_RUN_ONCE = asyncio.base_events.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]


class RawFrame(NamedTuple):
    """A frame without its locals, so that keeping it keeps no object of the request alive."""

    code: CodeType
    instruction: int
    namespace: dict[str, Any]


class RawStack(NamedTuple):
    """What one thread was doing, innermost frame first.

    Attributes:
        frames: The frames of the callback that the loop was running; none if it was running none.
        record: The request that the callback works for, where the stack shows it (asyncio's own loops).
        callback: A number that tells this callback from its neighbours, or 0 if unknown.
    """

    frames: tuple[RawFrame, ...]
    record: RequestRecord | None
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
            return RawStack(tuple(frames), _request_of(getattr(handle, "_context", None)), id(handle))
        if code is _RUN_ONCE:
            return RawStack((), None, 0)  # between two callbacks
        frames.append(RawFrame(code, frame.f_lasti, frame.f_globals))
        frame = frame.f_back
    return RawStack(tuple(frames), None, 0)


class RunningRequest(NamedTuple):
    """The request of the task that runs on a loop, and a number that tells the task from others."""

    task: int
    record: RequestRecord | None


def running_request(runner: Any) -> RunningRequest:
    """What runs at this moment, asked from any thread.

    Args:
        runner: An asyncio loop, or the task that trio runs; `None` if there is nothing to ask.
    """
    if not isinstance(runner, asyncio.AbstractEventLoop):
        return RunningRequest(id(runner) if runner else 0, _request_of(getattr(runner, "context", None)))
    task = asyncio.current_task(runner)
    if task is None:
        return RunningRequest(0, None)
    if sys.version_info >= (3, 12):
        return RunningRequest(id(task), _request_of(task.get_context()))
    return RunningRequest(id(task), _requests.get(task))


def _request_of(context: Context | None) -> RequestRecord | None:
    return None if context is None else context.get(current_request)


_requests: weakref.WeakKeyDictionary[asyncio.Task[Any], RequestRecord] = weakref.WeakKeyDictionary()
"""On 3.11, which has no `Task.get_context`: the requests that tasks were made for."""


def keep_requests(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Have `running_request` know the requests of the tasks that `loop` makes from now on.

    Needed where no stack shows them (uvloop) and tasks do not tell (3.11): by a task factory, around
    the one that may be there.

    Returns:
        What takes the factory away again.
    """
    if sys.version_info >= (3, 12):
        return lambda: None
    inner = loop.get_task_factory()
    make: Any = inner or _make_task

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        task = make(loop, coroutine, **options)
        context = options.get("context")
        record = current_request.get() if context is None else context.get(current_request)
        if record is not None:
            _requests[task] = record
        return task

    def remove(loop_is: weakref.ref[asyncio.AbstractEventLoop] = weakref.ref(loop)) -> None:  # noqa: B008
        loop = loop_is()
        if loop is not None and loop.get_task_factory() is factory:
            loop.set_task_factory(inner)

    loop.set_task_factory(factory)
    return remove


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
    return asyncio.Task(coroutine, loop=loop, **options)


class Position(NamedTuple):
    """Where an instruction is in the source; lines from 1, columns in bytes from 0."""

    line: int | None
    end_line: int | None
    column: int | None
    end_column: int | None


def position(code: CodeType, instruction: int) -> Position:
    """The place of an instruction; all `None` if it has none, columns `None` if they were left out."""
    # Two bytes an instruction: https://docs.python.org/3/reference/datamodel.html#codeobject.co_positions
    places = itertools.islice(code.co_positions(), max(0, instruction // 2), None)
    return Position(*next(places, (None, None, None, None)))


def await_chain(awaitable: Awaitable[Any] | None) -> Iterator[tuple[CodeType, int]]:
    """The code and line of each suspended frame, from `awaitable` inwards to what it waits for.

    Coroutines, generator-based coroutines and asynchronous generators are followed; a future, or
    anything else that is not Python code, ends the chain.
    """
    current: Any = awaitable
    while current is not None:
        if type(current).__name__ in _STEPS_OF_GENERATORS:
            # It does not tell whose step it is, but the garbage collector knows what it refers to.
            current = next((thing for thing in gc.get_referents(current) if _is_suspendable(thing)), None)
        frame = _first(current, "cr_frame", "gi_frame", "ag_frame")
        if frame is None:
            return
        yield frame.f_code, frame.f_lineno
        current = _first(current, "cr_await", "gi_yieldfrom", "ag_await")


_STEPS_OF_GENERATORS = {"anext_awaitable", "async_generator_asend", "async_generator_athrow"}


def _is_suspendable(thing: object) -> bool:
    return type(thing).__name__ in {"async_generator", "coroutine", *_STEPS_OF_GENERATORS}


def _first(thing: object, *names: str) -> Any:
    return next((getattr(thing, name) for name in names if hasattr(thing, name)), None)
