"""The server's side of a Dask cluster: how a call gets there, and its outcome back."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import dask
from distributed import Client, Future, KilledWorker
from distributed.client import FutureCancelledError
from distributed.security import Security

from asyncguard import _clock
from asyncguard._options import checked_seconds
from asyncguard.errors import (
    NotOffloadable,
    OffloadError,
    OffloadQueueFull,
    OffloadTimeout,
    PayloadError,
    WorkerCrashed,
)
from asyncguard.offloading._address import Address
from asyncguard.offloading._answers import result_of
from asyncguard.offloading._backend import Census, Limits
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._payload import Packed, PackError, TooBig, explain
from asyncguard.offloading._summons import pack_call, variables_of
from asyncguard.offloading._tally import Tally
from asyncguard.offloading._wire import INLINE, Frame, Kind
from asyncguard.offloading.dask._link import Link
from asyncguard.offloading.dask._parcel import Parcel
from asyncguard.offloading.dask._serve import Answer, Refused, serve

__all__ = ["DaskBackend"]

_CLOSED_WITHIN = 2.0
"""Seconds that it takes at most to end the calls when the pool is closed."""
_READY_WITHIN = 10.0
_LARGE = 1 << 20
_NO_WARNING = {"distributed.admin.large-graph-warning-threshold": "1 PB"}
"""Dask's advice on large arguments is for graphs, whose tasks may share them."""


class DaskBackend:
    """A Dask cluster that runs the calls of a pool: ``OffloadPool(backend=DaskBackend("tcp://..."))``.

    A call runs in a thread of one of the cluster's workers, at most once. Asyncguard has to be installed on
    the scheduler and on the workers, and on these what the functions import. Of the pool's options, only
    `max_queue` means something here: so many calls may wait, beyond those that the cluster has threads for.

    What Dask has no means for: a function that does not heed the exception raised in it, because it is in a
    call of C code or in a `time.sleep`, keeps its thread until that returns. ``on_cancel="kill"`` is refused.
    `report_progress` tells nobody. Log records stay in the worker's log. An `OffloadTimeout` has no stack,
    and a `WorkerCrashed` neither that nor an exit code.

    It needs asyncio or uvloop, and belongs to one pool.

    Args:
        address: That of the scheduler, such as ``"tcp://scheduler:8786"``.
        connect_timeout: In how many seconds the scheduler has to answer. The pool connects in the background
            when it is opened, and again when a call finds the connection lost.
        security: The certificates, for ``"tls://..."`` addresses.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If `connect_timeout` is out of range.
    """

    def __init__(
        self, address: str, *, connect_timeout: float = 5.0, security: Security | None = None
    ) -> None:
        self.address: str = _checked_address(address)
        self.connect_timeout: float = checked_seconds("connect_timeout", connect_timeout)
        self._security = security

    # -- opening and closing -----------------------------------------------------------------------

    def open(self, limits: Limits, tally: Tally, *, warm: bool, preload: Iterable[str]) -> None:
        """Begin to take calls; see `Backend`."""
        if asyncio._get_running_loop() is None:
            raise RuntimeError("a DaskBackend needs asyncio or uvloop: Dask's client does not run on trio")
        self._limits = limits
        self._tally = tally
        self._link = Link(self.address, self.connect_timeout, self._security)
        self._expiries: set[asyncio.Timeout] = set()
        self._refusal: str | None = None
        self._empty = asyncio.Event()
        self._limiter = anyio.CapacityLimiter(4)
        if warm:
            self._link.warm_up()

    async def ready(self) -> None:
        """Wait until the scheduler has answered, or failed to; see `Backend`."""
        await self._link.ready(_READY_WITHIN)

    async def aclose(self) -> None:
        """Call off what runs, and hang up; see `Backend`."""
        self._refusal = "its pool was closed"
        now = asyncio.get_running_loop().time()
        for expiry in [*self._expiries]:
            with contextlib.suppress(RuntimeError):  # it is about to end
                expiry.reschedule(now)
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(_CLOSED_WITHIN):
                if self._expiries:
                    await self._empty.wait()
            await self._link.aclose()

    def abandon(self) -> None:
        """The loop is gone: hang up without it, whereupon the scheduler calls off what runs."""
        self._link.cut()

    def disown(self) -> None:
        """In a forked child: let go of the parent's connection, which would outlive the parent here."""
        self._link.cut()

    # -- calls -------------------------------------------------------------------------------------

    async def run(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
        seconds: float | None,
        began: float,
    ) -> Any:
        """Run one call; see `Backend`."""
        label, tally = address.label, self._tally
        _check(address, options)
        self._check_room(label)
        try:
            context = variables_of(options.context, address.module) if options.context else ()
        except LookupError as error:
            raise PayloadError(f"{label} was not begun: {error}") from None
        call = partial(pack_call, address, args, kwargs, context)
        expiry = asyncio.timeout(None if seconds is None else began + seconds - _clock.monotonic())
        self._expiries.add(expiry)
        try:
            async with expiry:
                answer = await self._answer(label, await self._parcel(label, call), options)
                tally.ran(max(0.0, _clock.monotonic() - began - answer.seconds), answer.seconds)
                frame = Frame(Kind(answer.kind), 0, answer.parcel.body())
                return await result_of(label, frame, self._in_thread)
        except TimeoutError:
            if not expiry.expired():  # the function's own
                raise
            if self._refusal is not None:
                raise OffloadError(f"{label} was stopped: {self._refusal}") from None
            tally.timeouts += 1
            raise OffloadTimeout(
                f"{label} did not end within {seconds:.3g} s on the Dask cluster at {self.address}"
            ) from None
        except asyncio.CancelledError:
            tally.cancelled += 1
            raise
        finally:
            self._expiries.discard(expiry)
            if self._refusal is not None and not self._expiries:
                self._empty.set()

    def _check_room(self, label: str) -> None:
        if self._refusal is not None:
            raise OffloadError(f"{label} was not begun: {self._refusal}")
        threads = self._threads()
        queued = len(self._expiries) - threads
        if queued >= self._limits.max_queue:
            self._tally.refused += 1
            raise OffloadQueueFull(
                f"{label} was not begun: {queued} calls wait for the {threads} threads of the Dask cluster "
                "already; raise max_queue, add workers to the cluster, or start fewer at once: `map` does",
                self._tally.mean_run * max(1, queued) / max(1, threads),
            )

    async def _parcel(self, label: str, call: Callable[..., Packed]) -> Parcel:
        try:
            try:
                return Parcel.of(call(most=INLINE))
            except TooBig:
                parcel: Parcel = await self._in_thread(lambda: Parcel.of(call()))
                return parcel
        except PackError as error:
            raise PayloadError(f"{label} was not begun: {error}") from error.__cause__

    async def _answer(self, label: str, parcel: Parcel, options: CallOptions) -> Answer:
        try:
            client = await self._link.client()
        except OffloadError as error:
            raise OffloadError(f"{label} was not begun: {error}") from error.__cause__
        key = f"{label}-{uuid.uuid4().hex}"  # Dask's statistics go by what is before the number
        with dask.config.set(_NO_WARNING) if parcel.size > _LARGE else contextlib.nullcontext():
            future: Future[Any] = client.submit(
                serve,
                key,
                parcel,
                options.on_cancel == "raise",
                key=key,
                pure=False,
                retries=0,
                priority=options.priority,
                fifo_timeout=0,
            )
        del parcel
        try:
            answer = await future
        except KilledWorker as error:
            self._tally.crashes += 1
            where = error.last_worker.address
            raise WorkerCrashed(f"the worker at {where} died while it ran {label}") from error
        except FutureCancelledError as error:
            if client.status != "running" or error.reason == "scheduler-connection-lost":
                raise self._lost(label, client) from error
            raise OffloadError(f"{label} was called off by the Dask cluster: {explain(error)}") from error
        except OSError as error:
            raise self._lost(label, client) from error
        except Exception as error:
            raise OffloadError(f"the Dask cluster could not run {label}: {explain(error)}") from error
        finally:
            future.release()  # type: ignore[no-untyped-call]  # if it is not done, that calls it off
        if isinstance(answer, Answer):
            return answer
        assert isinstance(answer, Refused)
        if not answer.where:
            raise OffloadError(f"{label} was not begun: the Dask scheduler knew nothing of it any more")
        self._tally.crashes += 1
        raise WorkerCrashed(f"the worker at {answer.where} was lost while it ran {label}, or with its result")

    def _lost(self, label: str, client: Client) -> OffloadError:
        self._link.discard(client)
        return OffloadError(
            f"the connection to the Dask scheduler at {self.address} was lost while it had {label} to run; "
            "that is not run again"
        )

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        # Of its own: those who hold all of the application's threads may be waiting for us.
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    # -- how it is doing ---------------------------------------------------------------------------

    def _threads(self) -> int:
        """How many calls can run at once; a guess before the scheduler has told."""
        threads = self._link.threads
        return self._limits.workers if threads is None else threads

    def census(self) -> Census:
        """How many there are now: threads, not processes. Others may use the cluster as well."""
        threads = self._threads()
        running = min(len(self._expiries), threads)
        return Census(threads, threads - running, running, len(self._expiries) - running)


def _checked_address(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f'address must be that of a Dask scheduler, such as "tcp://host:8786", not {value!r}')
    return value


def _check(address: Address, options: CallOptions) -> None:
    if options.on_cancel == "kill":
        raise ValueError(
            "on_cancel='kill' is not for a DaskBackend: it would kill the other calls of the worker as well"
        )
    if address.module in ("__main__", "__mp_main__"):
        raise NotOffloadable(
            f"{address.label} cannot be run on a Dask cluster: its workers have other main modules. "
            "Put it into a module that is installed there"
        )
