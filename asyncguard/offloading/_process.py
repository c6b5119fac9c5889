"""A worker process as its parent sees it: what goes to it and comes from it, and how it is stopped.

Which call it runs is `_dispatcher`'s business, how it was started `_spawner`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import signal
import socket
import sys
import traceback
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from asyncguard.offloading._control import RECEIVE_FLAGS, TRUNCATED, passed_descriptors
from asyncguard.offloading._loops import Loop, Revocable
from asyncguard.offloading._nameless import create
from asyncguard.offloading._wire import Decoder, Frame, WireError

__all__ = ["PAGE_SIZE", "Piece", "WorkerProcess"]

PAGE_SIZE = 4096
_SYSTEM_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHUNK = 1 << 16
_ROOM = socket.CMSG_SPACE(8 * array("i").itemsize)
_MOST_OF_A_STACK = 1 << 16
_CRASH = "Fatal Python error: "
_OURS = str(Path(__file__).with_name("_worker.py"))

Piece = bytes | memoryview


class Listener(Protocol):
    """Who hears of a worker."""

    def on_frame(self, process: WorkerProcess, frame: Frame) -> None:
        """It has sent something."""

    def on_hangup(self, process: WorkerProcess) -> None:
        """It will send nothing more. Called once."""


class WorkerProcess:
    """One worker: its socket, its lifeline, and the two files that are shared with it.

    Args:
        loop: The loop of the pool.
        listener: Who hears of it.
        token: What it is known by until it has an id.

    Attributes:
        pid: Its process id, once it runs.
        is_ready: Whether it has said that it takes calls.
        is_doomed: Whether it was told to be killed.
        is_recycled: Whether it was let go of after its share of calls, or for its memory.
        calls: How many it was given.
        patience: The timer of whoever waits for it to obey.
        exit_code: What it ended with; `None` while that is not known.
    """

    def __init__(self, loop: Loop, listener: Listener, token: int) -> None:
        self.token = token
        self.pid: int | None = None
        self.is_ready = False
        self.is_doomed = False
        self.is_recycled = False
        self.calls = 0
        self.patience: Revocable | None = None
        self.exit_code: int | None = None
        self._loop = loop
        self._listener = listener
        self._decoder = Decoder()
        self._outbox: list[tuple[Piece, list[int]]] = []
        self._pidfd: int | None = None
        self._hung_up = False
        self._stack_read = 0
        with contextlib.ExitStack() as opened:
            self._wire, theirs = socket.socketpair()
            opened.callback(self._wire.close)
            opened.callback(theirs.close)
            self._wire.setblocking(False)
            self._lifeline, their_lifeline = socket.socketpair()
            opened.callback(self._lifeline.close)
            opened.callback(their_lifeline.close)
            page = create(name="asyncguard-page")
            opened.callback(os.close, page)
            os.ftruncate(page, PAGE_SIZE)
            self._page = mmap.mmap(page, PAGE_SIZE)
            self._trace = create(name="asyncguard-trace")
            opened.callback(os.close, self._trace)
            loop.add_reader(self._wire, self._read)
            opened.pop_all()
        self._theirs: tuple[socket.socket, socket.socket, int] | None = (theirs, their_lifeline, page)

    @property
    def has_hung_up(self) -> bool:
        """Whether nothing is heard of it any more."""
        return self._hung_up

    # -- its start ---------------------------------------------------------------------------------

    @property
    def descriptors(self) -> list[int]:
        """What the child is given: wire, lifeline, page, trace."""
        assert self._theirs is not None
        theirs, lifeline, page = self._theirs
        return [theirs.fileno(), lifeline.fileno(), page, self._trace]

    def let_go(self) -> None:
        """The child has got its descriptors, or never will."""
        if self._theirs is not None:
            theirs, lifeline, page = self._theirs
            self._theirs = None
            theirs.close()
            lifeline.close()
            os.close(page)

    def started(self, pid: int, pidfd: int | None) -> None:
        """It runs.

        Args:
            pid: Its process id.
            pidfd: What names it even when that id has been given to another.
        """
        self.pid, self._pidfd = pid, pidfd

    # -- how it is -----------------------------------------------------------------------------------

    @property
    def resident(self) -> int:
        """The bytes of memory that it has; 0 where that is not known."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * _SYSTEM_PAGE
        except (OSError, ValueError, IndexError):
            return 0

    @property
    def ending(self) -> str:
        """How it ended."""
        if self.exit_code is None:
            return "ended"
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code}"
        number = -self.exit_code
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        hint = "; if nobody did that, the system was out of memory" if number == signal.SIGKILL else ""
        return f"was ended by {name}{hint}"

    # -- what is sent and received -----------------------------------------------------------------

    def send(self, pieces: Sequence[Piece], descriptors: list[int]) -> bool:
        """Send it a frame; the descriptors are closed when they are through.

        Returns:
            Whether it was there: if not, nothing of the frame has left.
        """
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            sent = self._try(data, descriptors)
        except OSError:
            return False
        if sent < len(data):
            self._outbox.append((data[sent:], descriptors))
            self._loop.add_writer(self._wire, self._write)
        return True

    def _try(self, data: Piece, descriptors: list[int]) -> int:
        """How many bytes went out. The descriptors go with the first."""
        try:
            if descriptors:
                passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))]
                sent = self._wire.sendmsg([data], passed)
                close_all(descriptors)
                return sent
            return self._wire.send(data)
        except BlockingIOError:
            return 0

    def _write(self) -> None:
        while self._outbox:
            data, descriptors = self._outbox[0]
            try:
                sent = self._try(data, descriptors)
            except OSError:  # the hangup will be heard
                break
            if sent < len(data):
                self._outbox[0] = (data[sent:], descriptors)
                return
            del self._outbox[0]
        self._loop.remove_writer(self._wire)

    def _read(self) -> None:
        self.read_once()

    def read_once(self) -> bool:
        """Take in what has come; returns whether there was anything."""
        if self._hung_up:
            return False
        try:
            data, ancillary, flags, _ = self._wire.recvmsg(_CHUNK, _ROOM, RECEIVE_FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            data, ancillary, flags = b"", [], 0
        try:
            frames = self._decoder.feed(data, passed_descriptors(ancillary) if ancillary else ())
            if flags & TRUNCATED:  # we have no descriptors left, and have lost some
                data = b""
        except WireError:
            data, frames = b"", []
        for frame in frames:
            try:
                self._listener.on_frame(self, frame)
            except Exception:  # those behind it may be answers
                traceback.print_exc()
        if not data:
            self.hang_up()
        return bool(data)

    def drain(self) -> None:
        """It has ended: take in what it sent before."""
        while self.read_once():
            pass
        self.hang_up()

    def hang_up(self) -> None:
        """Nothing is heard of it from now on."""
        if not self._hung_up:
            self._hung_up = True
            self._loop.close(self._wire)
            self._decoder.close()
            for _, descriptors in self._outbox:
                close_all(descriptors)
            self._outbox.clear()
            self._listener.on_hangup(self)

    # -- how it is stopped -------------------------------------------------------------------------

    def interrupt(self, call: int) -> None:
        """Raise an exception in the function that it runs, if it is still that call."""
        self._page[0:8] = call.to_bytes(8, sys.byteorder)
        self._signal(signal.SIGUSR1)

    def ask_stack(self) -> None:
        """Have it write down what it is doing; `read_stack` has it a moment later."""
        # Not what it was doing when it was asked for another call, and answered too late. The place where it
        # writes is one for both of us.
        os.ftruncate(self._trace, 0)
        os.lseek(self._trace, 0, os.SEEK_SET)
        self._stack_read = 0
        self.ask_stack_again()

    def ask_stack_again(self) -> None:
        """Have it write it down, if it has not heard; what it may have written just now stays, and counts."""
        self._signal(signal.SIGUSR2)

    @property
    def has_stack(self) -> bool:
        """Whether it has written down anything since the last time that was read."""
        return self._trace >= 0 and os.fstat(self._trace).st_size > self._stack_read

    def read_stack(self) -> str:
        """What it has written down since the last time; the first of it, if it was asked more than once."""
        head, *tail = self._read_trace().strip().splitlines() or [""]
        stack = itertools.takewhile(lambda line: line != head, tail)
        return _of_the_user("\n".join([head, *stack]))

    def _read_trace(self) -> str:
        try:
            text = os.pread(self._trace, _MOST_OF_A_STACK, self._stack_read)
        except OSError:
            return ""
        self._stack_read += len(text)
        return text.decode(errors="replace")

    def read_crash(self) -> str:
        """What it has written down as it crashed; nothing, if it had no time for that."""
        # What it was asked for may be there as well, if nobody has read it.
        _, crash, text = self._read_trace().rpartition(_CRASH)
        return _of_the_user(text.partition("\n")[2]) if crash else ""

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.pid is None or self.exit_code is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)

    def close(self) -> None:
        """Let go of everything. If it still runs, that ends it."""
        self.kill()
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None
        if not self._hung_up:
            self._hung_up = True
            self._loop.close(self._wire)
        self.disown()

    def disown(self) -> None:
        """Close all that is open, which in a forked child does nothing to the worker."""
        self._hung_up = True
        self._wire.close()
        self._decoder.close()
        self.let_go()
        for _, descriptors in self._outbox:
            close_all(descriptors)
        self._outbox.clear()
        self._lifeline.close()
        self._page.close()
        if self._trace >= 0:
            os.close(self._trace)
            self._trace = -1
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.pid = None  # it may be another's soon: from now on nobody is sent a signal


def _of_the_user(stack: str) -> str:
    """A stack as faulthandler writes it, without the worker's own lines at its outer end."""
    lines = stack.strip().splitlines()
    end = max((index for index, line in enumerate(lines) if _OURS in line), default=len(lines))
    while 0 < end < len(lines) and _OURS in lines[end - 1]:
        end -= 1
    return "\n".join(lines[:end]) if end > 1 else ""  # without the user's lines there is nothing to tell


def close_all(descriptors: list[int]) -> None:
    """Close them, and forget them."""
    while descriptors:
        os.close(descriptors.pop())
