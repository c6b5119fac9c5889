"""Files that have no name: what is in them goes when nobody has them open or mapped any more, whoever dies.

Other threads run while they are read.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from pickle import UnpicklingError

__all__ = ["Descriptor", "Reader", "create", "mapped"]

_MOST_TRACKED = 64
"""So many mappings may keep a descriptor. A program that collects results must not run out of them."""


def create(size: int = 0, name: str = "asyncguard") -> int:
    """A new one; returns its descriptor.

    Args:
        size: How many bytes will be written to it; it is empty at first.
        name: What it is shown as among the open files of a process.

    Raises:
        OSError: If the system has none.
    """
    return os.memfd_create(name, os.MFD_CLOEXEC)


class Descriptor:
    """One that is closed when nobody has it any more."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


class Reader:
    """The file that an unpickler reads: the beginning of another, without the GIL.

    Args:
        fd: Its descriptor.
        size: How many bytes may be read.
    """

    __slots__ = ("_at", "_fd", "_left")

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._at = 0
        self._left = size

    def read(self, size: int) -> bytes:
        wanted = min(size, self._left)
        data = os.pread(self._fd, wanted, self._at)
        if len(data) == wanted:
            self._advance(wanted)
            return data
        whole = bytearray(wanted)  # no call reads more than 2 GiB
        del data
        return bytes(whole[: self.readinto(whole)])

    def readinto(self, into: bytearray | memoryview) -> int:
        done = 0
        with memoryview(into) as view:
            while self._left and done < len(view):
                read = os.preadv(self._fd, [view[done : done + self._left]], self._at)
                if not read:
                    break
                self._advance(read)
                done += read
        return done

    def readline(self) -> bytes:
        raise UnpicklingError("protocol 5 has no lines")

    def _advance(self, size: int) -> None:
        self._at += size
        self._left -= size


_tracked: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def mapped(fd: int, size: int) -> mmap.mmap:
    """The contents of a file, to be written to without changing it."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, trackfd=False)
    if len(_tracked) < _MOST_TRACKED:
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE)
        _tracked.add(mapping)
        return mapping
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if Reader(fd, size).readinto(memoryview(mapping)) < size:
        raise EOFError("the file is too short")
    return mapping
