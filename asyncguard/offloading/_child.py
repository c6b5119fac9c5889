"""A Python process that the server starts by exec, and then tells what to be: see `_control`."""

from __future__ import annotations

import contextlib
import pickle
import socket
import subprocess
import sys
from array import array
from typing import Protocol

import anyio
import anyio.to_thread

from asyncguard.offloading._control import RECEIVE_FLAGS, passed_descriptors
from asyncguard.offloading._loops import Loop

__all__ = ["Child", "Nursery", "wait_for"]

_MOST = 1 << 16
_ROOM = socket.CMSG_SPACE(array("i").itemsize)
_ENDED_WITHIN = 2.0
_START = (
    "'asyncguard offload'; import sys; sys.path[:] = {path!r}; "
    "from asyncguard.offloading._zygote import main; main({fd}, {lifeline})"
)


class Nursery(Protocol):
    """Who hears of what has become of the workers."""

    def on_started(self, token: int, pid: int, pidfd: int | None) -> None: ...

    def on_not_started(self, token: int, reason: str) -> None: ...

    def on_exit(self, pid: int, exit_code: int) -> None: ...


class Owner(Protocol):
    """Who hears of what such a process says."""

    def on_message(self, child: Child, message: object, descriptors: list[int]) -> None:
        """It has said something. The descriptors that came with it are the owner's now."""

    def on_lost(self, child: Child) -> None:
        """It will say nothing more."""


class Child:
    """One such process.

    Args:
        loop: The loop of the pool.
        owner: Who hears of what it says.

    Attributes:
        process: The process.

    Raises:
        OSError: If it cannot be started.
    """

    def __init__(self, loop: Loop, owner: Owner) -> None:
        self._loop = loop
        self._owner = owner
        self._outbox: list[tuple[bytes, list[int]]] = []
        with contextlib.ExitStack() as opened:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.callback(self._control.close)
            opened.callback(theirs.close)
            self._lifeline, their_lifeline = socket.socketpair()
            opened.callback(self._lifeline.close)
            self._control.setblocking(False)
            with theirs, their_lifeline:
                start = _START.format(path=sys.path, fd=theirs.fileno(), lifeline=their_lifeline.fileno())
                self.process = subprocess.Popen(
                    [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", start],  # type: ignore[attr-defined]
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), their_lifeline.fileno()),
                    process_group=0,
                )
            loop.add_reader(self._control, self.read)
            opened.pop_all()

    def send(self, message: object, descriptors: list[int] | None = None) -> None:
        """Send it a message; the descriptors stay open here."""
        self._outbox.append((pickle.dumps(message), descriptors or []))
        if len(self._outbox) == 1:
            self._write()
            if self._outbox:
                self._loop.add_writer(self._control, self._write)

    def _write(self) -> None:
        while self._outbox:
            data, descriptors = self._outbox[0]
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
            try:
                self._control.sendmsg([data], passed)
            except BlockingIOError:
                return
            except OSError:  # it is gone, or there is no room: either way it will be heard that it ended
                self._outbox.clear()
                with contextlib.suppress(OSError):
                    self._control.shutdown(socket.SHUT_RDWR)
                break
            del self._outbox[0]
        with contextlib.suppress(ValueError, OSError):
            self._loop.remove_writer(self._control)

    def read(self) -> None:
        """Take in what it has said."""
        while self._control.fileno() >= 0:
            try:
                data, ancillary, _, _ = self._control.recvmsg(_MOST, _ROOM, RECEIVE_FLAGS)
            except BlockingIOError:
                return
            except OSError:
                data, ancillary = b"", []
            if data:
                message = pickle.loads(data)  # noqa: S301 (it is our own)
                self._owner.on_message(self, message, passed_descriptors(ancillary))
            else:
                self._hang_up()
                self._owner.on_lost(self)

    def _hang_up(self) -> None:
        self._loop.close(self._control)
        self._outbox.clear()

    def close(self) -> None:
        """Let go of it. It ends then, unless it has become a worker, which has a lifeline of its own."""
        self._hang_up()
        self._lifeline.close()

    def abandon(self) -> None:
        """The loop is gone: end it without that."""
        self._close_all()
        self.process.kill()
        self.process.wait()

    def disown(self) -> None:
        """In a forked child: it is the parent's."""
        self._close_all()
        self.process.returncode = 0  # lest it be waited for

    def _close_all(self) -> None:
        self._control.close()
        self._lifeline.close()


async def wait_for(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process that was let go of; see to it if need be."""
    limiter = anyio.CapacityLimiter(1)  # the application's threads may all be busy
    with contextlib.suppress(subprocess.TimeoutExpired):
        await anyio.to_thread.run_sync(process.wait, _ENDED_WITHIN, limiter=limiter)
    if process.poll() is None:
        process.kill()
        await anyio.to_thread.run_sync(process.wait, limiter=limiter)
