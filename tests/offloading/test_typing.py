# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers know of offloaded functions.

They read this file, mypy in ``scripts/lint``: what they have to refuse has a comment that they would
refuse themselves if it were needless.
"""

from __future__ import annotations

from typing import assert_type

import pytest

from asyncguard.offloading._offload import Offloaded, offload


@offload
def length(text: str, *, twice: bool = False) -> int:
    return len(text) * (2 if twice else 1)


@offload(timeout=1, backend="thread")
def halved(number: int, by: float = 2) -> float:
    return number / by


@offload(backend="thread")
def pair(one: str, two: int) -> tuple[str, int]:
    return one, two


class Shop:
    @offload(backend="thread")
    def price(self, what: str) -> int:
        return len(what)

    @offload(backend="thread")
    @staticmethod
    def total(number: int) -> float:
        return number / 2


@pytest.mark.anyio
async def test_a_call_has_the_arguments_and_the_result_of_the_function() -> None:
    assert_type(await halved(1), float)
    assert_type(await halved.using(timeout=None)(number=1, by=3), float)
    assert_type(halved.inline(1), float)
    assert_type(length.inline("a", twice=True), int)
    assert_type(await Shop().price("a"), int)
    assert_type(Shop().price.inline("a"), int)
    assert_type(await Shop.price(Shop(), "a"), int)
    assert_type(await Shop.total(1), float)
    async for result in halved.map([1, 2], limit=2):
        assert_type(result, float)
    async for price in Shop().price.map(["a"]):
        assert_type(price, int)
    kept: Offloaded[[str, int], tuple[str, int]] = pair
    assert_type(await kept("a", 1), tuple[str, int])


async def refused() -> None:
    await length(1)  # type: ignore[arg-type]
    await length("a", True)  # type: ignore[call-arg]
    await length("a", once=True)  # type: ignore[call-arg]
    length.inline(1)  # type: ignore[arg-type]
    await halved.using(timeout=1)("a")  # type: ignore[arg-type]
    halved.using(on_cancel="stop")  # type: ignore[arg-type]
    await Shop().price(1)  # type: ignore[arg-type]
    halved.map(["a"])  # type: ignore[list-item]
    offload(backend="fiber")  # type: ignore[call-overload]
