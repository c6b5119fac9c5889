"""What a factory makes, as something to enter and to leave, whatever kind of factory it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any

__all__ = ["CLOSERS", "made", "opened"]

CLOSERS = ("aclose", "close", "dispose", "drain")
"""What objects are closed by that are no asynchronous context managers: the first of these that they have."""


async def made(factory: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the factory makes: a live object, or a context manager that gives one.

    A class, a function, a coroutine function, and a function that yields once, asynchronous or not, are all
    factories.
    """
    thing = factory(*args, **kwargs)
    # By what came out, since the factory may be a partial, or wrap another.
    if inspect.isasyncgen(thing):
        return asynccontextmanager(lambda: thing)()
    if inspect.isgenerator(thing):
        return contextmanager(lambda: thing)()
    # A pool may be awaitable and a context manager too: entering it does both.
    if inspect.isawaitable(thing) and not _is_async_manager(thing):
        return await thing
    return thing


def opened(thing: Any) -> AbstractAsyncContextManager[Any]:
    """A context manager around the object that `thing` is or gives."""
    if _is_async_manager(thing):
        manager: AbstractAsyncContextManager[Any] = thing
        return manager
    return _Closed(thing)


def _is_async_manager(thing: object) -> bool:
    return hasattr(type(thing), "__aenter__") and hasattr(type(thing), "__aexit__")


def _closer_of(thing: object) -> str | None:
    found = [name for name in CLOSERS if callable(getattr(thing, name, None))]
    # Some have an attribute of any name, such as clients of MongoDB, whose attributes are databases.
    defined = [name for name in found if inspect.getattr_static(thing, name, None) is not None]
    return next(iter(defined or found), None)


class _Closed:
    """Closes an object that is no asynchronous context manager by the method that it has for that."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing
        self._closer = _closer_of(thing)
        # Not where it can be closed: leaving it may mean less, such as the end of a transaction.
        self._is_manager = self._closer is None and hasattr(type(thing), "__enter__")

    async def __aenter__(self) -> Any:
        return self._thing.__enter__() if self._is_manager else self._thing

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._is_manager:
            return bool(self._thing.__exit__(kind, error, traceback))
        if self._closer is not None:
            closing = getattr(self._thing, self._closer)()
            if inspect.isawaitable(closing):
                await closing
        return False
