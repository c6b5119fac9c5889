"""What `offload` makes of functions and methods, what it refuses."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.lowlevel
import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

from asyncguard.errors import NotOffloadable
from asyncguard.offloading import _pools
from asyncguard.offloading._address import Address, resolve
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._offload import Offloaded, offload

P = ParamSpec("P")
R = TypeVar("R")

variable: ContextVar[str] = ContextVar("variable", default="")


class FakeRunner:
    """Runs calls here, by way of pickle and the address, and keeps what it was told."""

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.options: list[CallOptions] = []

    async def run_call(
        self,
        address: Address,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Any:
        self.addresses.append(address)
        self.options.append(options)
        await anyio.lowlevel.checkpoint()
        found = resolve(address)
        assert found is function
        args, kwargs = pickle.loads(pickle.dumps((args, kwargs)))
        return found(*args, **kwargs)


runner = FakeRunner()


@offload(pool=runner)
def add(x: int, y: int = 1) -> int:
    """Add them."""
    return x + y


@offload
def in_any_pool(x: int) -> int:
    return -x


def logged(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return call


@logged
@offload(pool=runner, timeout=5)
def below_another(x: int) -> int:
    return x * 3


class Shop:
    def __init__(self, name: str) -> None:
        self.name = name

    @offload(pool=runner)
    def sell(self, what: str, number: int = 1) -> str:
        """Sell it."""
        return f"{self.name} sells {number} {what}"

    @offload(pool=runner)
    @staticmethod
    def double(x: int) -> int:
        return x * 2

    @offload(pool=runner)
    @classmethod
    def kind(cls, what: str) -> str:
        return f"{cls.__name__} of {what}"

    @staticmethod
    @offload(pool=runner)
    def triple(x: int) -> int:
        return x * 3

    @classmethod
    @offload(pool=runner)
    def sort(cls, what: str) -> str:
        return f"{cls.__name__} for {what}"


class Stall(Shop):
    pass


# Mypy takes no notice of a `@staticmethod` or `@classmethod` under another decorator.
AnyShop: Any = Shop
AnyStall: Any = Stall


# -- calls --------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_call_is_awaited() -> None:
    assert await add(1) == 2
    assert await add(1, y=5) == 6
    assert runner.addresses[-1] == Address(__name__, "add", 1)
    assert runner.options[-1] == CallOptions()


def test_inline_is_the_plain_function() -> None:
    assert add.inline(1, y=2) == 3
    assert Shop("corner").sell.inline("tea") == "corner sells 1 tea"
    assert Shop.sell.inline(Shop("corner"), "tea") == "corner sells 1 tea"
    assert Shop.double.inline(4) == 8
    assert AnyStall.kind.inline("fruit") == "Stall of fruit"


@pytest.mark.anyio
async def test_without_a_pool_of_its_own_it_runs_in_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = FakeRunner()
    monkeypatch.setattr(_pools, "current", lambda: current)
    assert await in_any_pool(3) == -3
    assert await in_any_pool.using(timeout=2)(4) == -4
    assert await add.using(pool=None)(4) == 5
    assert [options.timeout for options in current.options] == [None, 2, None]


@pytest.mark.anyio
async def test_what_the_function_raises_is_raised() -> None:
    with pytest.raises(TypeError, match="can only concatenate"):
        await add("x")  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_another_decorator_above_it_is_no_hindrance() -> None:
    assert await below_another(2) == 6
    assert runner.addresses[-1] == Address(__name__, "below_another", 2)


@pytest.mark.anyio
async def test_a_name_that_leads_elsewhere_is_refused_at_the_first_call() -> None:
    def other(x: int) -> int:
        return x

    other.__qualname__ = "add"
    with pytest.raises(NotOffloadable, match=r"add in .* is something else"):
        await offload(pool=runner)(other)(1)


# -- methods -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_instance_of_a_method_goes_along() -> None:
    assert await Shop("corner").sell("tea", number=2) == "corner sells 2 tea"
    assert await Stall("market").sell.using(timeout=1)("tea") == "market sells 1 tea"
    assert await Shop.sell(Shop("corner"), "tea") == "corner sells 1 tea"
    assert runner.addresses[-1] == Address(__name__, "Shop.sell", 1)
    assert [r async for r in Shop("corner").sell.map(["tea", "milk"])] == [
        "corner sells 1 tea",
        "corner sells 1 milk",
    ]


@pytest.mark.anyio
async def test_static_methods() -> None:
    assert await AnyShop.double(2) == await AnyShop("corner").double(2) == 4
    assert await AnyShop.triple(2) == await AnyShop("corner").triple(2) == 6
    assert [r async for r in AnyShop.double.map([1, 2])] == [2, 4]


@pytest.mark.anyio
async def test_class_methods() -> None:
    assert await AnyShop.kind("tea") == await AnyShop("corner").kind("tea") == "Shop of tea"
    assert (
        await AnyStall.kind("tea") == await AnyStall("market").kind.using(timeout=3)("tea") == "Stall of tea"
    )
    assert await AnyStall.sort("tea") == await AnyStall("market").sort("tea") == "Stall for tea"
    assert [r async for r in AnyStall.kind.map(["tea"])] == ["Stall of tea"]


# -- what it looks like ----------------------------------------------------------------------------------


def test_it_has_the_name_the_documentation_and_the_signature_of_the_function() -> None:
    assert (add.__name__, add.__qualname__, add.__module__, add.__doc__) == (
        "add",
        "add",
        __name__,
        "Add them.",
    )
    assert str(inspect.signature(add)) == "(x: 'int', y: 'int' = 1) -> 'int'"
    assert add.__wrapped__(1) == 2
    assert repr(add) == f"<offloaded {__name__}.add>"
    method = Shop("corner").sell
    assert (method.__name__, method.__doc__) == ("sell", "Sell it.")
    assert str(inspect.signature(method)) == "(what: 'str', number: 'int' = 1) -> 'str'"
    assert str(inspect.signature(Stall.kind)) == "(what: 'str') -> 'str'"


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="nothing else than a function could say so before 3.12"
)
def test_it_is_taken_for_a_coroutine_function() -> None:
    assert inspect.iscoroutinefunction(add)


def test_fastapi_takes_it_for_an_endpoint_and_a_dependency() -> None:
    app = FastAPI()
    app.get("/add")(add)

    @app.get("/depends")
    async def depends(result: int = Depends(add)) -> int:
        return result

    with TestClient(app) as client:
        assert client.get("/add", params={"x": 2, "y": 3}).json() == 5
        assert client.get("/depends", params={"x": 2}).json() == 3


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_by_its_name(protocol: int) -> None:
    for offloaded in (add, Shop.sell, Shop.double):
        assert pickle.loads(pickle.dumps(offloaded, protocol)) is offloaded


@pytest.mark.anyio
async def test_what_has_no_name_is_pickled_with_its_options() -> None:
    changed = pickle.loads(pickle.dumps(in_any_pool.using(timeout=7, priority=2)))
    used = FakeRunner()
    assert await changed.using(pool=used)(3) == -3
    assert used.options == [CallOptions(timeout=7, priority=2)]
    math_sqrt = pickle.loads(pickle.dumps(offload(math.sqrt)))
    assert await math_sqrt.using(pool=used)(4.0) == 2
    sell = pickle.loads(pickle.dumps(Shop("corner").sell.using(pool=None)))
    assert await sell.using(pool=used)("tea") == "corner sells 1 tea"
    kind = pickle.loads(pickle.dumps(Stall.kind.using(pool=None)))
    assert kind.inline("tea") == "Stall of tea"


def test_what_no_name_leads_to_is_not_pickled() -> None:
    with pytest.raises(NotOffloadable, match="a lambda has no name"):
        pickle.dumps(offload(backend="thread")(lambda x: x))


# -- options ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_options_reach_the_runner() -> None:
    first, second = FakeRunner(), FakeRunner()
    made = offload(timeout=1, on_cancel="kill", context=[variable], pool=first)(math.sqrt)
    assert await made(4.0) == 2
    assert await made.using(timeout=None, priority=3)(4.0) == 2
    assert await made.using(priority=3).using(on_cancel="abandon", pool=second)(4.0) == 2
    assert first.options == [
        CallOptions(1.0, "kill", 0, (variable,)),
        CallOptions(None, "kill", 3, (variable,)),
    ]
    assert second.options == [CallOptions(1.0, "abandon", 3, (variable,))]
    assert first.addresses[0] == Address("math", "sqrt", 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": 0}, ValueError, r"timeout must be .* greater than 0, not 0"),
        ({"timeout": "1"}, TypeError, r"timeout must be a number of seconds, not '1'"),
        ({"backend": "fiber"}, ValueError, r"backend must be 'process' or .* not 'fiber'"),
        ({"backend": ThreadPoolExecutor}, ValueError, r"or a concurrent\.futures\.Executor, not <class"),
        ({"on_cancel": "stop"}, ValueError, r"on_cancel must be 'raise' or 'kill' or 'abandon', not 'stop'"),
        (
            {"context": variable},
            TypeError,
            r"context must be a sequence of context variables, not <ContextVar",
        ),
        ({"context": ["user"]}, TypeError, r"context must be context variables, not 'user'"),
        ({"pool": 4}, TypeError, r"pool must be an OffloadPool or None, not 4"),
        ({"pool": FakeRunner}, TypeError, r"pool must be an OffloadPool or None, not <class"),
        ({"pool": runner, "backend": "thread"}, ValueError, r'pool=\.\.\. needs backend="process"'),
        (
            {"on_cancel": "raise", "backend": "thread"},
            ValueError,
            r"on_cancel='raise' needs .*\"abandon\" is all",
        ),
        ({"on_cancel": "kill", "backend": "thread"}, ValueError, r"on_cancel='kill' needs"),
    ],
    ids=str,
)
def test_bad_options_are_refused_at_once(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}" if not message.startswith("or") else message):
        offload(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": -1}, ValueError, "timeout must be"),
        ({"priority": "high"}, TypeError, "priority must be an integer, not 'high'"),
        ({"priority": True}, TypeError, "priority must be an integer, not True"),
        ({"on_cancel": "stop"}, ValueError, "on_cancel must be"),
        ({"pool": 4}, TypeError, "pool must be"),
    ],
    ids=str,
)
def test_bad_options_of_using_are_refused_at_once(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        add.using(**options)


def test_what_goes_with_processes_alone_is_refused_elsewhere() -> None:
    in_thread = offload(backend="thread")(math.sqrt)
    with pytest.raises(ValueError, match=r'^priority=1 needs backend="process"'):
        in_thread.using(priority=1)
    with pytest.raises(ValueError, match=r"^on_cancel='kill' needs"):
        in_thread.using(on_cancel="kill")
    with pytest.raises(ValueError, match=r"^pool=\.\.\. needs"):
        in_thread.using(pool=runner)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="they are there")
def test_interpreters_need_a_newer_python() -> None:
    with pytest.raises(ValueError, match=r"needs Python 3\.14 or newer, and this is 3\.1\d: use \"process\""):
        offload(backend="interpreter")


def test_what_no_worker_could_find_is_refused_when_it_is_decorated() -> None:
    with pytest.raises(NotOffloadable, match="a lambda has no name"):
        offload(lambda x: x)
    with pytest.raises(NotOffloadable, match="offloaded already"):
        offload(add)
    with pytest.raises(NotOffloadable, match="coroutine function"):
        offload(backend="thread")(asyncio.sleep)


def test_offloaded_is_what_it_makes() -> None:
    assert isinstance(add, Offloaded)
    assert isinstance(Shop.double, Offloaded)
    assert isinstance(Shop.kind, Offloaded)
