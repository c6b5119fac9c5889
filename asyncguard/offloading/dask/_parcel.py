"""What `_payload.pack` packed, in a shape that distributed carries without copying what is large."""

from __future__ import annotations

import io
from pickle import PickleBuffer, Unpickler
from typing import Any

from asyncguard.offloading._nameless import Descriptor
from asyncguard.offloading._payload import Body, Packed

__all__ = ["Parcel"]

Buffer = bytes | bytearray | memoryview

_LEAST_PIECE = 32 << 10
"""What is smaller is joined with its neighbours."""


class Parcel:
    """Pickled values, and the buffers beside the pickle.

    Nobody rebuilds the values but who opens it: not the scheduler, nor a worker that holds it.

    Args:
        pickled: The pickle, in pieces.
        buffers: What goes beside it.
    """

    __slots__ = ("buffers", "pickled")

    def __init__(self, pickled: list[Buffer], buffers: list[Buffer]) -> None:
        self.pickled = pickled
        self.buffers = buffers

    @classmethod
    def of(cls, packed: Packed) -> Parcel:
        """Wrap it; nothing large is copied."""
        pieces: list[Buffer] = []
        small: list[Buffer] = []
        for chunk in packed.chunks:
            if len(chunk) < _LEAST_PIECE:
                small.append(chunk)
                continue
            if small:
                pieces.append(b"".join(small))
                small = []
            pieces.append(chunk)
        if small:
            pieces.append(b"".join(small))
        return cls(pieces, [*packed.buffers])

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return sum(memoryview(each).nbytes for each in (*self.pickled, *self.buffers))

    def body(self) -> Body:
        """For unpacking, which can be done once."""
        pickled = self.pickled
        data = bytes(pickled[0]) if len(pickled) == 1 else b"".join(pickled)
        return _Opened(data, self.buffers)

    def __sizeof__(self) -> int:
        return self.size + 64  # what Dask reckons with

    def __reduce_ex__(self, protocol: Any) -> Any:
        beside = PickleBuffer if protocol >= 5 else bytes
        pickled = [each if len(each) < _LEAST_PIECE else beside(each) for each in self.pickled]
        return Parcel, (pickled, [beside(each) for each in self.buffers])


class _Opened(Body):
    """A body whose buffers are where they came in."""

    __slots__ = ("_buffers",)

    def __init__(self, data: bytes, buffers: list[Buffer]) -> None:
        super().__init__(data, len(data), [memoryview(each).nbytes for each in buffers])
        self._buffers = buffers

    def _unpickler(self, file: Descriptor | None) -> Unpickler:
        return Unpickler(io.BytesIO(self._data), buffers=self._buffers)  # noqa: S301 (our own wrote it)
