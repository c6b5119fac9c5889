"""Worker processes that anyio lends: how to have one that is there and ready, and what it does then.

Anyio's own ways would not do. It gives a call to a worker that died in its sleep, and fails it; a
cancellation that comes while a worker starts leaves that behind; and nothing tells whether a call has begun.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_process

from asyncguard.errors import WorkerCrashed
from asyncguard.offloading import _borrowed
from asyncguard.offloading._backend import Limits
from asyncguard.offloading._borrowed import Answer, Portable
from asyncguard.offloading._payload import explain
from asyncguard.offloading._tally import Tally

__all__ = ["AnyioWorkers"]


class AnyioWorkers:
    """The workers of one pool, as far as one knows: anyio lends them to others of the same loop as well.

    Args:
        settings: What each is to be like.
        modules: What each imports before its first call.
        limits: The options of the pool.
        tally: Where it is counted what happens.
    """

    def __init__(
        self, settings: _borrowed.Settings, modules: list[str], limits: Limits, tally: Tally
    ) -> None:
        self._settings = settings
        self._modules = modules
        self._limits = limits
        self._tally = tally
        self._pids: set[int] = set()
        self._lost = 0
        self._shields: set[anyio.CancelScope] = set()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._pids)

    async def call(self, request: Portable, on_begun: Callable[[], None]) -> Answer:
        """Make a call; if that is cancelled, its worker is killed.

        Args:
            request: The call.
            on_begun: Called just before it is sent.

        Raises:
            WorkerCrashed: If the worker died, or there was none. The message goes on from its name.
        """
        turn: Any = _Turn(self, on_begun)
        try:
            return await anyio.to_process.run_sync(_borrowed.call, *request, cancellable=True, limiter=turn)
        except anyio.BrokenWorkerProcess as error:
            self._lose(turn.pid)
            raise WorkerCrashed(
                "ended; with what exit code is not known: worker processes of anyio do not tell"
            ) from error
        except anyio.get_cancelled_exc_class():
            self._lose(turn.pid)
            raise

    async def ready(self) -> int:
        """See to it that the worker that anyio takes next is there, and ready; returns its process id.

        Nothing but `give_up` calls it off.

        Raises:
            WorkerCrashed: If there is none.
        """
        shield = anyio.CancelScope(shield=True)
        self._shields.add(shield)
        try:
            with shield:
                return await self._prepared()
        finally:
            self._shields.discard(shield)
        raise WorkerCrashed("its worker was about to start when its pool was closed")

    async def _prepared(self) -> int:
        error: BaseException | None = None
        for _ in range(self._limits.workers + 2):  # so many may have died in their sleep
            try:
                pid, calls, rss = await anyio.to_process.run_sync(
                    _borrowed.prepare, self._settings, self._modules, cancellable=True, limiter=_unlimited()
                )
            except anyio.BrokenWorkerProcess as broken:
                error = broken.__cause__ or broken
                if broken.args:  # it has not come up, and another would not either
                    break
                self._modules = []  # it may have been an import: that is the calls' business then
            except Exception as failure:
                error = failure
                break
            else:
                if not self._has_had_enough(calls, rss):
                    self._note(pid)
                    return pid
                self._tally.recycled += 1
                self._pids.discard(pid)
                await _kill_next()
        assert error is not None
        raise WorkerCrashed(f"a worker could not be started: {explain(error)}") from error

    def _has_had_enough(self, calls: int, rss: int) -> bool:
        limits = self._limits
        return (limits.max_calls is not None and calls >= limits.max_calls) or (
            limits.max_rss is not None and calls > 0 and rss > limits.max_rss
        )

    def _note(self, pid: int) -> None:
        if pid not in self._pids:
            self._pids.add(pid)
            if self._lost:
                self._lost -= 1
                self._tally.respawns += 1

    def _lose(self, pid: int | None) -> None:
        if pid is not None:
            self._pids.discard(pid)
            self._lost += 1

    def give_up(self) -> None:
        """Wait no longer for workers that start."""
        for shield in self._shields:
            shield.cancel()

    async def dismiss(self) -> None:
        """End all: anyio would keep them as long as the loop runs. Which one it takes, it does not say."""
        for _ in [*self._pids]:
            with contextlib.suppress(anyio.BrokenWorkerProcess):  # it has ended already
                await anyio.to_process.run_sync(
                    _borrowed.prepare, self._settings, [], cancellable=True, limiter=_unlimited()
                )
                await _kill_next()
        self._pids.clear()


class _Turn:
    """What anyio takes for its limiter: it is entered just before a worker is taken, the one used last.

    That one is asked beforehand whether it is ready. Until then nothing has begun, and it may be tried again.

    Args:
        workers: The workers.
        on_begun: Called when it is.

    Attributes:
        pid: The process id of the worker, once it is.
    """

    def __init__(self, workers: AnyioWorkers, on_begun: Callable[[], None]) -> None:
        self.pid: int | None = None
        self._workers = workers
        self._on_begun = on_begun

    async def __aenter__(self) -> None:
        pid = await self._workers.ready()
        # There is no pause from here on until anyio has taken that worker, unless it ends here.
        await anyio.lowlevel.checkpoint_if_cancelled()
        self.pid = pid
        self._on_begun()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class _Recall:
    """What anyio takes for its limiter: whatever it is about to do is cancelled."""

    def __init__(self, scope: anyio.CancelScope) -> None:
        self._scope = scope

    async def __aenter__(self) -> None:
        self._scope.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


async def _kill_next() -> None:
    """Have anyio kill the worker that it takes next, which has answered just now."""
    with anyio.CancelScope() as scope:
        recall: Any = _Recall(scope)
        await anyio.to_process.run_sync(time.sleep, 3600, cancellable=True, limiter=recall)


def _unlimited() -> Any:
    """A limiter that does not limit, and at which nobody pauses."""
    return contextlib.nullcontext()
