"""How a worker sends: one frame at a time, from any thread, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from array import array
from collections import deque
from collections.abc import Sequence

from asyncguard.offloading._interrupt import Interrupts
from asyncguard.offloading._payload import Packed
from asyncguard.offloading._wire import Kind, encode

__all__ = ["Outlet"]

Pieces = Sequence[bytes | memoryview]


class Outlet:
    """The sending half of a worker's wire.

    Args:
        wire: The wire.
        interrupts: What must not be raised in the middle of a frame.
    """

    def __init__(self, wire: socket.socket, interrupts: Interrupts) -> None:
        self._wire: socket.socket | None = wire
        self._hold = interrupts.hold()
        self._lock = threading.RLock()
        self._outbox: deque[tuple[Pieces, list[int]]] = deque()
        self._is_sending = False

    def send(self, kind: Kind, call: int, packed: Packed, *, is_free: bool = False) -> None:
        """Send a frame, and wait until it is under way.

        Raises:
            OSError: If there is no room for the file that it needs.
            ConnectionError: If the server is gone.
        """
        with self._hold:
            wire = self._wire
            if wire is None:
                return
            pieces, descriptors = encode(kind, call, packed, is_free=is_free)
            with self._lock:
                # A signal handler of the function may log while a frame is being sent: after it, not inside.
                if self._is_sending:
                    self._outbox.append((pieces, descriptors))
                    return
                self._is_sending = True
                try:
                    _send(wire, pieces, descriptors)
                    while self._outbox:
                        _send(wire, *self._outbox.popleft())
                finally:
                    self._is_sending = False

    def disown(self) -> None:
        """In a child that the function has forked: the wire is its parent's, and nothing is sent."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()


def _send(wire: socket.socket, pieces: Pieces, descriptors: Sequence[int]) -> None:
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if not descriptors:
        _send_all(wire, data)
        return
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))]
    try:
        sent = wire.sendmsg([data], passed)
    finally:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    if sent < len(data):
        _send_all(wire, memoryview(data)[sent:])


def _send_all(wire: socket.socket, data: bytes | memoryview) -> None:
    try:
        wire.sendall(data)
    except BaseException:
        # Of a signal handler of the function's, say: nobody could tell what comes after this.
        with contextlib.suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)
        raise
