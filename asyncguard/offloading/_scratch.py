"""Files for large arguments, written again when a worker has done with them.

The system takes several times as long to find memory for a new file as to copy something into an old one.
"""

from __future__ import annotations

import os
import threading

from asyncguard.offloading._loops import Loop, Revocable
from asyncguard.offloading._nameless import Descriptor, create

__all__ = ["ScratchFiles"]

_MOST = 256 << 20
"""So many bytes are kept at most."""
_MOST_FILES = 8
_KEPT_FOR = 5.0
"""Seconds after which the memory is given back."""


class ScratchFiles:
    """Those of one pool.

    Args:
        loop: The pool's loop.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._free: list[tuple[int, Descriptor]] = []
        self._timer: Revocable | None = None
        self._is_closed = False

    def take(self, size: int) -> int:
        """A file to write `size` bytes to, from its beginning. May be called in any thread.

        Returns:
            Its descriptor, which is the caller's. What is in it may be from before.

        Raises:
            OSError: If the system has none.
        """
        with self._lock:
            if not self._free:
                return create()
            # The smallest that is large enough, else the largest.
            fitting = [found for found in self._free if found[0] >= size]
            found = min(fitting or [max(self._free, key=_size)], key=_size)
            self._free.remove(found)
        fd = os.dup(found[1].fd)
        try:
            os.ftruncate(fd, size)
            os.lseek(fd, 0, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def give(self, file: Descriptor) -> None:
        """Nobody reads this file any more, here or in a worker."""
        size = os.fstat(file.fd).st_size
        with self._lock:
            if self._is_closed or len(self._free) >= _MOST_FILES:
                return
            if size + sum(map(_size, self._free)) > _MOST:
                return
            self._free.append((size, file))
        if self._timer is None:
            self._timer = self._loop.call_later(_KEPT_FOR, self._forget)

    def _forget(self) -> None:
        self._timer = None
        with self._lock:
            self._free.clear()

    def close(self) -> None:
        """Keep none from now on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            self._is_closed = True
            self._free.clear()

    def disown(self) -> None:
        """In a forked child, where another thread may have had the lock."""
        self._is_closed = True
        self._free = []


def _size(found: tuple[int, Descriptor]) -> int:
    return found[0]
