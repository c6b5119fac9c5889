"""Look-ups that depend on how CPython, asyncio and uvloop are built inside.

All of them are here, each with a test of its own, so that a new version which changes one of them
fails that test and nothing else. Everything called on the watchdog's thread (`read_stack`,
`running_request`, `thread_cpu`) only reads: no I/O and nothing that waits, since the global interpreter
lock (GIL) must not change hands between the wake-up of the watchdog and the end of its sample.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import functools
import gc
import itertools
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import Context
from types import FrameType, FunctionType, MethodType
from typing import Any, NamedTuple

from asyncguard import _clock
from asyncguard._frames import RawFrame
from asyncguard._request import RequestRecord, current_request

__all__ = [
    "CollectorHeld",
    "RawStack",
    "arrival",
    "due_timers",
    "is_answered",
    "keep_requests",
    "living_threads",
    "moved_requests",
    "read_stack",
    "ready_requests",
    "request_of_task",
    "running_request",
    "thread_cpu",
    "waiting_tasks",
]

_HANDLE_RUN = asyncio.events.Handle._run.__code__
_RUN_ONCE = asyncio.base_events.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]


class RawStack(NamedTuple):
    """What one thread was doing, innermost frame first.

    Attributes:
        frames: The frames of the callback that the loop was running; none if it was running none.
        record: The request that the callback works for, where the stack shows it (asyncio's own loops).
        callback: A number that tells this callback from its neighbours, or 0 if unknown.
        task: The name of the task whose step it is, or `None` if it is none's.
    """

    frames: tuple[RawFrame, ...]
    record: RequestRecord | None
    callback: int
    task: str | None


def read_stack(frame: FrameType | None, outside: int) -> RawStack:
    """Read the stack that `frame` is the innermost frame of, down to the loop's own machinery.

    On asyncio's own loops every callback runs below `asyncio.Handle._run`, whose `self` holds the
    context that the callback was scheduled with. On others, `keep_requests` sees to it that callbacks
    which a request has scheduled show it as well.

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
            task = _task_of(handle)
            record = _request_of(getattr(handle, "_context", None))
            return RawStack(tuple(frames), record, id(handle), task.get_name() if task else None)
        if code is _RUN_NOTED:
            values = frame.f_locals
            return RawStack(tuple(frames), values["record"], values["number"], None)
        if code is _RUN_ONCE:
            return RawStack((), None, 0, None)  # between two callbacks
        frames.append(RawFrame(code, frame.f_lasti, frame.f_globals))
        frame = frame.f_back
    return RawStack(tuple(frames), None, 0, None)


def _task_of(handle: Any) -> asyncio.Task[Any] | None:
    """The task whose next step a handle of asyncio's own loops runs; `None` for plain callbacks."""
    owner = getattr(getattr(handle, "_callback", None), "__self__", None)
    return owner if isinstance(owner, asyncio.Task) else None


class CollectorHeld:
    """Keeps the garbage collector from running while another thread's stack is read, in a ``with`` block.

    Up to Python 3.11 any allocation may begin a collection, those that `frame.f_back` makes among them. A
    collection runs finalisers and `gc.callbacks`, so another thread may get the interpreter, return from
    the very frame that is being looked up, and leave a pointer to nowhere: the process crashes, now or
    later. In `sys._current_frames` it may deadlock (https://github.com/python/cpython/issues/106883).
    From 3.12 on, collections run between instructions only, and nothing is done here.
    """

    NEEDED = sys.version_info < (3, 12)

    def __init__(self) -> None:
        self._holding = False

    def __enter__(self) -> None:
        if self.NEEDED and gc.isenabled():
            self._holding = True
            gc.disable()

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let it run again; also for a forked child, where the thread that held it is not."""
        if self._holding:
            self._holding = False
            gc.enable()


class RunningRequest(NamedTuple):
    """The request of the task that runs on a loop, the task's name and a number that tells it from others."""

    callback: int
    record: RequestRecord | None
    task: str | None


def running_request(runner: Any) -> RunningRequest:
    """What runs at this moment, asked from any thread.

    Args:
        runner: An asyncio loop, or the task that trio runs; `None` if there is nothing to ask.
    """
    if not isinstance(runner, asyncio.AbstractEventLoop):
        if runner is None:
            return RunningRequest(0, None, None)
        return RunningRequest(
            id(runner), _request_of(getattr(runner, "context", None)), getattr(runner, "name", None)
        )
    task = asyncio.current_task(runner)
    if task is None:
        return RunningRequest(0, None, None)
    return RunningRequest(id(task), request_of_task(task), task.get_name())


def request_of_task(task: asyncio.Task[Any]) -> RequestRecord | None:
    """The request that an asyncio task works for; on 3.11 only where `keep_requests` keeps it."""
    if sys.version_info >= (3, 12):
        return _request_of(task.get_context())
    return _requests.get(task)


def _request_of(context: Context | None) -> RequestRecord | None:
    return None if context is None else context.get(current_request)


_requests: weakref.WeakKeyDictionary[asyncio.Task[Any], RequestRecord] = weakref.WeakKeyDictionary()
"""On 3.11, which has no `Task.get_context`: the requests that tasks were made for."""


def keep_requests(
    loop: asyncio.AbstractEventLoop, note_due: Callable[[RequestRecord, float], None]
) -> Callable[[], None]:
    """Have the requests known of what `loop` is given to run from now on.

    Needed where no stack shows them (uvloop). Callbacks are wrapped, but for the steps of tasks. Tasks
    tell by themselves from 3.12 on; on 3.11 by a task factory, around the one that may be there.

    Args:
        loop: The loop.
        note_due: Called when a request's timer fires, with the time at which it was due on the monotonic
            clock.

    Returns:
        What takes all of it away again.
    """
    remove_notes = _note_callbacks(loop, note_due)
    if sys.version_info >= (3, 12):
        return remove_notes
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
        remove_notes()
        loop = loop_is()
        if loop is not None and loop.get_task_factory() is factory:
            loop.set_task_factory(inner)

    loop.set_task_factory(factory)
    return remove


def _run_noted(
    number: int,
    record: RequestRecord,
    due: float | None,
    note_due: Callable[[RequestRecord, float], None],
    callback: Callable[..., object],
    *arguments: Any,
) -> None:
    """Call `callback`, and show the request that it was scheduled by to whoever reads the stack."""
    if due is not None:
        note_due(record, due)
    callback(*arguments)


_RUN_NOTED = _run_noted.__code__
_PYTHON = frozenset({FunctionType, MethodType, functools.partial})
"""Of all callbacks: the steps of a task are of other types, and its context is known."""
_NUMBERS = frozenset({int, float})
_numbers = itertools.count(1)


def _note_callbacks(
    loop: asyncio.AbstractEventLoop, note_due: Callable[[RequestRecord, float], None]
) -> Callable[[], None]:
    attributes: dict[str, Any] = getattr(loop, "__dict__", {})
    loop_is = weakref.ref(loop)

    def noting(callback: Any, context: Context | None, due: float | None) -> Any:
        record = current_request.get() if context is None else context.get(current_request)
        if record is None:
            return callback
        return functools.partial(_run_noted, next(_numbers), record, due, note_due, callback)

    # The steps of tasks come through here as well, without an argument, and who waits for their end, with
    # one. Spread out, arguments cost twice as much.

    def soon(schedule: Callable[..., Any]) -> Callable[..., Any]:
        def noted(callback: Any, *arguments: Any, context: Context | None = None) -> Any:
            if type(callback) in _PYTHON:
                callback = noting(callback, context, None)
            if not arguments:
                return schedule(loop_is(), callback, context=context)
            if len(arguments) == 1:
                return schedule(loop_is(), callback, arguments[0], context=context)
            return schedule(loop_is(), callback, *arguments, context=context)

        return noted

    def later(schedule: Callable[..., Any], is_moment: bool) -> Callable[..., Any]:
        def noted(moment: Any, callback: Any, *arguments: Any, context: Context | None = None) -> Any:
            loop: Any = loop_is()
            if type(callback) in _PYTHON:
                due = None
                if type(moment) in _NUMBERS:  # else it is for the loop to say whether that is one
                    now = _clock.monotonic()
                    due = now + moment - loop.time() if is_moment else now + moment
                callback = noting(callback, context, due)
            if not arguments:
                return schedule(loop, moment, callback, context=context)
            return schedule(loop, moment, callback, *arguments, context=context)

        return noted

    kind = type(loop)
    wrap: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "call_soon": soon,
        "call_soon_threadsafe": soon,
        "call_later": functools.partial(later, is_moment=False),
        "call_at": functools.partial(later, is_moment=True),
    }
    # A loop that has no attributes of its own is left as it is.
    wrappers = {
        name: wrap_one(getattr(kind, name))
        for name, wrap_one in wrap.items()
        if hasattr(kind, name) and name not in attributes
    }
    if hasattr(loop, "__dict__"):
        attributes.update(wrappers)

    def remove() -> None:
        for name, wrapper in wrappers.items():
            if attributes.get(name) is wrapper:
                del attributes[name]

    return remove


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
    return asyncio.Task(coroutine, loop=loop, **options)


def ready_requests(loop: Any) -> Iterator[RequestRecord]:
    """The requests of the tasks that are about to run, on asyncio's own loops; none elsewhere."""
    for handle in tuple(getattr(loop, "_ready", ())):
        if _task_of(handle) is not None:
            record = _request_of(getattr(handle, "_context", None))
            if record is not None:
                yield record


def waiting_tasks(loop: asyncio.AbstractEventLoop) -> dict[asyncio.Task[Any], Any]:
    """The tasks of a loop, each with what it waits for."""
    return {task: getattr(task, "_fut_waiter", None) for task in asyncio.all_tasks(loop)}


def moved_requests(waiting: dict[asyncio.Task[Any], Any]) -> Iterator[RequestRecord]:
    """The requests of those tasks that wait for something else by now; they are taken out of `waiting`."""
    moved = [
        task
        for task, what in waiting.items()
        if task.done() or getattr(task, "_fut_waiter", None) is not what
    ]
    for task in moved:
        del waiting[task]
        record = request_of_task(task)
        if record is not None:
            yield record


def due_timers(loop: Any) -> Iterator[tuple[RequestRecord, float]]:
    """The requests that have timers which should have fired, and for how many seconds by now.

    On asyncio's own loops, whose timers are a heap: a timer that is not due has none below it that is.
    """
    timers = getattr(loop, "_scheduled", None)
    if not timers:
        return
    now = loop.time()
    places = [0]
    while places:
        place = places.pop()
        if place < len(timers) and timers[place].when() <= now:
            places += [2 * place + 1, 2 * place + 2]
            record = _request_of(getattr(timers[place], "_context", None))
            if record is not None and not timers[place].cancelled():
                yield record, now - timers[place].when()


def arrival(receive: Any) -> float | None:
    """When the last data of a request reached this machine, on the monotonic clock; under uvicorn on Linux.

    `None` elsewhere. uvicorn's `receive` is a method of what holds the connection, and Linux tells how many
    milliseconds ago a connection got its last data (``tcpi_last_data_recv`` in ``include/uapi/linux/tcp.h``).
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if sys.platform != "linux" or transport is None:
        return None
    try:
        info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 56)
        milliseconds: int = struct.unpack_from("=I", info, 52)[0]
    except (AttributeError, OSError, ValueError, struct.error):
        return None  # not TCP, or closed
    return _clock.monotonic() - milliseconds / 1000


def is_answered(receive: Any) -> bool:
    """Whether the whole answer of a request has been sent, under uvicorn; `False` elsewhere."""
    return getattr(getattr(receive, "__self__", None), "response_complete", False) is True


class LivingThread(NamedTuple):
    """A thread of this process: its name, and the number that the system knows it by."""

    name: str
    native: int | None


def living_threads() -> dict[int, LivingThread]:
    """All threads by their identifier, without the lock that `threading.enumerate` takes.

    The thread that holds that lock may be the one that hangs.
    """
    return {
        ident: LivingThread(thread.name, thread.native_id)
        for ident, thread in list(threading._active.items())  # type: ignore[attr-defined]
    }


def thread_cpu(native: int | None) -> float | None:
    """Seconds of CPU that a thread has used; `None` where the system does not tell, or it has ended.

    The number of its clock is made as in Linux's ``include/linux/posix-timers.h``, from the number that the
    system knows the thread by: `time.pthread_getcpuclockid` may crash if the thread ends meanwhile.
    """
    if native is None or sys.platform != "linux":
        return None
    try:
        return time.clock_gettime((~native << 3) | 6)
    except OSError:
        return None
