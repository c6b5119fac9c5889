"""The connection of a server to a Dask scheduler: made in the background, and made anew when it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from contextvars import Context
from typing import Any

from distributed import Client
from distributed.security import Security

from asyncguard.errors import OffloadError
from asyncguard.offloading._payload import explain
from asyncguard.offloading.dask._once import NAME, Once

__all__ = ["Link"]

logger = logging.getLogger("asyncguard.offloading")

_CLOSED_WITHIN = 2.0
"""Seconds that it takes at most to hang up."""
_NEXT_LOOK = 0.05


class Link:
    """The connection of one loop. To be made, and used, on it.

    Args:
        address: That of the scheduler.
        seconds: In how many seconds it has to answer.
        security: The certificates, if it asks for some.
    """

    def __init__(self, address: str, seconds: float, security: Security | None) -> None:
        self._address = address
        self._seconds = seconds
        self._security = security
        self._client: Client | None = None
        self._scheduler_id: object = None
        self._connecting: asyncio.Task[Client] | None = None
        self._chores: set[asyncio.Task[Any]] = set()

    @property
    def threads(self) -> int | None:
        """How many threads the cluster has; `None` before that is known."""
        if self._client is None:
            return None
        info: Any = self._client.scheduler_info()
        threads: int | None = info.get("total_threads")  # not with older schedulers
        return sum(each["nthreads"] for each in info["workers"].values()) if threads is None else threads

    def warm_up(self) -> None:
        """Connect now, in the background."""
        self._connect_soon().add_done_callback(_tell)

    async def ready(self, seconds: float) -> None:
        """Wait until it is connected, or until that has failed; for so many seconds at most."""
        if self._connecting is not None:
            await asyncio.wait([self._connecting], timeout=seconds)

    async def client(self) -> Client:
        """A client that is connected.

        Raises:
            OffloadError: If none can be.
        """
        client = self._client
        if client is not None:
            info: Any = client.scheduler_info()
            # It may have found another scheduler at the address, which has no record of ours.
            if client.status == "running" and info.get("id") == self._scheduler_id:
                return client
            self.discard(client)
        return await asyncio.shield(self._connect_soon())

    def discard(self, client: Client) -> None:
        """Do not use it any more."""
        if self._client is client:
            self._client = None
            self.do(_let_go(client))

    def do(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have something done that nobody waits for, until the connection is closed."""
        chore = asyncio.get_running_loop().create_task(work, context=Context())
        self._chores.add(chore)
        chore.add_done_callback(self._done)
        return chore

    def _done(self, chore: asyncio.Task[Any]) -> None:
        self._chores.discard(chore)
        if not chore.cancelled():
            chore.exception()  # whoever awaits it is told; else it is of no interest

    def _connect_soon(self) -> asyncio.Task[Client]:
        if self._connecting is None:
            self._connecting = self.do(self._connect())
        return self._connecting

    async def _connect(self) -> Client:
        client: Client | None = None
        try:
            async with asyncio.timeout(self._seconds):
                client = Client(  # type: ignore[no-untyped-call]
                    self._address,
                    asynchronous=True,
                    set_as_default=False,
                    timeout=self._seconds,
                    security=self._security,
                    name="asyncguard",
                )
                await client
                await client.register_plugin(Once(), name=NAME)
        except BaseException as error:
            if client is not None:
                self.do(_hang_up(client))
            if not isinstance(error, Exception):
                raise
            raise OffloadError(self._obstacle(error)) from error
        else:
            info: Any = client.scheduler_info()
            self._client, self._scheduler_id = client, info.get("id")
            return client
        finally:
            self._connecting = None

    def _obstacle(self, error: Exception) -> str:
        if isinstance(error, ImportError):
            return (
                f"the Dask scheduler at {self._address} lacks something, install it there: {explain(error)}"
            )
        if isinstance(error, TimeoutError):
            return f"no Dask scheduler answered at {self._address} within {self._seconds:.3g} s"
        return f"there is no connection to the Dask scheduler at {self._address}: {explain(error)}"

    async def aclose(self) -> None:
        """Hang up, when what is being done is done."""
        if self._connecting is not None:
            self._connecting.cancel()
        await self._finish()
        if self._client is not None:
            self.discard(self._client)
        await self._finish()

    async def _finish(self) -> None:
        if self._chores:
            _, late = await asyncio.wait([*self._chores], timeout=_CLOSED_WITHIN)
            for chore in late:
                chore.cancel()
            if late:
                await asyncio.wait(late, timeout=_CLOSED_WITHIN)

    def cut(self) -> None:
        """Close the socket by which the scheduler knows of the client: there is no loop for more."""
        client = self._client
        if client is not None:
            comm: Any = client.scheduler_comm
            with contextlib.suppress(Exception):
                comm.comm.stream.socket.close()
            client.status = "closed"


async def _hang_up(client: Client) -> None:
    with contextlib.suppress(Exception):
        await client.close(timeout=_CLOSED_WITHIN)  # type: ignore[no-untyped-call]


async def _let_go(client: Client) -> None:
    """Hang up, but not while it looks for its scheduler: disturbed in that, it would log its whole stack."""
    try:
        while client.status == "connecting":  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(_NEXT_LOOK)
    finally:
        await _hang_up(client)


def _tell(connecting: asyncio.Task[Client]) -> None:
    if not connecting.cancelled() and (error := connecting.exception()) is not None:
        logger.warning("%s", error)
