"""Which functions a worker can find again, and where."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import operator
import pickle
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncguard.errors import NotOffloadable
from asyncguard.offloading._address import Address, address_of, label_of, resolve, verify


def plain(x: int) -> int:
    return x + 1


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def rude(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(*args)

    return call


nameless = lambda x: x  # noqa: E731

originals: dict[str, Callable[..., Any]] = {}


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what was decorated, as `offload` does."""
    originals[function.__name__] = function
    return function


@logged
@logged
@kept
def twice(x: int) -> int:
    return x * 2


@rude
@kept
def lost(x: int) -> int:
    return x


@functools.cache
@kept
def remembered(x: int) -> int:
    return -x


class Shop:
    def method(self, x: int) -> tuple[str, int]:
        return type(self).__name__, x

    @logged
    @kept
    def decorated(self, x: int) -> tuple[str, int]:
        return type(self).__name__, x

    @staticmethod
    def static(x: int) -> int:
        return x * 10

    @classmethod
    def made(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    class Inner:
        def method(self) -> str:
            return "inner"

    def __call__(self) -> None: ...


class Stall(Shop):
    pass


async def coroutine_function() -> None: ...


def generator_function() -> Iterator[int]:
    yield 1


async def asynchronous_generator_function() -> AsyncIterator[int]:
    yield 1


def found(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a worker finds, told of the address by pickle."""
    address = verify(function, address_of(function))
    return resolve(pickle.loads(pickle.dumps(address)))


@pytest.mark.parametrize(
    "function",
    [
        plain,
        Shop.method,
        Shop.static,
        Shop.Inner.method,
        Shop,
        len,
        math.sqrt,
        operator.add,
        json.dumps,
        str.upper,
        Path.exists,
    ],
    ids=lambda function: str(function.__qualname__),
)
def test_a_function_is_found_by_its_name(function: Callable[..., Any]) -> None:
    assert found(function) is function


@pytest.mark.parametrize("function", [Shop.made, Stall.made, dict.fromkeys], ids=repr)
def test_a_class_method_is_found_with_its_class(function: Callable[..., Any]) -> None:
    assert found(function) == function
    assert found(function).__self__ is function.__self__  # type: ignore[attr-defined]


def test_nothing_is_looked_up_for_an_address() -> None:
    def other() -> None: ...

    other.__module__, other.__qualname__ = "no_such_module", "Not.there"
    assert address_of(other) == Address("no_such_module", "Not.there", 0)
    assert address_of(other).label == "no_such_module.Not.there"


def test_what_was_decorated_is_found_along_the_decorators() -> None:
    assert verify(originals["twice"], address_of(originals["twice"])) == Address(__name__, "twice", 2)
    assert found(originals["twice"]) is originals["twice"]
    assert found(twice) is twice
    assert found(originals["remembered"]) is originals["remembered"]
    assert found(remembered) is remembered


def test_a_method_that_was_decorated_is_found_in_its_class() -> None:
    assert found(originals["decorated"]) is originals["decorated"]


def test_below_a_static_or_class_method_is_its_function() -> None:
    function = Shop.made.__func__  # type: ignore[attr-defined]
    assert verify(function, address_of(function)) == Address(__name__, "Shop.made", 1)
    assert found(function) is function
    assert found(function)(Stall, 1) == ("Stall", 1)


@pytest.mark.parametrize(
    ("function", "reason", "cure"),
    [
        (nameless, "a lambda has no name", "Define it with `def`"),
        (rude(plain), "made anew whenever the function around it is called", "Move it to the top level"),
        (functools.partial(plain, 1), "a partial of .*plain", "pass it all its arguments in the call"),
        (Shop().method, "bound to an instance", "Decorate the method in its class"),
        ("text".upper, "bound to an instance", "takes the instance as an argument"),
        ((1).__add__, "bound to an instance", "takes the instance as an argument"),
        (random.random, "bound to an instance", "takes the instance as an argument"),
        (coroutine_function, "a coroutine function", "Await in the caller"),
        (functools.partial(coroutine_function), "a partial of .*coroutine_function", "Offload the function"),
        (generator_function, "a generator function", "Return a list"),
        (asynchronous_generator_function, "a generator function", "Return a list"),
        (Shop(), "an object of type Shop .* has no name", "Offload a function that calls it"),
        (operator.itemgetter(1), "an object of type itemgetter .* has no name", "Offload a function"),
        (17, "an object of type int .* cannot be called", ""),
        (None, "an object of type NoneType .* cannot be called", ""),
    ],
)
def test_what_cannot_be_found_again_is_refused_with_the_reason_and_the_cure(
    function: Any, reason: str, cure: str
) -> None:
    with pytest.raises(NotOffloadable, match=rf"(?s){reason}.*{cure}"):
        address_of(function)


def test_a_refusal_shows_no_value() -> None:
    with pytest.raises(NotOffloadable) as caught:
        address_of(functools.partial(nameless, "secret"))
    assert "secret" not in str(caught.value)


def test_a_function_without_a_module_is_refused() -> None:
    def other() -> None: ...

    other.__qualname__, other.__module__ = "other", None  # type: ignore[assignment]
    with pytest.raises(NotOffloadable, match="other cannot be offloaded: it does not say in which module"):
        address_of(other)


@pytest.mark.parametrize(
    ("attributes", "is_found"),
    [
        ({"__spec__": None, "__file__": __file__}, True),
        ({"__spec__": object()}, True),
        ({"__spec__": None}, False),
        ({"__spec__": None, "__file__": "<stdin>"}, False),
    ],
)
def test_what_was_typed_at_a_prompt_cannot_be_found(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], is_found: bool
) -> None:
    main = ModuleType("__main__")
    vars(main).update(attributes)
    monkeypatch.setitem(sys.modules, "__main__", main)

    def job() -> None: ...

    job.__module__, job.__qualname__ = "__main__", "job"
    if is_found:
        assert address_of(job) == Address("__main__", "job", 0)
        main.job = job  # type: ignore[attr-defined]
        assert found(job) is job
    else:
        with pytest.raises(
            NotOffloadable, match=r"__main__\.job .* not defined in a file.* Put it into a module"
        ):
            address_of(job)


# -- the name is looked up later --------------------------------------------------------------------


def test_a_decorator_that_hides_the_function_is_found_out() -> None:
    address = address_of(originals["lost"])
    with pytest.raises(NotOffloadable, match=r"lost in .* is something else\..* functools\.wraps"):
        verify(originals["lost"], address)


def test_a_name_that_is_not_there_is_found_out() -> None:
    with pytest.raises(NotOffloadable, match=r"there is no gone in .*test_address"):
        verify(plain, Address(__name__, "gone"))
    with pytest.raises(NotOffloadable, match=r"there is no Gone\.method in"):
        verify(plain, Address(__name__, "Gone.method"))


def test_a_module_that_cannot_be_imported_is_found_out() -> None:
    with pytest.raises(NotOffloadable, match=r"could not import no_such_module \(No module named"):
        verify(plain, Address("no_such_module", "f"))


def test_decorators_in_a_circle_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def one() -> None: ...

    one.__wrapped__ = one  # type: ignore[attr-defined]
    monkeypatch.setitem(globals(), "circle", one)
    with pytest.raises(NotOffloadable, match="something else"):
        verify(plain, Address(__name__, "circle"))


# -- in a worker --------------------------------------------------------------------------------------


def test_a_module_is_imported_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asyncguard_test_late.py").write_text("def f():\n    return 'late'\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert resolve(Address("asyncguard_test_late", "f", 0))() == "late"
    finally:
        sys.modules.pop("asyncguard_test_late", None)


def test_what_an_import_raises_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asyncguard_test_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        resolve(Address("asyncguard_test_broken", "f", 0))


@pytest.mark.parametrize(
    ("qualname", "unwrap", "name"),
    [
        ("gone", 0, "no function gone in"),
        ("Shop.gone", 0, r"no function Shop\.gone in"),
        ("plain", 1, "no function plain, 1 decorators down in"),
        ("originals", 0, "no function originals in"),
    ],
)
def test_what_is_not_there_is_said_clearly(qualname: str, unwrap: int, name: str) -> None:
    with pytest.raises(LookupError, match=name):
        resolve(Address(__name__, qualname, unwrap))


def test_a_label_is_there_for_anything() -> None:
    assert label_of(plain).label == f"{__name__}.plain"
    assert label_of(functools.partial(plain)).label == "functools.partial"
    assert label_of(asyncio.run).label == "asyncio.runners.run"
