"""What a call says arrives as it was, and what cannot be rebuilt is named."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncguard.offloading._address import Address
from asyncguard.offloading._payload import Body, UnpackError
from asyncguard.offloading._summons import Summons, Variable, pack_call, read, variables_of
from asyncguard.offloading._wire import Decoder, Kind, encode
from tests.offloading.chores import Unbuildable, request

ADDRESS = Address("module", "Class.method", 2)
REQUEST = Variable("tests.offloading.chores", "request", "r1")


def sent(*args: Any, context: tuple[Variable, ...] = (), **kwargs: Any) -> Body:
    pieces, descriptors = encode(Kind.CALL, 1, pack_call(ADDRESS, args, kwargs, context))
    ((_, _, body),) = Decoder().feed(b"".join(pieces), descriptors)
    return body


def test_a_call_without_anything() -> None:
    assert read(sent()) == Summons(ADDRESS, [], (), {})


@given(
    args=st.lists(st.integers() | st.binary(max_size=100_000), max_size=5),
    kwargs=st.dictionaries(st.text(), st.none() | st.text(), max_size=5),
    has_context=st.booleans(),
)
def test_calls(args: list[Any], kwargs: dict[str, Any], has_context: bool) -> None:
    packed = pack_call(ADDRESS, tuple(args), kwargs, [REQUEST] * has_context)
    pieces, descriptors = encode(Kind.CALL, 1, packed)
    ((_, _, body),) = Decoder().feed(b"".join(pieces), descriptors)
    summons = read(body)
    assert summons._replace(args=[*summons.args]) == Summons(
        ADDRESS, [(request, "r1")] * has_context, args, kwargs
    )


def test_what_is_the_same_object_is_one_afterwards() -> None:
    shared = [1]
    summons = read(sent(shared, shared, key=shared))
    assert summons.args[0] is summons.args[1] is summons.kwargs["key"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (lambda: sent(Unbuildable()), "argument 1"),
        (lambda: sent(1, 2, Unbuildable(), 4), "argument 3"),
        (lambda: sent(1, b=1, c=Unbuildable()), "argument 'c'"),
        (lambda: sent(context=(REQUEST._replace(value=Unbuildable()),)), "context variable 'request'"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(body: Any, name: str) -> None:
    with pytest.raises(UnpackError, match="cannot be rebuilt") as caught:
        read(body())
    assert caught.value.name == name


nobody: ContextVar[str] = ContextVar("nobody")


def test_context_variables_are_found_where_they_are() -> None:
    token = request.set("r1")
    try:
        (found,) = variables_of([request])
        # Every module that has imported it is a place to find it; which ones there are depends on what has
        # been imported so far.
        assert getattr(sys.modules[found.module], found.name) is request
        assert found.value == "r1"
        assert variables_of([request]) == [found]
        assert variables_of([request], __name__) == [REQUEST._replace(module=__name__)]
    finally:
        request.reset(token)


def test_of_modules_that_share_a_context_variable_the_latest_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a module imports comes after it."""
    shared: ContextVar[int] = ContextVar("shared", default=1)
    for name in ("_its_importer", "_its_home"):
        module = ModuleType(name)
        module.shared = shared  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    assert variables_of([shared]) == [Variable("_its_home", "shared", 1)]
    assert variables_of([shared], "_its_importer") == [Variable("_its_importer", "shared", 1)]


def test_a_context_variable_without_a_value_is_left_out() -> None:
    assert variables_of([nobody]) == []


def test_a_context_variable_without_a_home() -> None:
    hidden: ContextVar[int] = ContextVar("hidden", default=1)
    with pytest.raises(LookupError, match="'hidden' is at the top of no module"):
        variables_of([hidden])


@pytest.mark.parametrize("name", ["gone", "not_a_variable"])
def test_context_variables_that_are_not_there(name: str) -> None:
    with pytest.raises(LookupError, match=f"there is no context variable {name} in tests.offloading.chores"):
        read(sent(context=(REQUEST._replace(name=name),)))


def test_numpy_that_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, so that nothing is in it yet."""
    monkeypatch.setitem(sys.modules, "numpy", ModuleType("numpy"))
    assert read(sent([1])).args == [[1]]
