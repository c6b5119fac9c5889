"""`shared`: one object for all requests, declared at import and opened with the application."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar, overload

from asyncguard._options import checked_seconds
from asyncguard.clients import _slots
from asyncguard.clients._declared import Declaration
from asyncguard.errors import SharedNotOpen
from asyncguard.events import SharedStatus, SourceLine

__all__ = ["Shared", "shared"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
F = TypeVar("F")

Check = Callable[[T], Awaitable[object] | object]
"""Says whether an object is well: it raises, or returns `False`, if not."""


class Shared(Generic[T_co]):
    """One object for all requests of a process: what `shared` declares.

        client: Annotated[httpx.AsyncClient, Depends(github)]   # in an endpoint or a dependency of FastAPI
        client = github.get()                                   # anywhere else
        with github.use() as client: ...                        # in a task that outlives requests
        with github.override(fake): ...                         # in a test

    Each event loop has an object of its own, from when its lifespan opens it to when that closes it.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        declaration: Declaration,
        name: str | None = None,
        start_timeout: float | None = 10.0,
        close_timeout: float | None = 10.0,
        check: Check[Any] | None = None,
        max_age: float | None = None,
        needs: Iterable[Shared[Any]] = (),
    ) -> None:
        if not callable(factory):
            raise TypeError(f"shared() takes a class or a function that makes an object, not {factory!r}")
        if name is not None and type(name) is not str:
            raise TypeError(f"name must be a string, or None, not {name!r}")
        if check is not None and not callable(check):
            raise TypeError(f"check must be a function that takes the object, or None, not {check!r}")
        self.factory: Callable[..., Any] = factory
        self.start_timeout: float = _seconds("start_timeout", start_timeout)
        self.close_timeout: float = _seconds("close_timeout", close_timeout)
        self.check: Check[Any] | None = check
        self.max_age: float | None = None if max_age is None else checked_seconds("max_age", max_age)
        self.needs: tuple[Shared[Any], ...] = _needs(needs, args, kwargs)
        self._args = args
        self._kwargs = kwargs
        self._name = name
        self._declaration = declaration
        self._replacements: list[_Replacement] = []

    async def __call__(self) -> T_co:
        """The live object; for ``Depends``, which calls it on the loop, and not in a thread.

        Raises:
            SharedNotOpen: If it is not open.
        """
        return self.get()

    def get(self) -> T_co:
        """The live object of this event loop.

        Where `max_age` is set, a request keeps what it got until it ends. Code that belongs to no request
        had better ask each time, or `use` it.

        In a worker thread, such as that of a ``def`` endpoint, it is that of the loop which the thread works
        for.

        Raises:
            SharedNotOpen: If it is not open: no lifespan has opened it, or one on another loop.
        """
        if self._replacements:
            return self.replacement  # type: ignore[no-any-return]
        return _slots.find(self).take()  # type: ignore[no-any-return]

    @contextmanager
    def use(self) -> Iterator[T_co]:
        """The live object, which stays open until the end of the block even when it gets too old.

        Raises:
            SharedNotOpen: As `get`.
        """
        if self._replacements:
            yield self.replacement
            return
        instance = _slots.find(self).hold()
        try:
            yield instance.object
        finally:
            instance.drop()

    @contextmanager
    def override(self, fake: F) -> Iterator[F]:
        """Have everybody get `fake` in its place, in all threads, until the end of the block.

        A lifespan that begins meanwhile does not open it, nor what only it needs. The fake is neither entered
        nor closed. Blocks may be nested: the last one that was begun counts.
        """
        replacement = _Replacement(fake)
        self._replacements.append(replacement)
        try:
            yield fake
        finally:
            self._replacements.remove(replacement)

    @property
    def status(self) -> SharedStatus:
        """How it is on this event loop; in a thread without one, on that which the thread works for."""
        if self.is_replaced:
            return SharedStatus(self.name, self.declared, "replaced")
        try:
            return _slots.find(self).status
        except SharedNotOpen:
            return SharedStatus(self.name, self.declared, "closed")

    @functools.cached_property
    def name(self) -> str:
        """What messages call it: by default, the variable that it was assigned to."""
        return self._name or self._declaration.variable or _name_of(self.factory)

    @property
    def declared(self) -> SourceLine:
        """The line that declares it."""
        return self._declaration.line

    @property
    def is_replaced(self) -> bool:
        """Whether `override` has something in its place."""
        return bool(self._replacements)

    @property
    def replacement(self) -> Any:
        """What `override` has put in its place."""
        return self._replacements[-1].thing

    def inputs(self, live: Callable[[Shared[Any]], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the factory with, where resources among the arguments have become live objects."""

        def value(given: Any) -> Any:
            return live(given) if isinstance(given, Shared) else given

        return tuple(map(value, self._args)), {name: value(given) for name, given in self._kwargs.items()}

    def __str__(self) -> str:
        return f"the shared resource {self.name!r} (declared at {self._declaration.place})"

    def __repr__(self) -> str:
        return f"<Shared {self.name!r}, declared at {self._declaration.place}>"


class _Replacement:
    """Told from another one by its identity, whatever `thing` says of itself."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing


@overload
def shared(
    factory: Callable[..., AbstractAsyncContextManager[T]],
    *args: Any,
    name: str | None = ...,
    start_timeout: float | None = ...,
    close_timeout: float | None = ...,
    check: Check[T] | None = ...,
    max_age: float | None = ...,
    needs: Iterable[Shared[Any]] = ...,
    **kwargs: Any,
) -> Shared[T]: ...


@overload
def shared(
    factory: Callable[..., AbstractContextManager[T]],
    *args: Any,
    name: str | None = ...,
    start_timeout: float | None = ...,
    close_timeout: float | None = ...,
    check: Check[T] | None = ...,
    max_age: float | None = ...,
    needs: Iterable[Shared[Any]] = ...,
    **kwargs: Any,
) -> Shared[T]: ...


@overload
def shared(
    factory: Callable[..., Awaitable[T]] | Callable[..., AsyncIterator[T]] | Callable[..., Iterator[T]],
    *args: Any,
    name: str | None = ...,
    start_timeout: float | None = ...,
    close_timeout: float | None = ...,
    check: Check[T] | None = ...,
    max_age: float | None = ...,
    needs: Iterable[Shared[Any]] = ...,
    **kwargs: Any,
) -> Shared[T]: ...


@overload
def shared(
    factory: Callable[..., T],
    *args: Any,
    name: str | None = ...,
    start_timeout: float | None = ...,
    close_timeout: float | None = ...,
    check: Check[T] | None = ...,
    max_age: float | None = ...,
    needs: Iterable[Shared[Any]] = ...,
    **kwargs: Any,
) -> Shared[T]: ...


def shared(
    factory: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    start_timeout: float | None = 10.0,
    close_timeout: float | None = 10.0,
    check: Callable[[Any], object] | None = None,
    max_age: float | None = None,
    needs: Iterable[Shared[Any]] = (),
    **kwargs: Any,
) -> Shared[Any]:
    """Declare one object for all requests, opened and closed with the application.

        github = shared(httpx.AsyncClient, base_url="https://api.github.com", timeout=10)

        app = FastAPI()
        asyncguard.install(app, shared=[github])

        @app.get("/user/{name}")
        async def user(name: str, client: Annotated[httpx.AsyncClient, Depends(github)]) -> object:
            return (await client.get(f"/users/{name}")).json()

    Nothing is made until a lifespan opens it, inside the running event loop. What the factory makes is
    entered, if it is an asynchronous context manager, and left when the lifespan ends; anything else is
    closed by the first of ``aclose``, ``close``, ``dispose`` and ``drain`` that it has. A factory may also be
    a coroutine function, or a function that yields once, asynchronous or not: what comes after the ``yield``
    closes it.

    Args:
        factory: A class or a function that makes the object.
        *args: What to call it with. Another shared resource among them is opened first, and its live object
            is passed.
        name: What messages call it; by default, the variable that it is assigned to.
        start_timeout: In how many seconds it has to be open; `None` for any time.
        close_timeout: In how many seconds it has to be closed, before it is given up and the next one is
            closed; `None` for any time.
        check: Called with the object when it has been opened, and by `check_shared`. It raises, or returns
            `False`, if the object is not well; what it returns is awaited if that can be.
        max_age: After how many seconds a new object takes its place. Requests keep the one that they got.
        needs: Other shared resources that are to be opened before it, and closed after it.
        **kwargs: What to call the factory with, by name. For one that takes an argument of a name from above,
            pass a `functools.partial`.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range.
    """
    return Shared(
        factory,
        args,
        kwargs,
        declaration=Declaration(sys._getframe(1)),
        name=name,
        start_timeout=start_timeout,
        close_timeout=close_timeout,
        check=check,
        max_age=max_age,
        needs=needs,
    )


def _seconds(option: str, value: float | None) -> float:
    return math.inf if value is None else checked_seconds(option, value)


def _needs(
    needs: Iterable[Shared[Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Shared[Any], ...]:
    """All that has to be open before it. There can be no circle: each was declared before who needs it."""
    if isinstance(needs, Shared):
        raise TypeError(f"needs must be a list of what shared() returns, not {needs!r}")
    named = tuple(needs)
    for needed in named:
        if not isinstance(needed, Shared):
            raise TypeError(f"needs must be a list of what shared() returns, and {needed!r} is not")
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, Shared))
    return tuple(dict.fromkeys((*named, *given)))


def _name_of(factory: Callable[..., Any]) -> str:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__qualname__", None) or type(factory).__qualname__
