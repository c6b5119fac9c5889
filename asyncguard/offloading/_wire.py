"""Frames on the stream between the server and a worker.

A frame is a header, the sizes of the buffers of its body, and the body. A large body travels in a file that
has no name, whose descriptor goes with the first byte of the frame. What a body says is not looked at here: a
frame whose body cannot be rebuilt leaves the stream as good as it was.
"""

from __future__ import annotations

import enum
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from asyncguard.offloading._nameless import create
from asyncguard.offloading._payload import MOST_BUFFERS, Body, Packed, places

__all__ = ["INLINE", "Decoder", "Frame", "Kind", "WireError", "encode"]

INLINE = 128 << 10
"""A body that has more bytes travels in a file."""

_HEADER = struct.Struct("<BBHIQQ")
"""The magic byte, the kind, the flags, how many buffers, the call, the pickle's size."""

_IN_FILE = 1
"""The body is in a file."""
_FREE = 2
"""What answers the call has done with the file that the call came in."""

_HEADER_SIZE = _HEADER.size
_MAGIC = 0xA6
_FLAGS = _IN_FILE | _FREE


class Kind(enum.IntEnum):
    """What a frame says. To a worker: `CALL`; all else comes from it."""

    CALL = 1
    RESULT = 2
    """The function returned."""
    ERROR = 3
    """The function raised."""
    FAULT = 4
    """The call could not be made, or its outcome not be sent."""
    LOG = 5
    PROGRESS = 6
    READY = 7
    """Comes once, before all else."""


_KINDS = (Kind.READY, *Kind)  # by their numbers, of which 0 is none
_LAST_KIND = len(Kind)


class WireError(Exception):
    """The stream makes no sense any more; nothing that follows can be read."""


class Frame(NamedTuple):
    """What came.

    Attributes:
        kind: What it says.
        call: Of which call.
        body: What goes with that.
    """

    kind: Kind
    call: int
    body: Body


def encode(
    kind: Kind, call: int, packed: Packed, *, is_free: bool = False, file: Callable[[int], int] = create
) -> tuple[list[bytes | memoryview], list[int]]:
    """What to send.

    Args:
        kind: What the frame says.
        call: Of which call.
        packed: Its body. A large one is written to a file here, which takes its time.
        is_free: Whether the file that the call came in may be written to again.
        file: Opens a file for so many bytes.

    Returns:
        The bytes; and the descriptors that go with the first of them, for the caller to close afterwards.

    Raises:
        OSError: If there is no room for the file.
    """
    buffers = packed.buffers
    size = packed.size
    flags = _FREE if is_free else 0
    if not buffers and size <= INLINE:
        header = _HEADER.pack(_MAGIC, kind, flags, 0, call, size)
        return [b"".join((header, *packed.chunks))], []
    flags |= _IN_FILE if size > INLINE else 0
    header = _HEADER.pack(_MAGIC, kind, flags, len(buffers), call, packed.pickled)
    sizes = struct.pack(f"<{len(buffers)}Q", *[buffer.nbytes for buffer in buffers])
    if size <= INLINE:
        return [b"".join((header, sizes, *packed.pieces()))], []
    fd = file(size)
    try:
        packed.write_to(fd)
    except BaseException:
        os.close(fd)
        raise
    return [header + sizes], [fd]


class Decoder:
    """Finds the frames in a stream.

    Who receives has to take the flag `socket.MSG_CTRUNC` for the end of the stream: descriptors were lost.
    """

    __slots__ = ("_fds", "_have", "_is_closed", "_need", "_parts")

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of a frame that is not complete
        self._have = 0
        self._need = 0
        self._fds: deque[int] = deque()
        self._is_closed = False

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Frame]:
        """Take what has come, split in any way.

        Args:
            data: Some bytes.
            fds: The descriptors that came with them; the decoder's from now on.

        Returns:
            The frames that are complete now.

        Raises:
            WireError: If there is no sense in it, and ever after. Frames that came just before are lost.
        """
        if fds:
            self._fds.extend(fds)
        frames: list[Frame] = []
        try:
            if self._have:
                self._have += len(data)
                self._parts.append(data)
                if self._have < self._need:
                    return frames
                data = b"".join(self._parts)
            self._read(data, frames)
        except BaseException:
            self.close()
            for frame in frames:
                frame.body.close()
            raise
        return frames

    def close(self) -> None:
        """Close the descriptors that were not taken. What comes from now on is refused."""
        self._is_closed = True
        self._parts = []
        self._have = 0
        while self._fds:
            os.close(self._fds.popleft())

    def _read(self, data: bytes, frames: list[Frame]) -> None:
        if self._is_closed:
            raise WireError("the stream is broken or closed")
        at, end = 0, len(data)
        while (need := at + _HEADER_SIZE) <= end:
            magic, kind, flags, count, call, pickled = _HEADER.unpack_from(data, at)
            if magic != _MAGIC or not 0 < kind <= _LAST_KIND or flags > _FLAGS or count > MOST_BUFFERS:
                raise WireError(f"no frame begins with {data[at:need].hex()}")
            begin = need
            if count or flags:
                begin += 8 * count
                if begin > end:
                    need = begin
                    break
                sizes = struct.unpack_from(f"<{count}Q", data, need)
                need = begin
            else:
                sizes = ()
            if flags & _IN_FILE:
                body = self._body_in_file(pickled, sizes)
            else:
                need += places(pickled, sizes)[-1] if sizes else pickled
                if need - begin > INLINE:
                    raise WireError(f"a body of {need - begin} bytes does not travel in the stream")
                if need > end:
                    break
                body = Body(data[begin:need], pickled, sizes)
            if flags & _FREE:
                body.is_free = True
            frames.append(Frame(_KINDS[kind], call, body))
            at = need
        if at < end:
            self._parts = [data[at:]]
            self._have = end - at
            self._need = need - at
        else:
            self._parts = []
            self._have = 0
            if self._fds:
                raise WireError("a descriptor came that belongs to no frame")

    def _body_in_file(self, pickled: int, sizes: Sequence[int]) -> Body:
        if not self._fds:
            raise WireError("a frame came without its descriptor")
        body = Body(b"", pickled, sizes, self._fds.popleft())
        if (size := body.file_size()) != body.size:
            body.close()
            raise WireError(f"a body of {body.size} bytes came in a file of {size}")
        return body
