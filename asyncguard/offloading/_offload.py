"""`@offload`: a function that is awaited here and runs elsewhere.

Where that is, and how it gets there, is a `Runner`'s business.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import EllipsisType, MethodType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from asyncguard.errors import NotOffloadable
from asyncguard.offloading import _pools
from asyncguard.offloading._address import (
    Address,
    address_of,
    checked_function,
    label_of,
    resolve,
    verify,
)
from asyncguard.offloading._call import OnCancel, Runner
from asyncguard.offloading._cpus import usable_cpus
from asyncguard.offloading._map import Results
from asyncguard.offloading._settings import Backend, Settings, checked_integer

__all__ = ["Offloaded", "OffloadedMethod", "offload"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
U = TypeVar("U")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class OneArgument(Protocol[T_contra, R_co]):
    """What can be called with one argument, and awaited."""

    async def __call__(self, item: T_contra, /) -> R_co: ...


class Offloaded(Generic[P, R]):
    """A function that runs off the event loop when it is called, and is awaited: what `offload` makes of it.

        result = await render(rows)                        # elsewhere
        result = render.inline(rows)                       # here and now: the plain function
        result = await render.using(timeout=0.5)(rows)     # with other options
        async for page in render.map(many, limit=8): ...   # one call for each item

    It has the name, documentation and signature of the function, which is its ``__wrapped__``. It works
    as a method, can be a dependency or an endpoint of FastAPI, and is picklable where its function can be
    found by its name.
    """

    _is_offloaded = True

    # What `functools.update_wrapper` sets.
    __name__: str
    __qualname__: str
    __wrapped__: Callable[P, R]

    def __init__(self, function: Callable[P, R], settings: Settings) -> None:
        functools.update_wrapper(self, function)
        self._home = _Home(function, settings)
        self._settings = settings
        self._leading: tuple[Any, ...] = ()
        if sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function elsewhere.

        Returns:
            What it returns.

        Raises:
            OffloadError: If there is no result, though the function did not raise; see `asyncguard.errors`.
        """
        home, settings = self._home, self._settings
        result: R = await settings.runner().run_call(
            home.address(), home.function, (*self._leading, *args), kwargs, settings.options
        )
        return result

    def inline(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here, as if it had not been decorated."""
        result: R = self._home.function(*self._leading, *args, **kwargs)
        return result

    def using(
        self,
        *,
        timeout: float | EllipsisType | None = ...,
        priority: int | EllipsisType = ...,
        on_cancel: OnCancel | EllipsisType = ...,
        pool: Runner | EllipsisType | None = ...,
        on_progress: Callable[[float], object] | EllipsisType | None = ...,
    ) -> Offloaded[P, R]:
        """The same function with other options; what is not given stays as it is.

        Args:
            timeout: In how many seconds a call has to end; `None` for any time.
            priority: Which of the calls that wait for a worker comes first: the greatest. It is 0 at first.
            on_cancel: What becomes of a call that nobody waits for any more; see `offload`.
            pool: The pool that it runs in; `None` for the one that is open.
            on_progress: Called on the event loop with each fraction that the function reports by
                `report_progress`. It must return at once.

        Raises:
            TypeError: If an option is of the wrong type.
            ValueError: If an option is out of range, or not for this backend.
        """
        changes = {
            "timeout": timeout,
            "priority": priority,
            "on_cancel": on_cancel,
            "pool": pool,
            "on_progress": on_progress,
        }
        changed = self._copy()
        changed._settings = self._settings.changed({k: v for k, v in changes.items() if v is not ...})
        return changed

    def map(self: OneArgument[T, U], items: Iterable[T], /, *, limit: int | None = None) -> Results[U]:
        """Call the function with each of many items: ``async for result in render.map(many)``.

        The results come in the order of the items. Items are taken as they are needed, from a generator for
        instance: no more than `limit` calls run, and no more than as many results wait to be taken. When a
        call fails, no further one is begun; its exception is raised in its place. When the loop is left
        early, the calls that run are cancelled.

        Args:
            items: What to call it with.
            limit: How many calls may run at once; by default as many as there are CPUs for this process.

        Returns:
            An asynchronous iterator, which has `aclose` as well.

        Raises:
            TypeError: If `items` is not iterable, or `limit` is no integer.
            ValueError: If `limit` is less than 1.
        """
        if limit is None:
            limit = _cpus()
        elif checked_integer("limit", limit) < 1:
            raise ValueError(f"limit must be at least 1, not {limit!r}")
        if not isinstance(items, Iterable):
            hint = ": collect them first" if hasattr(items, "__aiter__") else ""
            raise TypeError(f"items must be iterable, not of type {type(items).__qualname__}{hint}")
        return Results(self, iter(items), limit)

    @overload
    def __get__(self, instance: None, owner: type, /) -> Offloaded[P, R]: ...

    @overload
    def __get__(
        self: Offloaded[Concatenate[T, Q], R], instance: T, owner: type | None = None, /
    ) -> Offloaded[Q, R]: ...

    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        return self if instance is None else self._bound(instance)

    def _bound(self, first: object) -> Offloaded[Any, R]:
        """As a method: what is called has `first` as its first argument."""
        bound = self._copy()
        bound._leading = (*self._leading, first)
        bound.__wrapped__ = MethodType(self.__wrapped__, first)
        return bound

    def _copy(self) -> Offloaded[P, R]:
        made: Offloaded[P, R] = Offloaded.__new__(Offloaded)
        made.__dict__.update(self.__dict__)
        return made

    def __reduce__(self) -> Any:
        try:
            return resolve, (verify(self, self._home.label),)
        except NotOffloadable:  # bound, or with other options, or not there under its name
            address = verify(self._home.function, address_of(self._home.function))
            return _rebuilt, (address, self._settings, self._leading)

    def __repr__(self) -> str:
        return f"<offloaded {self._home.label.label}>"


class OffloadedMethod(Generic[P, R]):
    """A static method or a class method that was offloaded. What one gets from its class is `Offloaded`."""

    __wrapped__: Any  # the `Offloaded`

    def __init__(self, method: staticmethod[P, R] | classmethod[Any, P, R], settings: Settings) -> None:
        function: Callable[..., R] = method.__func__
        self.__wrapped__ = Offloaded(function, settings)
        self._is_class_method = isinstance(method, classmethod)

    def __get__(self, instance: object, owner: type | None = None, /) -> Offloaded[P, R]:
        offloaded: Offloaded[P, R] = self.__wrapped__
        if self._is_class_method:
            return offloaded._bound(type(instance) if owner is None else owner)
        return offloaded


class Decorator(Protocol):
    """What `offload` with options returns."""

    @overload
    def __call__(self, method: staticmethod[P, R], /) -> OffloadedMethod[P, R]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, method: classmethod[Any, P, R], /) -> OffloadedMethod[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Offloaded[P, R]: ...


@overload
def offload(method: staticmethod[P, R], /) -> OffloadedMethod[P, R]: ...  # type: ignore[overload-overlap]


@overload
def offload(method: classmethod[Any, P, R], /) -> OffloadedMethod[P, R]: ...


@overload
def offload(function: Callable[P, R], /) -> Offloaded[P, R]: ...


@overload
def offload(
    *,
    timeout: float | None = None,
    backend: Backend = "process",
    on_cancel: OnCancel | None = None,
    context: Iterable[ContextVar[Any]] = (),
    pool: Runner | None = None,
) -> Decorator: ...


def offload(
    *functions: Any,
    timeout: float | None = None,
    backend: Backend = "process",
    on_cancel: OnCancel | None = None,
    context: Iterable[ContextVar[Any]] = (),
    pool: Runner | None = None,
) -> Any:
    """Have a function run off the event loop. It is awaited from then on.

        @offload
        def render(rows: list[dict]) -> bytes: ...

        @offload(timeout=2)
        def thumbnail(image: bytes) -> bytes: ...

        pdf = await render(rows)

    In a method, the instance is sent along as the first argument. On static and class methods it goes above
    ``@staticmethod`` and ``@classmethod``; type checkers understand the former, if it is called by its class,
    and not the latter.

    Args:
        *functions: What is decorated: a plain function that is defined at the top level of a module or in a
            class there. In a thread, or in an executor that has threads, any function will do.
        timeout: In how many seconds a call has to end, waiting for its turn included; `None` for any time.
            What the current request has left counts as well, if it is less.
        backend: Where it runs. ``"process"``: a worker process; a call can be stopped there, and what it does
            to the process is of no consequence here. ``"thread"``: a thread of this process, for C code that
            lets go of the GIL. ``"interpreter"``: an interpreter of its own in a thread, on Python 3.14 or
            newer. Or a `concurrent.futures.Executor`, which remains yours to shut down.
        on_cancel: What becomes of a call that nobody waits for any more, or that is too late. ``"raise"``: an
            exception is raised in the function, so that it can clean up; if that does not end it, its process
            is killed. ``"kill"``: its process is killed at once. ``"abandon"``: it runs on to its end, for
            nobody. By default ``"raise"`` in a worker process. Elsewhere nothing can be stopped that has
            begun, so that ``"abandon"`` is all there is.
        context: The context variables whose values the function is to see. In a thread it sees them all.
        pool: The pool of worker processes that it runs in; by default the one that is open.

    Returns:
        The offloaded function; with options, a decorator that makes it.

    Raises:
        NotOffloadable: If it is a function that a worker could not find again, or could not run.
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range, or not for this backend.
    """
    settings = Settings(timeout, backend, on_cancel, context, pool)

    def decorate(function: Any, /) -> Any:
        if isinstance(function, staticmethod | classmethod):
            return OffloadedMethod(function, settings)
        return Offloaded(function, settings)

    return decorate(*functions) if functions else decorate


class _Home:
    """A function, and where a worker finds it."""

    def __init__(self, function: Callable[..., Any], settings: Settings) -> None:
        self.function = function
        self._address: Address | None = None
        if settings.needs_address:
            self.label = address_of(function)
            _pools.expect(self.label.module)
        else:
            checked_function(function)
            self.label = self._address = label_of(function)

    def address(self) -> Address:
        """Where it is found; looked up once, when the module is finished.

        Raises:
            NotOffloadable: If its name leads elsewhere.
        """
        address = self._address
        if address is None:
            address = self._address = verify(self.function, self.label)
        return address


def _rebuilt(address: Address, settings: Settings, leading: tuple[Any, ...]) -> Offloaded[Any, Any]:
    offloaded: Offloaded[Any, Any] = Offloaded(resolve(address), settings)
    for each in leading:
        offloaded = offloaded._bound(each)
    return offloaded


@functools.cache
def _cpus() -> int:
    return usable_cpus()
