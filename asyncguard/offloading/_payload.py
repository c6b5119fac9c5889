"""Objects to bytes and back: what a call takes along and what it brings home.

Large things are copied as little as can be. Large `bytes` and the buffers of arrays (pickle's out-of-band
buffers, PEP 574) are kept by reference until they are written. On the other side such buffers are a private
mapping of the file that they came in. How bytes get from one process to the other is `_wire`'s business.

Whatever is large is for a thread: the pickler and the unpickler call Python for each frame of 64 KiB, and
there the GIL changes hands; files are read and written without it.
"""

from __future__ import annotations

import copyreg
import io
import mmap
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pickle import PickleBuffer, Pickler, Unpickler, dumps, loads
from typing import Any

from asyncguard.offloading._nameless import Descriptor, Reader, mapped

__all__ = [
    "MOST_BUFFERS",
    "Body",
    "PackError",
    "Packed",
    "TooBig",
    "UnpackError",
    "are_plain",
    "describe",
    "explain",
    "name_of",
    "pack",
    "places",
    "plain",
    "text_of",
]

MOST_BUFFERS = 1 << 16
"""So many out-of-band buffers at most; what is left goes with the pickle."""

_LEAST_BUFFER = 32 << 10
"""A smaller buffer is copied sooner than it is kept account of."""

_ALIGNMENT = 64
"""A cache line, and what vector instructions want."""

_MOST_PIECES = 1024
"""The system takes no more at once (IOV_MAX)."""

_MOST_TEXT = 500
"""So much of another's message goes into ours."""

_LET_THROUGH = (SystemExit, KeyboardInterrupt, GeneratorExit)


class PackError(Exception):
    """A value cannot be pickled.

    Args:
        name: What it is to the user, such as ``argument 'path'``; the name of a result ends with ``result``.
        error: What was raised.
        kind: What `describe` says of the value.
    """

    def __init__(self, name: str, error: BaseException, kind: str) -> None:
        verb = "return" if name.endswith("result") else "pass"
        super().__init__(f"{name} ({kind}) cannot be pickled: {explain(error)}; {_advice(error, verb)}")
        self.name = name
        self.error = error


class UnpackError(Exception):
    """A value cannot be rebuilt.

    Args:
        name: What it is to the user.
        error: What was raised.
    """

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__(f"{name} cannot be rebuilt: {explain(error)}")
        self.name = name
        self.error = error


class TooBig(Exception):
    """More bytes came than was allowed."""


class Packed:
    """Pickled values, and the buffers that go beside the pickle. It is the file that the pickler writes to.

    What it was made of must not change until it has been written.

    Args:
        most: How many bytes it may have; more is `TooBig`.

    Attributes:
        chunks: The pickle.
        pickled: How many bytes of it there are.
        buffers: What goes beside it, each at a multiple of 64 bytes from the beginning of all.
        size: How many bytes there are of all, those between the buffers included.
    """

    __slots__ = ("_most", "buffers", "chunks", "pickled", "size")

    def __init__(self, most: int) -> None:
        self.chunks: list[bytes | bytearray] = []
        self.pickled = 0
        self.buffers: list[memoryview] = []
        self.size = 0
        self._most = most

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the pickler has ready."""
        self.size += len(data)
        if self.size > self._most:
            raise TooBig
        if isinstance(data, memoryview):  # of a string, and good for this moment only
            self.chunks += [bytes(data[at : at + (1 << 20)]) for at in range(0, len(data), 1 << 20)]
        else:
            self.chunks.append(data)

    def take(self, buffer: PickleBuffer) -> bool:
        """Take a buffer, unless it is better off in the pickle: true says so."""
        data = buffer.raw()
        if data.nbytes < _LEAST_BUFFER or len(self.buffers) >= MOST_BUFFERS:
            return True
        self.size += data.nbytes
        if self.size > self._most:
            raise TooBig
        self.buffers.append(data)
        return False

    def pieces(self) -> Iterator[bytes | bytearray | memoryview]:
        """All of it in order, what lies between the buffers included."""
        yield from self.chunks
        at = self.pickled
        for buffer in self.buffers:
            yield bytes(-at % _ALIGNMENT)
            yield buffer
            at += -at % _ALIGNMENT + buffer.nbytes

    def write_to(self, fd: int) -> None:
        """Write all of it to a file, from where that stands. Other threads run meanwhile.

        Raises:
            OSError: What the system raises; some of it may have been written.
        """
        pieces = self.pieces()
        left: list[bytes | bytearray | memoryview] = []
        while left or (left := list(islice(pieces, _MOST_PIECES))):
            written = os.writev(fd, left)
            done = 0
            while done < len(left) and written >= len(left[done]):
                written -= len(left[done])
                done += 1
            left = left[done:]
            if written:  # a part of the first: no call writes more than 2 GiB
                left[0] = memoryview(left[0])[written:]


def pack(values: Iterable[tuple[str, object]], *, most: int | None = None) -> Packed:
    """Pickle some values. What is the same object in two of them will be one object again.

    Args:
        values: The names of the values, and the values.
        most: How many bytes they may come to; `None` for any number.

    Raises:
        PackError: If one of them cannot be pickled, whatever it raised (if it is an `Exception`).
        TooBig: As soon as they come to more than `most`.
    """
    packed = Packed(sys.maxsize if most is None else most)
    pickler = Pickler(packed, 5, buffer_callback=packed.take)
    pickler.dispatch_table = {**copyreg.dispatch_table, memoryview: partial(_reduce_view, packed._most)}
    if (ndarray := getattr(sys.modules.get("numpy"), "ndarray", None)) is not None:
        pickler.dispatch_table[ndarray] = partial(_reduce_array, packed._most)
    dump = pickler.dump
    for name, value in values:
        if most is not None and isinstance(value, str) and len(value) > most:
            raise TooBig  # before it is encoded, which takes its time
        try:
            dump(value)
        except TooBig:
            raise
        except Exception as error:
            raise PackError(name, error, describe(value)) from error
    packed.pickled = packed.size
    if packed.buffers:
        sizes = [buffer.nbytes for buffer in packed.buffers]
        packed.pickled -= sum(sizes)
        packed.size = places(packed.pickled, sizes)[-1]
    return packed


_SCALARS = frozenset({bool, float, int, type(None)})
_STRINGS = frozenset({bytes, str})
_SHORT = 4096


def are_plain(values: Iterable[object]) -> bool:
    """Whether values are small and of such types that `pickle.dumps` is quick with them and cannot fail.

    Short of that nothing is known: a value that is not plain may be small, too.
    """
    for value in values:
        kind = type(value)
        if kind not in _SCALARS and (kind not in _STRINGS or len(value) > _SHORT):  # type: ignore[arg-type]
            return False
    return True


def plain(value: object) -> Packed:
    """What `pack` makes of one value with nothing in it that is not plain, several times as fast."""
    packed = Packed(sys.maxsize)
    pickled = dumps(value, 5)
    packed.chunks.append(pickled)
    packed.pickled = packed.size = len(pickled)
    return packed


def _reduce_array(most: int, array: Any) -> Any:
    """What NumPy makes of it. A strided array it would copy first, whatever `most` is, and keep the GIL."""
    if array.nbytes > most:
        raise TooBig
    if not (array.flags.forc or array.dtype.hasobject):
        array = array.copy()
    return array.__reduce_ex__(5)


def _reduce_view(most: int, view: memoryview) -> Any:
    """A view of the same format and shape, of bytes of its own; pickle knows no views."""
    if view.nbytes > most:
        raise TooBig
    if len(view.format.removeprefix("@")) != 1 or (view.ndim != 1 and not view.nbytes):
        raise TypeError(f"cannot pickle 'memoryview' object of format {view.format!r}, shape {view.shape}")
    return _view, (PickleBuffer(view) if view.c_contiguous else view.tobytes(), view.format, view.shape)


def _view(data: Any, layout: str, shape: tuple[int, ...]) -> memoryview:
    view = memoryview(data).cast("B")
    return view if layout == "B" and len(shape) == 1 else view.cast(layout, shape)  # type: ignore[call-overload]


def places(pickled: int, sizes: Sequence[int]) -> list[int]:
    """Where the buffers of a body begin, and after them where it ends."""
    found = []
    at = pickled
    for size in sizes:
        at += -at % _ALIGNMENT
        found.append(at)
        at += size
    found.append(at)
    return found


class Body:
    """What has come: pickled values and their buffers.

    Args:
        data: All of it, or nothing if it is in a file.
        pickled: How many bytes of it are the pickle.
        sizes: Those of the buffers.
        file: The descriptor of the file that it is in: the body's from now on.

    Attributes:
        size: How many bytes it has.
        is_free: Whether the file of the call that this answers may be written to again.
    """

    __slots__ = ("_data", "_file", "_mapping", "_pickled", "_sizes", "is_free", "size")

    def __init__(self, data: bytes, pickled: int, sizes: Sequence[int] = (), file: int | None = None) -> None:
        self.size = places(pickled, sizes)[-1] if sizes else pickled
        self._data = data
        self._pickled = pickled
        self._sizes = sizes
        self._file = None if file is None else Descriptor(file)
        self._mapping: weakref.ref[mmap.mmap] | None = None
        self.is_free = False

    def is_held(self) -> bool:
        """Whether something that was rebuilt of it still needs the file that it came in."""
        return self._file is not None or (self._mapping is not None and self._mapping() is not None)

    def file_size(self) -> int:
        """How many bytes the file has that it is in."""
        return os.fstat(self._file.fd).st_size if self._file is not None else 0

    def close(self) -> None:
        """Give up what it holds, if it has not been unpacked."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def first(self) -> Any:
        """The first value, and nothing is used up; `None` if that would take long.

        Raises:
            Exception: What its rebuilding raises. Made by `plain`, it raises nothing.
        """
        return loads(self._data) if self._data and not self._sizes else None  # noqa: S301 (as below)

    def unpack(
        self, names: Sequence[str], rest: Callable[[Any], Iterable[str]] | None = None
    ) -> list[object]:
        """Rebuild the values. This can be done once. Arrays can be written to.

        Args:
            names: Those of the values, in order.
            rest: Called with the first value; returns the names of those that follow these.

        Raises:
            UnpackError: If one of them cannot be rebuilt, whatever it raised (but for what ends a process).
        """
        file, self._file = self._file, None
        values: list[object] = []
        try:
            if len(names) == 1 and rest is None and file is None and not self._sizes:
                return [loads(self._data)]  # noqa: S301 (as below)
            load = self._unpickler(file).load
            for _ in names:
                values.append(load())  # noqa: PERF401 (the handler looks at how far it came)
            if rest is not None:
                names = (*names, *rest(values[0]))
                while len(values) < len(names):
                    values.append(load())
            return values
        except _LET_THROUGH:
            raise
        except BaseException as error:
            raise UnpackError(names[min(len(values), len(names) - 1)], error) from error
        finally:
            if file is not None:
                file.close()

    def _unpickler(self, file: Descriptor | None) -> Unpickler:
        data, sizes = self._data, self._sizes
        source: io.BytesIO | Reader = io.BytesIO(data) if file is None else Reader(file.fd, self._pickled)
        buffers: list[bytearray] | list[memoryview] | None = None
        if sizes:
            slices = [
                slice(at, at + size) for at, size in zip(places(self._pickled, sizes), sizes, strict=False)
            ]
            if file is None:
                buffers = [bytearray(data[each]) for each in slices]
            else:
                mapping = mapped(file.fd, self.size)
                self._mapping = weakref.ref(mapping)
                view = memoryview(mapping)
                buffers = [view[each] for each in slices]
        return Unpickler(source, buffers=buffers)  # noqa: S301 (we wrote it, or our own worker did)


# -- what to say -------------------------------------------------------------------------------------


def describe(value: object) -> str:
    """What sort of thing a value is, and nothing of the value."""
    return name_of(type(value))


def name_of(kind: type) -> str:
    """The name of a class, with that of its module unless it is built in."""
    module: object = kind.__module__
    return (
        f"{module}.{kind.__qualname__}"
        if isinstance(module, str) and module != "builtins"
        else kind.__qualname__
    )


def explain(error: BaseException) -> str:
    """What was raised, in one line if its message has one line."""
    kind = name_of(type(error))
    text = text_of(error)
    if len(text) > _MOST_TEXT:
        text = text[:_MOST_TEXT] + "..."
    return f"{kind}: {text}" if text else kind


def text_of(error: BaseException) -> str:
    """The message of an exception, whatever its `__str__` does."""
    try:
        return str(error)
    except _LET_THROUGH:
        raise
    except BaseException:
        return "<its message cannot be had>"


_CULPRIT = re.compile(r"cannot pickle '?(?:_io\.)?([\w.]+)'? (?:object|instance)")

_INSTEAD = {
    "async_generator": "{} a list of what it yields instead",
    "coroutine": "await it, and {} its result instead",
    "dict_items": "{} a list instead",
    "dict_keys": "{} a list instead",
    "dict_values": "{} a list instead",
    "generator": "{} a list instead",
    "mappingproxy": "{} a dict instead",
    "memoryview": "{} bytes instead",
    "module": "{} its name instead, or import it in the function",
    "socket": "{} an address instead, and connect in the function",
}


def _advice(error: BaseException, verb: str) -> str:
    if isinstance(error, RecursionError):
        return f"{verb} something less deeply nested instead"
    text = text_of(error)
    found = _CULPRIT.search(text)
    culprit = found[1] if found else ""
    if culprit in _INSTEAD:
        return _INSTEAD[culprit].format(verb)
    if hasattr(io, culprit):
        return f"{verb} the path of the file or its contents instead"
    if "<lambda>" in text or "<locals>" in text or "local object" in text:
        return f"{verb} something that is defined at the top of a module instead"
    return f"{verb} the plain data that is needed of it instead"
