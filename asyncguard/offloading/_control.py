"""What a server and its zygote say to each other, message by message.

To the zygote, first a `Surroundings`; then

- ``("preload", [module, ...])``
- ``("fork", token, WorkerSettings)`` and four descriptors: wire, lifeline, page and trace;
- ``("become", token, WorkerSettings)`` and the same: it is to be that worker itself from now on.

And from it:

- ``("forked", token, pid)``, with a descriptor of the process where the system has them: the worker is there;
- ``("failed", token, reason)``: there will be none;
- ``("exit", pid, exit code)``, negative for the number of a signal;
- ``("spoiled", module)``: the import of that module left threads or open descriptors behind, which a fork
  would break. All that is asked of it from then on fails; it only waits for the workers that it has.

Each is one message on a socket of type `SOCK_SEQPACKET`.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from asyncguard.offloading import _main_module
from asyncguard.offloading._main_module import MainModule

__all__ = [
    "RECEIVE_FLAGS",
    "TRUNCATED",
    "Surroundings",
    "WorkerSettings",
    "passed_descriptors",
    "receive_message",
    "send_message",
]

_DESCRIPTOR = array("i").itemsize
_MOST = 1 << 20
_ROOM = socket.CMSG_SPACE(8 * _DESCRIPTOR)

RECEIVE_FLAGS: int = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
"""What to receive descriptors with, lest a program that a function starts inherits them."""
TRUNCATED: int = int(socket.MSG_CTRUNC)
"""What `recvmsg` says when descriptors were lost."""


class Surroundings(NamedTuple):
    """What a process has to have in common with the server for imports to find the same.

    Attributes:
        path: `sys.path`.
        cwd: The current directory; `None` if it is gone.
        argv: `sys.argv`.
        main: What the server runs as its main module; `None` if that cannot be imported again.
    """

    path: list[str]
    cwd: str | None
    argv: list[str]
    main: MainModule | None

    @classmethod
    def of_this_process(cls) -> Surroundings:
        """Those of the process that calls it.

        Raises:
            RuntimeError: If this is a worker that imports the main module: to start workers then would
                never end.
        """
        _main_module.refuse_while_loading()
        try:
            cwd = os.getcwd()
        except OSError:
            cwd = None
        return cls([*map(str, sys.path)], cwd, [*sys.argv], _main_module.of_this_process())


class WorkerSettings(NamedTuple):
    """What is particular about a worker.

    Attributes:
        nice: By how much it is nicer than the zygote.
        log_level: The level of its root logger.
        modules: What it imports before it is ready. One that cannot be imported does no harm.
    """

    nice: int = 0
    log_level: int = 0
    modules: tuple[str, ...] = ()


def send_message(sock: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    """Send one message; the descriptors stay open here.

    Raises:
        OSError: If the other side is gone.
    """
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    sock.sendmsg([pickle.dumps(message)], passed)


def receive_message(sock: socket.socket) -> tuple[object, list[int]]:
    """Wait for a message; returns it and the descriptors that came with it, which are the caller's now.

    Raises:
        EOFError: If the other side is gone.
    """
    try:
        data, ancillary, _, _ = sock.recvmsg(_MOST, _ROOM, RECEIVE_FLAGS)
    except ConnectionError:
        data, ancillary = b"", []
    descriptors = passed_descriptors(ancillary)
    if not data:
        raise EOFError
    return pickle.loads(data), descriptors  # noqa: S301 (the other side is our own)


def passed_descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors among what `recvmsg` returns as ancillary data."""
    found = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % _DESCRIPTOR])
    return found.tolist()
