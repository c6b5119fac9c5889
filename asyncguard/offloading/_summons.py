"""What a call says: which function, in which context, with which arguments. Both sides use this."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from asyncguard.offloading._address import Address
from asyncguard.offloading._payload import Body, Packed, are_plain, pack, plain

__all__ = ["Summons", "Variable", "pack_call", "read", "variables_of"]


class Variable(NamedTuple):
    """A context variable that a function is to see.

    Attributes:
        module: The module that it is found in.
        name: Its name there.
        value: Its value.
    """

    module: str
    name: str
    value: object


class Summons(NamedTuple):
    """A call as it arrives.

    Attributes:
        address: Where the function is.
        context: The context variables, and their values.
        args: The arguments.
        kwargs: The keyword arguments.
    """

    address: Address
    context: list[tuple[ContextVar[Any], object]]
    args: Sequence[Any]
    kwargs: dict[str, Any]


_PLAIN = 5
"""So many fields has the first value of a call that has no others."""


class _Head(NamedTuple):
    """The first value of a call, which says what the others are. It travels as a plain tuple.

    A call with nothing but plain arguments has another, which they are in: module, qualname, unwrap, args and
    kwargs. It is all there is of that call.
    """

    module: str
    qualname: str
    unwrap: int
    homes: tuple[tuple[str, str], ...]
    positional: int
    keywords: tuple[str, ...]


def _names(head: tuple[Any, ...]) -> list[str]:
    """Those of the values that follow."""
    if len(head) == _PLAIN:
        return []
    _, _, _, homes, positional, keywords = head
    names = [f"context variable {name!r}" for _, name in homes] if homes else []
    names += [f"argument {index}" for index in range(1, positional + 1)]
    if keywords:
        names += [f"argument {name!r}" for name in keywords]
    return names


def pack_call(
    address: Address,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    context: Sequence[Variable] = (),
    *,
    most: int | None = None,
) -> Packed:
    """Pickle a call.

    Args:
        address: Where the function is.
        args: Its arguments.
        kwargs: Its keyword arguments.
        context: The context variables that it is to see.
        most: How many bytes that may come to, unless all arguments are plain; `None` for any number.

    Raises:
        PackError: If one of them cannot be pickled.
        TooBig: As soon as they come to more than `most`.
    """
    if not context and are_plain(args) and (not kwargs or (are_plain(kwargs) and are_plain(kwargs.values()))):
        return plain((*address, args, kwargs))
    return pack(_values_of(address, args, kwargs, context), most=most)


def _values_of(
    address: Address,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    context: Sequence[Variable],
) -> list[tuple[str, object]]:
    """The values of a call with their names."""
    homes = tuple([(variable.module, variable.name) for variable in context]) if context else ()
    head = (*address, homes, len(args), tuple(kwargs))
    values = [variable.value for variable in context] if context else []
    return [("the call", head), *zip(_names(head), [*values, *args, *kwargs.values()], strict=True)]


_homes: dict[tuple[ContextVar[Any], str], tuple[str, str]] = {}


def variables_of(context: Iterable[ContextVar[Any]], module: str = "") -> list[Variable]:
    """Where some context variables are found again, and their values; those that have none are left out.

    Args:
        context: The context variables.
        module: The name of the module that the worker imports in any case: it is looked in first.

    Raises:
        LookupError: If one is in no module, or only in a class or a function of one.
    """
    found = []
    for variable in context:
        try:
            value = variable.get()
        except LookupError:
            continue
        home = _homes.get((variable, module))
        if home is None:
            home = _homes[variable, module] = _home_of(variable, module)
        found.append(Variable(*home, value))
    return found


def _home_of(variable: ContextVar[Any], module: str) -> tuple[str, str]:
    # The latest first: what a module imports comes after it.
    for home in [module, *reversed([*sys.modules])]:
        for name, value in [*getattr(sys.modules.get(home), "__dict__", {}).items()]:
            if value is variable:
                return home, name
    raise LookupError(
        f"the context variable {variable.name!r} is at the top of no module: a worker could not find it"
    )


def read(body: Body) -> Summons:
    """Rebuild a call; in the one thread of a worker that does so.

    Raises:
        UnpackError: If one of its values cannot be rebuilt.
        LookupError: If a context variable is not where it should be.
        BaseException: What the import of its module raises.
    """
    first: Any = body.first()
    values: list[object] = []
    if first is None or len(first) != _PLAIN:
        first, *values = body.unpack(("the call",), _names)
    if len(first) == _PLAIN:
        module, qualname, unwrap, args, kwargs = first
        return Summons(Address(module, qualname, unwrap), [], args, kwargs)
    head = _Head(*first)
    context = [(_variable(*home), values[index]) for index, home in enumerate(head.homes)]
    begin = len(head.homes)
    end = begin + head.positional
    kwargs = dict(zip(head.keywords, values[end:], strict=True))
    return Summons(Address(head.module, head.qualname, head.unwrap), context, values[begin:end], kwargs)


def _variable(module: str, name: str) -> ContextVar[Any]:
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, ContextVar):
        raise LookupError(f"there is no context variable {name} in {module} as this worker imported it")
    return found
