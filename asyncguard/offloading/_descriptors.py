"""Which descriptors this process has open, and whether it can pass them to another."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Collection

__all__ = ["close_others", "open_descriptors", "passes_descriptors"]

_FOLDER = "/dev/fd"

_NEEDED = (
    (socket, ("AF_UNIX", "CMSG_SPACE", "MSG_CTRUNC", "SCM_RIGHTS", "SOCK_SEQPACKET")),
    (socket.socket, ("recvmsg", "sendmsg")),
    (os, ("fork", "memfd_create")),
    (signal, ("SIGUSR1", "SIGUSR2", "pthread_sigmask", "set_wakeup_fd")),
)


def passes_descriptors() -> bool:
    """Whether this system has what worker processes of our own are made of.

    Above all, sockets on which descriptors are passed from one process to another, and files without names to
    pass. Windows has neither, macOS not all.
    """
    return all(hasattr(owner, name) for owner, names in _NEEDED for name in names)


def open_descriptors() -> set[int]:
    """All of them."""
    folder = os.open(_FOLDER, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return {int(name) for name in os.listdir(folder)} - {folder}
    finally:
        os.close(folder)


def close_others(keep: Collection[int]) -> None:
    """Close all but some, and but those of standard input, output and error."""
    for descriptor in open_descriptors():
        if descriptor > 2 and descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)
