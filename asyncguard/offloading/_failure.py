"""Exceptions on their way from a worker to whoever awaits the call.

An exception arrives as what it was: its type, its arguments, its attributes and notes. Its traceback stays
behind; the text of it, and that of its causes, becomes the cause of what arrives. An exception that cannot
travel is replaced by a `PayloadError` that tells of it; in a group that is done to the one member.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import traceback
from types import TracebackType
from typing import Any

from asyncguard.errors import PayloadError
from asyncguard.offloading._payload import Body, Packed, UnpackError, explain, name_of, pack, text_of

__all__ = ["RemoteTraceback", "seal", "unseal"]

_HEAP_TYPE = 1 << 9
"""Of `type.__flags__` (Py_TPFLAGS_HEAPTYPE): a class that was made at run time."""

_LET_THROUGH = (SystemExit, KeyboardInterrupt, GeneratorExit)

_NAMES = ("what was raised", "its name", "its message", "its traceback", "what was in the way")


class RemoteTraceback(Exception):
    """What a worker was doing when it raised; the cause of the exception that arrives.

    Args:
        text: The formatted traceback.
    """

    def __str__(self) -> str:
        text = str(self.args[0]).rstrip("\n")
        return f"\n{' in the worker process ':-^80}\n{text}\n{'':-^80}"


def seal(error: BaseException) -> Packed:
    """Make an exception ready to travel, whatever it is like. It is left as it was."""
    text = _formatted(error)
    data, obstacle = _pickled(error)
    if data is None and isinstance(error, BaseExceptionGroup):
        mended = _mended(error)
        if mended is not None:
            data, _ = _pickled(mended)
    values = (data, name_of(type(error)), text_of(error), text, obstacle)
    return pack(zip(_NAMES, values, strict=True))


def unseal(body: Body) -> BaseException:
    """The exception that `seal` made ready, or what stands for it. Its cause is a `RemoteTraceback`."""
    try:
        data, name, message, text, obstacle = body.unpack(_NAMES)
    except UnpackError as error:
        return PayloadError(f"the function raised, but {error}")
    found: BaseException | None = None
    if isinstance(data, bytes):
        found, obstacle = _rebuilt(data)
    if found is None:
        found = _stand_in(str(name), str(message), str(obstacle))
    # Not by an assignment: the exception may be a frozen dataclass.
    BaseException.__setattr__(found, "__cause__", RemoteTraceback(text))
    return found


def _stand_in(name: str, message: str, obstacle: str) -> PayloadError:
    raised = f"{name}: {message}" if message else name
    return PayloadError(
        f"the function raised {raised}\nIt cannot be sent from one process to another: {obstacle}"
    )


def _formatted(error: BaseException) -> str:
    try:
        begin = _beyond_ours(error.__traceback__)
        return "".join(traceback.TracebackException(type(error), error, begin, compact=True).format())
    except _LET_THROUGH:
        raise
    except BaseException as failure:
        return f"{explain(error)}\nIts traceback cannot be had: {explain(failure)}\n"


def _beyond_ours(begin: TracebackType | None) -> TracebackType | None:
    """Leave out the lines of the worker itself, and those of the import that it asked for."""
    while begin is not None:
        module = begin.tb_frame.f_globals.get("__name__", "")
        if not str(module).startswith(("asyncguard.offloading.", "importlib")):
            break
        begin = begin.tb_next
    return begin


# -- exceptions to bytes -----------------------------------------------------------------------------


def _pickled(error: BaseException) -> tuple[bytes | None, str]:
    """An exception as bytes that it can be rebuilt from; `None` if it cannot, and what is in the way."""
    obstacle = ""
    for kind in (_Pickler, pickle.Pickler):
        file = io.BytesIO()
        pickler = kind(file, 5)
        pickler.dispatch_table = _registered()
        try:
            pickler.dump(error)
        except _LET_THROUGH:
            raise
        except BaseException as failure:
            obstacle = explain(failure)
            continue
        data = file.getvalue()
        found, obstacle = _rebuilt(data)
        if found is not None:
            return data, ""
    return None, obstacle


def _registered() -> dict[type, Any]:
    """What is registered at `copyreg`, but for tblib, which takes along all tracebacks and causes."""
    table = copyreg.dispatch_table
    if "tblib.pickling_support" not in sys.modules:  # Dask imports it
        return table
    return {
        t: how for t, how in [*table.items()] if getattr(how, "__module__", "") != "tblib.pickling_support"
    }


def _rebuilt(data: bytes) -> tuple[BaseException | None, str]:
    """The exception; `None` if it cannot be rebuilt, and what is in the way."""
    try:
        found = pickle.loads(data)  # noqa: S301 (our own worker wrote it)
    except _LET_THROUGH:
        raise
    except BaseException as failure:
        return None, explain(failure)
    if not isinstance(found, BaseException):
        return None, f"its pickle makes a {name_of(type(found))} of it"
    return found, ""


def _mended(group: BaseExceptionGroup[BaseException]) -> BaseExceptionGroup[BaseException] | None:
    """The same group, but for the members that cannot travel: something stands for each of those."""
    try:
        mended = group.derive([_fit(member) for member in group.exceptions])
        for note in getattr(group, "__notes__", ()):
            mended.add_note(note)
    except _LET_THROUGH:
        raise
    except BaseException:
        return None
    return mended


def _fit(member: BaseException) -> BaseException:
    data, obstacle = _pickled(member)
    if data is not None:
        return member
    mended = _mended(member) if isinstance(member, BaseExceptionGroup) else None
    return mended or _stand_in(name_of(type(member)), text_of(member), obstacle)


class _Pickler(pickle.Pickler):
    """Takes exceptions apart in its own way, wherever it meets them.

    Pickle calls the class with what the exception has for arguments. Where `__init__` takes others than it
    hands on to `Exception`, as it often does, that raises or makes something else.
    """

    def reducer_override(self, value: Any) -> Any:
        """See `pickle.Pickler`."""
        if isinstance(value, BaseException) and _is_plain(type(value)):
            reduced = value.__reduce__()
            if isinstance(reduced, tuple) and reduced[0] is type(value):
                attributes = dict(reduced[2]) if len(reduced) > 2 and reduced[2] else {}
                for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
                    if hasattr(value, name):
                        attributes[name] = getattr(value, name)
                return _made, reduced[:2], attributes, None, None, _set_attributes
        return NotImplemented


def _is_plain(kind: type[BaseException]) -> bool:
    """Whether a class is made in Python and leaves it to those built in how it is pickled."""
    owner = getattr(kind.__reduce__, "__objclass__", None)
    return (
        _is_made_in_python(kind)
        and kind.__reduce_ex__ is object.__reduce_ex__
        and owner is not None
        and not _is_made_in_python(owner)
        and kind.__setstate__ is BaseException.__setstate__
        and kind not in _registered()
    )


def _is_made_in_python(kind: type) -> bool:
    return bool(kind.__flags__ & _HEAP_TYPE)


def _built_in(kind: type) -> type:
    while _is_made_in_python(kind):
        kind = kind.__base__  # type: ignore[assignment]  # only `object` has none
    return kind


def _made(kind: type[BaseException], args: tuple[object, ...]) -> BaseException:
    """An exception with these arguments, of which its own `__init__` knows nothing."""
    base: Any = _built_in(kind)
    error: BaseException = base.__new__(kind, *args)
    base.__init__(error, *args)
    return error


def _set_attributes(error: BaseException, attributes: dict[str, object]) -> None:
    base = _built_in(type(error))
    slots = copyreg._slotnames(type(error))  # type: ignore[attr-defined]
    for name, value in attributes.items():
        if name in slots or hasattr(base, name):
            # Not by an assignment: the exception may be a frozen dataclass.
            BaseException.__setattr__(error, name, value)
        else:
            error.__dict__[name] = value
