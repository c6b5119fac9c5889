"""`@timeout(seconds)`: another limit for one endpoint, dependency or router."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import FunctionType, MethodType
from typing import Any, TypeVar, overload

from asyncguard._options import checked_seconds
from asyncguard._request import current_request

__all__ = ["declared_limit", "shortest", "timeout"]

logger = logging.getLogger("asyncguard.timeouts")

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__asyncguard_timeout__"
shortest: float = math.inf
"""The shortest limit that a function was decorated with so far, in seconds; plus infinity if none was."""

_warned: set[str] = set()


class timeout:  # noqa: N801 - it reads like a function
    """Gives a request another limit than the middleware's: longer, shorter or none.

    As a decorator of an endpoint or a dependency, or as a dependency of a route or a router:

        @app.get("/report")
        @timeout(120)
        async def report() -> bytes: ...

        router = APIRouter(dependencies=[Depends(timeout(5))])

    The limit counts from when the request began. The innermost one holds: that of an endpoint rather than its
    router's. It takes effect when the function is called; that of an endpoint as soon as its route is known,
    so that its dependencies and the wait for a thread are covered.

    Args:
        seconds: In how many seconds the response has to begin; `None` for any time.

    Raises:
        TypeError: If `seconds` is no number, or what is decorated is no Python function.
        ValueError: If `seconds` is not a finite number greater than 0.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds: float | None = None if seconds is None else checked_seconds("timeout", seconds)
        # What FastAPI reads of a dependency: it takes nothing, and is awaited on the loop.
        self.__signature__: inspect.Signature = inspect.Signature()
        self.__wrapped__: Callable[[], Awaitable[None]] = _nothing

    @overload
    def __call__(self) -> Awaitable[None]: ...

    @overload
    def __call__(self, endpoint: F, /) -> F: ...

    def __call__(self, *endpoint: Any) -> Any:
        if not endpoint:
            self._apply()
            return _DONE
        return self._decorate(*endpoint)

    def _decorate(self, endpoint: Any) -> Any:
        function = endpoint
        while isinstance(function, functools.partial):
            function = function.func
        if not isinstance(function, FunctionType | MethodType):
            hint = "; decorate its methods" if inspect.isclass(endpoint) else ""
            raise TypeError(f"@timeout decorates an endpoint, which {endpoint!r} is not{hint}")
        limited = functools.wraps(endpoint)(_WRAPPERS[_kind(function)](endpoint, self._apply))
        if declared_limit(endpoint) is None:  # the innermost one counts
            setattr(limited, _MARK, self)
        _declare(self.seconds)
        return limited

    def _apply(self) -> None:
        record = current_request.get()
        if record is None:
            return
        limit, declared = self, declared_limit(record.endpoint)
        if declared is self:
            record.limited = True
        elif declared is not None and not record.limited:
            limit = declared  # the endpoint has not been called yet: this is something around it
        if record.deadline is not None:
            record.deadline.retune(limit.seconds)
        elif math.isinf(record.finished_at):
            _warn(record.label)


# -- functions of each kind, which stay of their kind ----------------------------------------------


def _kind(function: Callable[..., Any]) -> str:
    if inspect.iscoroutinefunction(function):
        return "coroutine"
    if inspect.isasyncgenfunction(function):
        return "asynchronous generator"
    return "generator" if inspect.isgeneratorfunction(function) else "plain"


def _plain(endpoint: Any, apply: Callable[[], None]) -> Callable[..., Any]:
    def limited(*args: Any, **kwargs: Any) -> Any:
        apply()
        return endpoint(*args, **kwargs)

    return limited


def _coroutine(endpoint: Any, apply: Callable[[], None]) -> Callable[..., Any]:
    async def limited(*args: Any, **kwargs: Any) -> Any:
        apply()
        return await endpoint(*args, **kwargs)

    return limited


def _generator(endpoint: Any, apply: Callable[[], None]) -> Callable[..., Any]:
    def limited(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        apply()
        return (yield from endpoint(*args, **kwargs))

    return limited


def _asynchronous_generator(endpoint: Any, apply: Callable[[], None]) -> Callable[..., Any]:
    async def limited(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        apply()
        generator = endpoint(*args, **kwargs)
        try:
            item = await anext(generator)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as error:
                    item = await generator.athrow(error)
                else:
                    item = await generator.asend(sent)
        except StopAsyncIteration:
            return

    return limited


_WRAPPERS = {
    "plain": _plain,
    "coroutine": _coroutine,
    "generator": _generator,
    "asynchronous generator": _asynchronous_generator,
}


async def _nothing() -> None: ...


class _Done:
    """What is awaited where nothing is left to be done."""

    def __await__(self) -> Generator[None, None, None]:
        return iter(())  # type: ignore[return-value]


_DONE = _Done()


def declared_limit(endpoint: object) -> timeout | None:
    """What an endpoint was decorated with."""
    declared = getattr(endpoint, _MARK, None)
    return declared if isinstance(declared, timeout) else None


def _declare(seconds: float | None) -> None:
    global shortest
    shortest = min(shortest, math.inf if seconds is None else seconds)


def _warn(label: str) -> None:
    if label not in _warned and len(_warned) < 1000:
        _warned.add(label)
        logger.warning(
            "@timeout has no effect on %s: no TimeoutMiddleware guards the application; "
            "pass timeout= to asyncguard.install()",
            label,
        )
