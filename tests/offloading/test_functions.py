"""Functions of all kinds, and what they raise, in real worker processes."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import anyio
import pytest

from asyncguard import OffloadPool, PayloadError, offload

pytestmark = pytest.mark.anyio

PATIENCE = 30.0


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args), function(*args)

    return call


@offload
@twice
def decorated(x: int) -> tuple[int, int]:
    return x, os.getpid()


class Shop:
    def __init__(self, name: str) -> None:
        self.name = name

    @offload
    def sell(self, what: str) -> tuple[str, int]:
        return f"{self.name} sells {what}", os.getpid()

    @offload
    @staticmethod
    def double(x: int) -> tuple[int, int]:
        return 2 * x, os.getpid()

    @classmethod
    @offload
    def kind(cls) -> tuple[str, int]:
        return cls.__name__, os.getpid()


class Stall(Shop):
    pass


AnyStall: Any = Stall


class Fussy(Exception):
    """Cannot be rebuilt."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("fussy")

    def __reduce__(self) -> Any:
        return Fussy, (1,)


def raise_fussy() -> NoReturn:
    raise Fussy(1, 2)


def raise_holding() -> NoReturn:
    """It cannot be pickled."""
    error = ValueError("held")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def raise_group() -> NoReturn:
    error = ExceptionGroup("several", [KeyError("one"), Fussy(1, 2)])
    error.add_note("a note")
    raise error


@pytest.fixture
async def pool() -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1) as pool:
            yield pool


async def test_functions_and_methods_are_found_where_they_are(pool: OffloadPool) -> None:
    worker = await pool.run(os.getpid)
    assert await decorated(3) == ((3, worker), (3, worker))
    assert await Shop("corner").sell("tea") == ("corner sells tea", worker)
    assert await AnyStall.double(2) == (4, worker)
    assert await AnyStall.kind() == ("Stall", worker)
    assert [found async for found in Shop("corner").sell.map(["a", "b"])] == [
        ("corner sells a", worker),
        ("corner sells b", worker),
    ]


async def test_exceptions_that_cannot_travel_cost_no_worker(pool: OffloadPool) -> None:
    worker = await pool.run(os.getpid)
    with pytest.raises(PayloadError, match=r"the function raised ValueError: held\n.*cannot pickle"):
        await pool.run(raise_holding)
    with pytest.raises(
        PayloadError, match=r"the function raised .*Fussy: fussy\n.*missing 1 required"
    ) as caught:
        await pool.run(raise_fussy)
    assert "in raise_fussy" in str(caught.value.__cause__)
    with pytest.raises(ExceptionGroup, match="several") as group:
        await pool.run(raise_group)
    assert [type(member) for member in group.value.exceptions] == [KeyError, PayloadError]
    assert group.value.__notes__ == ["a note"]
    assert "in raise_group" in str(group.value.__cause__)
    assert (await pool.run(os.getpid), pool.stats.crashes) == (worker, 0)
