"""Every kind of factory, and how what it makes is closed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio
import pytest

from asyncguard import open_shared, shared
from asyncguard.clients._factory import CLOSERS

pytestmark = pytest.mark.anyio


class Noting:
    """Notes what is called on it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[str] = []
        self.given = (args, kwargs)


def with_method(name: str, *, awaited: bool = True) -> type[Noting]:
    async def awaited_method(self: Noting, *error: object) -> Noting:
        self.calls.append(name)
        await anyio.sleep(0)
        return self

    def method(self: Noting, *error: object) -> Noting | None:
        self.calls.append(name)
        return self if name == "__enter__" else None

    return type("Thing", (Noting,), {name: awaited_method if awaited else method})


def with_methods(*names: str, awaited: bool = True) -> type[Noting]:
    bases = tuple(with_method(name, awaited=awaited) for name in names)
    return type("Thing", bases, {})


async def calls_on(factory: Any, *args: Any, **kwargs: Any) -> list[str]:
    resource: Any = shared(factory, *args, **kwargs)
    async with open_shared(resource):
        thing: Any = resource.get()
        thing.calls.append("used")
    calls: list[str] = thing.calls
    return calls


@pytest.mark.parametrize("awaited", [True, False])
@pytest.mark.parametrize("name", CLOSERS)
async def test_it_is_closed_by_the_method_that_it_has(name: str, awaited: bool) -> None:
    assert await calls_on(with_methods(name, awaited=awaited)) == ["used", name]


async def test_it_is_closed_by_the_first_that_it_has() -> None:
    assert await calls_on(with_methods(*CLOSERS)) == ["used", "aclose"]
    assert await calls_on(with_methods(*CLOSERS[1:])) == ["used", "close"]
    assert await calls_on(with_methods(*CLOSERS[2:])) == ["used", "dispose"]


async def test_what_can_be_entered_is_entered() -> None:
    kind = with_methods("__aenter__", "__aexit__", "aclose", "close")
    assert await calls_on(kind) == ["__aenter__", "used", "__aexit__"]


async def test_what_can_only_be_entered_here_is_entered_here() -> None:
    kind = with_methods("__enter__", "__exit__", awaited=False)
    assert await calls_on(kind) == ["__enter__", "used", "__exit__"]


async def test_what_can_be_closed_is_closed_rather_than_left() -> None:
    """As a connection of `sqlite3`, whose end of the block is that of a transaction."""
    kind = with_methods("__enter__", "__exit__", "close", awaited=False)
    assert await calls_on(kind) == ["used", "close"]


async def test_what_cannot_be_closed_is_left_alone() -> None:
    assert await calls_on(Noting) == ["used"]


async def test_an_attribute_of_any_name_is_no_method() -> None:
    """As those of MongoDB's clients are: databases, which can be called only to be told off."""

    class Database:
        def __call__(self) -> None:
            raise TypeError("'Database' object is not callable")

    class Client(with_methods("close", awaited=False)):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Database:
            return Database()

    assert await calls_on(Client) == ["used", "close"]


async def test_it_may_be_closed_through_a_proxy() -> None:
    class Proxy:
        def __init__(self) -> None:
            self._thing = with_methods("close")()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._thing, name)

    assert await calls_on(Proxy) == ["used", "close"]


async def test_what_is_not_callable_closes_nothing() -> None:
    kind = type("Thing", (Noting,), {"close": True, "dispose": lambda self: self.calls.append("dispose")})
    assert await calls_on(kind) == ["used", "dispose"]


async def test_arguments_are_passed_on() -> None:
    resource: Any = shared(partial(Noting, 1, name="its own"), 2, three=3, name="resource")
    async with open_shared(resource):
        assert resource.get().given == ((1, 2), {"three": 3, "name": "its own"})
    assert resource.name == "resource"


async def test_a_coroutine_function_is_awaited_and_its_result_entered() -> None:
    kind = with_methods("__aenter__", "__aexit__")

    async def make() -> Noting:
        await anyio.sleep(0)
        return kind()

    assert await calls_on(make) == ["__aenter__", "used", "__aexit__"]
    assert await calls_on(lambda: make()) == ["__aenter__", "used", "__aexit__"]


async def test_a_pool_that_can_be_awaited_and_entered_is_entered() -> None:
    class Pool(with_methods("__aenter__", "__aexit__")):  # type: ignore[misc]
        def __await__(self) -> Any:
            raise AssertionError("entering it does this")

    assert await calls_on(Pool) == ["__aenter__", "used", "__aexit__"]


@pytest.mark.parametrize("wrap", [lambda function: function, partial], ids=["bare", "partial"])
async def test_functions_that_yield(wrap: Any) -> None:
    async def generated() -> AsyncIterator[Noting]:
        thing = Noting()
        yield thing
        await anyio.sleep(0)
        thing.calls.append("closed")

    def generated_here() -> Iterator[Noting]:
        thing = Noting()
        yield thing
        thing.calls.append("closed")

    for function in (
        generated,
        generated_here,
        asynccontextmanager(generated),
        contextmanager(generated_here),
    ):
        assert await calls_on(wrap(function)) == ["used", "closed"]


async def test_it_is_made_on_the_running_loop() -> None:
    def make() -> Noting:
        assert anyio.get_current_task().name == "asyncguard-shared-resource"
        return Noting()

    assert await calls_on(make, name="resource") == ["used"]


async def test_what_is_none_may_be_shared() -> None:
    async def live() -> AsyncIterator[None]:
        yield

    resource = shared(live)
    async with open_shared(resource):
        assert resource.get() is None
