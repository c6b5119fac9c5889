"""Where a function is found again: by a name in a module, which is all that a worker is told of it.

A decorated function is not what its name leads to: that is what the decorators made of it. Hence the steps
along ``__wrapped__``. How many they are is known when the module is finished, so the name is looked up when
the function is first called (`verify`), not when it is decorated (`address_of`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import (
    BuiltinMethodType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple

from asyncguard.errors import NotOffloadable

__all__ = ["OFFLOADED", "Address", "address_of", "checked_function", "label_of", "resolve", "verify"]

OFFLOADED = "_is_offloaded"
"""An attribute of classes whose instances stand for offloaded functions."""
_MOST_STEPS = 100
"""More decorators than anybody has; what goes round in a circle ends here."""


class Address(NamedTuple):
    """Where a function is found.

    Attributes:
        module: The name of its module.
        qualname: Its name there, with those of the classes around it.
        unwrap: How many steps along ``__wrapped__`` lead from what has this name to the function.
    """

    module: str
    qualname: str
    unwrap: int = 0

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.module}.{self.qualname}"


def checked_function(function: Any) -> None:
    """Refuse what gives no result when it is called in a worker, wherever it is found.

    Raises:
        NotOffloadable: If it cannot be called, is a coroutine function or a generator function.
    """
    name = _name_of(function)
    if getattr(type(function), OFFLOADED, False):
        raise NotOffloadable(
            f"{name} is offloaded already: await it, or give it other options by its `using`"
        )
    if not callable(function):
        raise NotOffloadable(f"{name} cannot be offloaded: it cannot be called")
    if inspect.iscoroutinefunction(function):
        raise NotOffloadable(
            f"{name} cannot be offloaded: it is a coroutine function, and a worker runs no event loop. "
            "Await in the caller, and offload a plain function with the work between two awaits"
        )
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise NotOffloadable(
            f"{name} cannot be offloaded: it is a generator function, and a generator cannot leave its "
            "worker. Return a list, or offload the work for one item and use map()"
        )


def address_of(function: Any) -> Address:
    """Where a function will be found, if its name leads to it once its module is finished.

    Nothing is looked up: see `verify`.

    Raises:
        NotOffloadable: If no name can lead to it, or a worker could do nothing with it.
    """
    if isinstance(function, functools.partial):
        raise NotOffloadable(
            f"a partial of {_name_of(function.func)} cannot be offloaded: it has no name by which a worker "
            "could find it. Offload the function, and pass it all its arguments in the call"
        )
    checked_function(function)
    owner = getattr(function, "__self__", None)
    if isinstance(function, MethodType | BuiltinMethodType | MethodWrapperType):
        if isinstance(owner, type):
            return _refuse_nameless(Address(owner.__module__, f"{owner.__qualname__}.{function.__name__}"))
        if owner is not None and not isinstance(owner, ModuleType):
            raise NotOffloadable(
                f"{_name_of(function)} cannot be offloaded: it is bound to an instance, which no name leads "
                "to. Decorate the method in its class, so that the instance travels with each call, "
                "or offload a function that takes the instance as an argument"
            )
    # Methods of built-in classes name the class alone, and that has a module.
    module = getattr(function, "__module__", None) or getattr(
        getattr(function, "__objclass__", None), "__module__", None
    )
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(qualname, str):
        raise NotOffloadable(
            f"{_name_of(function)} cannot be offloaded: it has no name by which a worker could find it. "
            "Offload a function that calls it"
        )
    if not isinstance(module, str):
        raise NotOffloadable(
            f"{qualname} cannot be offloaded: it does not say in which module a worker could find it. "
            "Offload a function of your own that calls it"
        )
    return _refuse_nameless(Address(module, qualname))


def label_of(function: Any) -> Address:
    """What to call a function that nobody has to find again."""
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    return Address(
        module if isinstance(module, str) else type(function).__module__,
        qualname if isinstance(qualname, str) else type(function).__qualname__,
    )


def verify(function: Any, address: Address) -> Address:
    """The whole address of a function: its name leads to it, by so many steps.

    Args:
        function: The function.
        address: What `address_of` said.

    Raises:
        NotOffloadable: If the name leads elsewhere, or nowhere.
    """
    module = sys.modules.get(address.module)
    try:
        if module is None:
            module = importlib.import_module(address.module)
        for steps, found in enumerate(_chain(module, address.qualname)):
            if _is_same(found, function):
                return address._replace(unwrap=steps)
    except AttributeError:
        raise NotOffloadable(
            f"{address.label} cannot be offloaded: there is no {address.qualname} in {address.module}, "
            "so that a worker could not find it. Keep the function under the name that it was defined by"
        ) from None
    except ImportError as error:
        raise NotOffloadable(
            f"{address.label} cannot be offloaded: a worker could not import {address.module} ({error})"
        ) from error
    raise NotOffloadable(
        f"{address.label} cannot be offloaded: {address.qualname} in {address.module} is something else. "
        "Either the name was given away again, or a decorator above @offload does not use functools.wraps"
    )


def resolve(address: Address) -> Callable[..., Any]:
    """The function at an address, in a worker. Its module is imported if it was not.

    Raises:
        LookupError: If it is not there.
        BaseException: What the import of its module raises.
    """
    module = importlib.import_module(address.module)
    try:
        for steps, found in enumerate(_chain(module, address.qualname)):
            if steps == address.unwrap:
                if callable(found):
                    function: Callable[..., Any] = found
                    return function
                break
    except AttributeError as error:
        raise LookupError(_not_here(address, module)) from error
    raise LookupError(_not_here(address, module))


def _chain(module: ModuleType, qualname: str) -> Iterator[Any]:
    """What a name leads to: first as one gets it who asks for it, then step by step what that wraps.

    Raises:
        AttributeError: If there is no such name.
    """
    *owners, name = qualname.split(".")
    owner: Any = module
    for each in owners:
        owner = getattr(owner, each)
    yield getattr(owner, name)
    # Class and static methods wrap as well, but do not show themselves to `getattr`.
    found = inspect.getattr_static(owner, name) if isinstance(owner, type) else getattr(owner, name)
    for _ in range(_MOST_STEPS):
        try:
            found = found.__wrapped__
        except AttributeError:
            return
        yield found


def _is_same(found: Any, function: Any) -> bool:
    if found is function:
        return True
    # A bound method is made anew whenever one asks for it.
    return (
        isinstance(function, MethodType | BuiltinMethodType)
        and type(found) is type(function)
        and bool(found == function)
    )


def _refuse_nameless(address: Address) -> Address:
    label, qualname = address.label, address.qualname
    if "<lambda>" in qualname:
        raise NotOffloadable(
            f"{label} cannot be offloaded: a lambda has no name by which a worker could find it. "
            "Define it with `def` at the top level of a module"
        )
    if "<locals>" in qualname:
        raise NotOffloadable(
            f"{label} cannot be offloaded: it is made anew whenever the function around it is called, "
            "so that a worker could not find it. Move it to the top level of its module and pass it what "
            "it uses as arguments; if it comes from a decorator, let that use functools.wraps"
        )
    if address.module == "__main__" and not _main_can_be_found():
        raise NotOffloadable(
            f"{label} cannot be offloaded: it was not defined in a file, so that a worker could not find it. "
            "Put it into a module and import it from there"
        )
    return address


def _main_can_be_found() -> bool:
    """Whether the main module can be run again: not what was typed at a prompt or given by ``python -c``."""
    main = sys.modules.get("__main__")
    if getattr(main, "__spec__", None) is not None:
        return True
    file = getattr(main, "__file__", None)
    return isinstance(file, str) and os.path.exists(file)


def _not_here(address: Address, module: ModuleType) -> str:
    where = getattr(module, "__file__", None) or "no file"
    steps = f", {address.unwrap} decorators down" if address.unwrap else ""
    return (
        f"there is no function {address.qualname}{steps} in {address.module} ({where}) as this worker "
        "imported it; is it defined under a condition that does not hold here?"
    )


def _name_of(function: Any) -> str:
    """What to call it in a message: never its `repr`, which may show values."""
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(qualname, str):
        return f"an object of type {type(function).__qualname__}"
    module = getattr(function, "__module__", None)
    return f"{module}.{qualname}" if isinstance(module, str) else qualname
