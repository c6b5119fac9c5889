"""The pool that calls run in: its options, opening and closing. Where they run is a `Backend`'s business."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

from asyncguard import _clock
from asyncguard._options import checked_choice, checked_seconds
from asyncguard._request import remaining
from asyncguard.errors import OffloadError, OffloadTimeout
from asyncguard.events import DurationHistogram, OffloadStats
from asyncguard.offloading import _pools
from asyncguard.offloading._address import Address, address_of, verify
from asyncguard.offloading._backend import Backend, Census, StartMethod
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._cpus import usable_cpus
from asyncguard.offloading._descriptors import passes_descriptors
from asyncguard.offloading._loops import Loop, running_loop
from asyncguard.offloading._tally import BOUNDS, Tally

__all__ = ["OffloadPool"]

P = ParamSpec("P")
R = TypeVar("R")

_START_METHODS = ("forkserver", "spawn")


class OffloadPool:
    """Worker processes that run functions off the event loop.

    Use it as an asynchronous context manager, or let `asyncguard.install` or the first call open one. It
    belongs to the event loop that opened it.

    Args:
        workers: How many processes; by default as many as there are CPUs for this process.
        max_queue: How many calls may wait for a worker. More are refused with `OffloadQueueFull`. `None` for
            1000: a queue without an end would only hide that the pool is too small.
        start_method: How workers are started. ``"forkserver"``: as copies of a process that has imported
            already what they need; that takes a few milliseconds. ``"spawn"``: each as a Python of its own,
            for libraries that do not bear being copied. Where the system cannot pass descriptors from one
            process to another, all are started like that.
        max_calls: After how many calls a worker is replaced by a new one; `None` for never.
        max_rss: From how many bytes of memory on a worker is replaced, after its call; `None` for never.
        nice: By how much the system prefers the server to a worker, from 0 to 19.
        grace: For how many seconds a function may clean up after it was interrupted; then it is killed.
        backend: What runs the calls instead of worker processes of this machine, such as a `DaskBackend`.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        max_queue: int | None = None,
        start_method: StartMethod = "forkserver",
        max_calls: int | None = None,
        max_rss: int | None = None,
        nice: int = 10,
        grace: float = 0.5,
        backend: Backend | None = None,
    ) -> None:
        self.workers: int = usable_cpus() if workers is None else _count("workers", workers, at_least=1)
        self.max_queue: int = 1000 if max_queue is None else _count("max_queue", max_queue, at_least=0)
        checked_choice("start_method", start_method, _START_METHODS)
        self.start_method: StartMethod = start_method
        self.max_calls: int | None = None if max_calls is None else _count("max_calls", max_calls, at_least=1)
        self.max_rss: int | None = None if max_rss is None else _count("max_rss", max_rss, at_least=1)
        self.nice: int = _count("nice", nice, at_least=0, at_most=19)
        self.grace: float = checked_seconds("grace", grace)
        self._tally = Tally()
        self._backend: Backend = _of_this_machine() if backend is None else backend
        self._loop: Loop | None = None  # while it is open

    # -- opening and closing -----------------------------------------------------------------------

    async def __aenter__(self) -> OffloadPool:
        self.open()
        try:
            await self.ready()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def open(self, *, warm: bool = True, preload: Iterable[str] = ()) -> None:
        """Open the pool on the running loop. `async with` waits until the workers are ready, too.

        Args:
            warm: Whether to start all workers now, not when they are needed.
            preload: The names of modules that workers will need, to be imported before the first call.

        Raises:
            RuntimeError: If it is open, or no event loop runs.
        """
        if self._loop is not None:
            raise RuntimeError("this OffloadPool is open already")
        loop = running_loop()
        self._backend.open(self, self._tally, warm=warm, preload=preload)
        self._loop = loop
        _open.add(self)
        _pools.add(self)

    async def ready(self) -> None:
        """Wait until its workers are ready, for ten seconds at most: what keeps them is in the log."""
        await self._backend.ready()

    async def aclose(self) -> None:
        """Close it: calls that wait fail, those that run are interrupted, and killed after the grace."""
        if self._loop is None:
            return
        self._loop = None
        _pools.remove(self)
        try:
            await self._backend.aclose()
        finally:
            _open.discard(self)

    def abandon(self) -> None:
        """Its loop was closed before it was: kill all that runs."""
        if self._loop is not None:
            self._loop = None
            _open.discard(self)
            self._backend.abandon()

    def disown(self) -> None:
        """In a forked child: close what was inherited; the workers are the parent's."""
        self._loop = None
        self._backend.disown()

    # -- calls -------------------------------------------------------------------------------------

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function that is not decorated, in a worker.

        Args:
            function: A function of an importable module.
            *args: Its arguments, which have to be picklable.
            **kwargs: Its keyword arguments.

        Returns:
            What it returns.

        Raises:
            OffloadError: If there is no result, though the function did not raise; see `asyncguard.errors`.
        """
        address = verify(function, address_of(function))
        result: R = await self.run_call(address, function, args, kwargs, CallOptions())
        return result

    async def run_call(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Any:
        """Run one call; see `Runner`."""
        loop = self._loop
        if loop is None:
            raise OffloadError("this OffloadPool is not open: use `async with OffloadPool() as pool`")
        if not loop.is_here():
            raise RuntimeError("this OffloadPool belongs to another event loop: open one on each")
        began, seconds = _clock.monotonic(), _least(options.timeout, remaining())
        if seconds is not None and seconds <= 0:
            raise OffloadTimeout(f"{address.label} was not begun: no time was left for it")
        return await self._backend.run(address, function, args, kwargs, options, seconds, began)

    # -- how it is doing ---------------------------------------------------------------------------

    @property
    def stats(self) -> OffloadStats:
        """How the pool is doing."""
        tally = self._tally
        census = Census() if self._loop is None else self._backend.census()
        return OffloadStats(
            workers=census.workers,
            idle=census.idle,
            running=census.running,
            queued=census.queued,
            calls=tally.calls,
            refused=tally.refused,
            timeouts=tally.timeouts,
            cancelled=tally.cancelled,
            crashes=tally.crashes,
            kills=tally.kills,
            respawns=tally.respawns,
            recycled=tally.recycled,
            wait=DurationHistogram(BOUNDS, tuple(tally.waits), tally.waited),
            run=DurationHistogram(BOUNDS, tuple(tally.runs), tally.ran_for),
        )


_open: WeakSet[OffloadPool] = WeakSet()


def _forget_pools() -> None:
    """In a forked child: its copies of our ends would keep the workers alive when the parent dies."""
    for pool in [*_open]:
        pool.disown()
    _open.clear()
    _pools.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def _of_this_machine() -> Backend:
    # Each is made of what the other's systems may not have.
    if passes_descriptors():
        from asyncguard.offloading._local import LocalBackend

        return LocalBackend()
    from asyncguard.offloading._to_process import ToProcessBackend

    return ToProcessBackend()


def _least(timeout: float | None, left: float) -> float | None:
    least = left if timeout is None else min(timeout, left)
    return None if least == float("inf") else least


def _count(option: str, value: object, *, at_least: int, at_most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be a whole number, not {value!r}")
    if value < at_least or (at_most is not None and value > at_most):
        bounds = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{option} must be {bounds}, not {value!r}")
    return value
