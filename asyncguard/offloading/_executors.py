"""Runners that are no pool of ours: threads, and whatever is a `concurrent.futures.Executor`.

None of them can stop what it runs. That is said wherever a call is given up: the function runs on to its end.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from types import CodeType
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from asyncguard._request import remaining
from asyncguard._tasks import scheduler
from asyncguard.errors import NotOffloadable, OffloadError, OffloadTimeout, WorkerCrashed
from asyncguard.offloading._address import Address, address_of, resolve, verify
from asyncguard.offloading._call import CallOptions

__all__ = ["Errand", "ExecutorRunner", "ThreadRunner", "interpreters"]

_MOST_FRAMES = 100


# -- threads -----------------------------------------------------------------------------------------


class ThreadRunner:
    """Runs calls in worker threads of anyio's: for C code that lets go of the GIL.

    A thread cannot be stopped. A call that is cancelled or late is given up: who awaited it goes on at once,
    its function runs on, and nobody hears of its result. Until its end it counts, so that there are never
    more threads than anyio allows by default (40), whatever hangs in them; they are counted apart from those
    that `def` endpoints run in.
    """

    async def run_call(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Any:
        """Run one call; see `Runner`."""
        seconds = _seconds(options)
        seats, unlimited = _limiters()
        call = _ThreadCall(functools.partial(function, *args, **kwargs), seats)
        with anyio.move_on_after(seconds):
            await seats.acquire_on_behalf_of(call)
            try:
                return await anyio.to_thread.run_sync(call.run, abandon_on_cancel=True, limiter=unlimited)
            finally:
                call.give_up()
        if not call.has_begun:
            raise OffloadTimeout(f"{address.label} was not begun: no thread was free within {seconds:.3g} s")
        raise OffloadTimeout(
            f"{address.label} did not end within {seconds:.3g} s; "
            "it runs on in its thread, which cannot be stopped",
            call.stack(),
        )


class _ThreadCall:
    """A call, which has its seat until its thread is done with it, whoever waits for that.

    It is what the seat is lent to.
    """

    def __init__(self, work: Callable[[], Any], seats: anyio.CapacityLimiter) -> None:
        self.has_begun = False
        self._work: Callable[[], Any] | None = work
        self._seats = seats
        self._soon = scheduler()
        self._lock = threading.Lock()
        self._is_given_up = False
        self._has_ended = False
        self._thread: int | None = None

    def run(self) -> Any:
        with self._lock:
            if self._is_given_up:
                return None
            self.has_begun = True
            self._thread = threading.get_ident()
            work, self._work = self._work, None
        assert work is not None
        try:
            return work()
        finally:
            del work
            with self._lock:
                self._has_ended = True
                self._thread = None
                is_given_up = self._is_given_up
            if is_given_up:
                self._soon(self._leave)

    def give_up(self) -> None:
        """Nobody waits any more, because it is over or before that."""
        with self._lock:
            self._is_given_up = True
            runs = self.has_begun and not self._has_ended
        if not runs:
            self._work = None
            self._leave()

    def stack(self) -> str:
        """What its thread runs, innermost line first."""
        thread = self._thread
        frame = sys._current_frames().get(thread) if thread is not None else None
        lines: list[str] = []
        while frame is not None and frame.f_code is not _RUN and len(lines) < _MOST_FRAMES:
            lines.append(
                f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}'
            )
            frame = frame.f_back
        return "\n".join(lines)

    def _leave(self) -> None:
        self._seats.release_on_behalf_of(self)


_RUN: CodeType = _ThreadCall.run.__code__

_Limiters = tuple[anyio.CapacityLimiter, anyio.CapacityLimiter]
_limiters_here: anyio.lowlevel.RunVar[_Limiters] = anyio.lowlevel.RunVar("asyncguard-offload-threads")


def _limiters() -> _Limiters:
    """The seats of the running loop, and a limiter that does not limit."""
    try:
        return _limiters_here.get()
    except LookupError:
        most = anyio.to_thread.current_default_thread_limiter().total_tokens
        limiters = anyio.CapacityLimiter(most), anyio.CapacityLimiter(math.inf)
        _limiters_here.set(limiters)
        return limiters


# -- executors ---------------------------------------------------------------------------------------


class ExecutorRunner:
    """Runs calls in a `concurrent.futures.Executor`, which stays its owner's to shut down.

    A call that is cancelled or late is taken back if the executor has not begun it. Else it is given up: who
    awaited it goes on at once, its function runs on, and nobody hears of its result.

    Args:
        executor: The executor.
    """

    def __init__(self, executor: concurrent.futures.Executor) -> None:
        self.executor: concurrent.futures.Executor = executor

    async def run_call(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Any:
        """Run one call; see `Runner`."""
        seconds = _seconds(options)
        soon, ended = scheduler(), anyio.Event()
        try:
            future = self.executor.submit(Errand(function, options.context), *args, **kwargs)
        except concurrent.futures.BrokenExecutor as error:
            raise WorkerCrashed(f"{address.label} was not begun: its executor is broken ({error})") from error
        except RuntimeError as error:
            raise OffloadError(f"{address.label} was not begun: {error}") from error
        try:
            future.add_done_callback(lambda _: soon(ended.set))
            with anyio.move_on_after(seconds):
                await ended.wait()
            if not future.done():
                begun = not future.cancel()
                raise OffloadTimeout(
                    f"{address.label} did not end within {seconds:.3g} s; it runs on, "
                    "since an executor cannot stop what it runs"
                    if begun
                    else f"{address.label} was not begun within {seconds:.3g} s"
                )
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise OffloadError(f"{address.label} was called off by its executor") from error
        except concurrent.futures.BrokenExecutor as error:
            raise WorkerCrashed(f"the executor that ran {address.label} broke: {error}") from error
        finally:
            future.cancel()  # nothing happens if it has ended
            del future  # an exception's traceback leads here, and from it to the exception


class Errand:
    """A function on its way to an executor.

    One that runs it in this process calls the function itself, in the context of the caller. One that sends
    it to another process sends the address.

    Args:
        function: The function.
        context: The context variables that it is to see.
    """

    def __init__(self, function: Callable[..., Any], context: tuple[ContextVar[Any], ...]) -> None:
        self._function = function
        self._named = context
        self._context = copy_context()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._context.run(self._function, *args, **kwargs)

    def __reduce__(self) -> Any:
        address = verify(self._function, address_of(self._function))
        if self._named:
            raise NotOffloadable(
                f"{address.label} cannot be offloaded with context=... to this executor: it does not run it "
                'in this process. Use backend="process", or pass the values as arguments'
            )
        # Not resolved where this is unpickled: what cannot be unpickled breaks an executor for good.
        return functools.partial, (_call_at, address)


def _call_at(address: Address, *args: Any, **kwargs: Any) -> Any:
    return resolve(address)(*args, **kwargs)


@functools.cache
def interpreters() -> ExecutorRunner:
    """What runs calls in interpreters of their own, in threads of this process.

    Raises:
        ValueError: If this Python has none: they came with 3.14.
    """
    pool: Any = getattr(concurrent.futures, "InterpreterPoolExecutor", None)
    if pool is None:
        raise ValueError(
            'backend="interpreter" needs Python 3.14 or newer, and this is '
            f'{sys.version_info[0]}.{sys.version_info[1]}: use "process"'
        )
    return ExecutorRunner(pool())


def _seconds(options: CallOptions) -> float:
    """How long a call may take: what it was given, or what its request has left if that is less."""
    left = remaining()
    return left if options.timeout is None else min(options.timeout, left)
