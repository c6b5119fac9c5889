"""Opening and closing shared resources: with an application, or around any block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from asyncguard._tasks import current_loop
from asyncguard.clients import _slots
from asyncguard.clients._shared import Shared
from asyncguard.errors import SharedStartFailed

if TYPE_CHECKING:
    from asyncguard.clients._slot import Slot

__all__ = ["Lifespan", "checked_resources", "combine_lifespans", "open_shared", "with_shared"]

logger = logging.getLogger("asyncguard.clients")

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
"""What Starlette calls a lifespan: entered when the application starts, left when it ends. It gives the state
that requests get copies of, or `None`."""


class open_shared:  # noqa: N801 - it reads like a function
    """Opens shared resources, and closes them in reverse: a lifespan, and a plain context manager.

        app = FastAPI(lifespan=open_shared(github, database))   # with an application

        async with open_shared(github):                         # in a script or a worker
            await github.get().get("/zen")

    They are opened in the order given, but what one needs is opened before it, even if it is not given. If
    one fails, those that are open are closed. One that another lifespan has open on the same loop is opened
    and closed only once.

    Args:
        *resources: What `shared` has declared.

    Raises:
        TypeError: If one of them is anything else.
        SharedStartFailed: On entering it, if one of them could not be opened, or not in time.
    """

    def __init__(self, *resources: Shared[Any]) -> None:
        self._resources = checked_resources("open_shared() takes", resources)
        if self._resources:
            # What it takes to open some: here, since on the event loop it would be a stall.
            from asyncguard.clients import _slot  # noqa: F401
        self._entered: list[tuple[object, Opening]] = []

    def __call__(self, app: object, /) -> AbstractAsyncContextManager[None]:
        """What Starlette enters when the application starts."""
        return Opening(self._resources)

    async def __aenter__(self) -> None:
        opening = Opening(self._resources)
        await opening.__aenter__()
        self._entered.append((current_loop(), opening))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop = current_loop()
        entered = next(item for item in reversed(self._entered) if item[0] is loop)
        self._entered.remove(entered)
        await entered[1].__aexit__(kind, error, traceback)


class Opening(AbstractAsyncContextManager[None]):
    """Resources that are opened once, and closed."""

    def __init__(self, resources: Sequence[Shared[Any]]) -> None:
        self._resources = resources
        self._open: list[Slot] = []

    async def __aenter__(self) -> None:
        try:
            for shared in _in_order(self._resources):
                self._open.append(await _slots.open_(shared))
        except BaseException as error:
            if isinstance(error, SharedStartFailed):
                logger.error("%s", error)
            await self.__aexit__(type(error), error, None)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cancelled: asyncio.CancelledError | None = None
        while self._open:
            cancelled = await _slots.close(self._open.pop()) or cancelled
        if cancelled is not None:
            raise cancelled


def combine_lifespans(*lifespans: Lifespan | Starlette) -> Lifespan:
    """One lifespan of several: entered in the order given, left in reverse.

        app = FastAPI(lifespan=combine_lifespans(open_shared(github), own_lifespan))

    A mounted application may be among them: servers do not run its lifespan, so this one does. States that
    they give are put together.

    Raises:
        TypeError: If one of them is neither an application nor can be called with one.
    """
    for lifespan in lifespans:
        if not callable(lifespan):
            raise TypeError(f"combine_lifespans() takes lifespans, not {lifespan!r}")

    @asynccontextmanager
    async def combined(app: object) -> AsyncIterator[Mapping[str, Any] | None]:
        states: list[Mapping[str, Any]] = []
        async with AsyncExitStack() as stack:
            for lifespan in lifespans:
                if isinstance(lifespan, Starlette):
                    entering = lifespan.router.lifespan_context(lifespan)
                else:
                    entering = lifespan(app)
                state = await stack.enter_async_context(entering)
                if state is not None:
                    states.append(state)
            # Without a state, no server has to support one.
            yield {name: value for state in states for name, value in state.items()} if states else None

    return combined


def with_shared(lifespan: Lifespan, resources: Sequence[Shared[Any]]) -> Lifespan:
    """A lifespan with shared resources around it.

    Args:
        lifespan: The application's own.
        resources: What `checked_resources` has let pass.
    """
    return combine_lifespans(open_shared(*resources), lifespan)


def checked_resources(whose: str, value: Iterable[Shared[Any]]) -> tuple[Shared[Any], ...]:
    """What `shared` has declared, and nothing else.

    Args:
        whose: What takes them, as a message begins: ``"shared must be a list of"``.
        value: What it was given.

    Raises:
        TypeError: If `value` is, or has in it, anything else.
    """
    if isinstance(value, Shared) or not isinstance(value, Iterable):
        raise TypeError(f"{whose} what asyncguard.shared() returns, not {value!r}")
    resources = tuple(value)
    for resource in resources:
        if not isinstance(resource, Shared):
            raise TypeError(f"{whose} what asyncguard.shared() returns, not {resource!r}")
    return resources


def _in_order(resources: Iterable[Shared[Any]]) -> list[Shared[Any]]:
    """All that is to be opened, each after what it needs. What a test has replaced is left out."""
    ordered: dict[Shared[Any], None] = {}

    def add(resource: Shared[Any]) -> None:
        if resource not in ordered and not resource.is_replaced:
            for needed in resource.needs:
                add(needed)
            ordered[resource] = None

    for resource in resources:
        add(resource)
    return [*ordered]
