"""A zygote and its workers, driven through plain blocking sockets."""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from asyncguard.offloading._address import Address, address_of
from asyncguard.offloading._control import (
    Surroundings,
    WorkerSettings,
    passed_descriptors,
    receive_message,
    send_message,
)
from asyncguard.offloading._failure import unseal
from asyncguard.offloading._summons import Variable, pack_call
from asyncguard.offloading._wire import Decoder, Frame, Kind, encode

PATIENCE = 30.0
"""Seconds after which a test has failed."""

_START = "import sys; sys.path[:] = {path!r}; from asyncguard.offloading._zygote import main; main({fds})"


class Nursery:
    """One zygote."""

    def __init__(self, surroundings: Surroundings | None = None, **options: Any) -> None:
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.lifeline, lifeline = socket.socketpair()
        self.control.settimeout(PATIENCE)
        self.workers: list[Worker] = []
        self.exits: dict[int, int] = {}
        self.spoiled: list[str] = []
        self._tokens = 0
        with control, lifeline:
            start = _START.format(path=sys.path, fds=f"{control.fileno()}, {lifeline.fileno()}")
            self.process = subprocess.Popen(
                [sys.executable, "-c", start],
                stdin=subprocess.DEVNULL,
                pass_fds=(control.fileno(), lifeline.fileno()),
                process_group=0,
                **options,
            )
        self.send(surroundings or Surroundings.of_this_process())

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.close()
        self.control.close()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            self.lifeline.close()
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()
        for worker in self.workers:
            assert not is_alive(worker.pid)

    def send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        send_message(self.control, message, descriptors)

    def receive(self) -> tuple[Any, list[int]]:
        return receive_message(self.control)

    def ask(self, settings: WorkerSettings = WorkerSettings()) -> Worker:  # noqa: B008 (a tuple)
        self._tokens += 1
        worker = Worker(self, self._tokens)
        self.send(("fork", worker.token, settings), worker.theirs)
        return worker

    def fork(self, settings: WorkerSettings = WorkerSettings()) -> Worker:  # noqa: B008 (a tuple)
        worker = self.ask(settings)
        while True:
            message, descriptors = self.receive()
            if message[:2] == ("forked", worker.token):
                break
            self._note(message)
        worker.born(message[2], descriptors)
        self.workers.append(worker)
        ready = worker.frame()
        assert (ready.kind, ready.body.unpack(())) == (Kind.READY, [])
        return worker

    def exit_of(self, worker: Worker) -> int:
        while worker.pid not in self.exits:
            self._note(self.receive()[0])
        return self.exits[worker.pid]

    def _note(self, message: Any) -> None:
        match message:
            case ("exit", pid, code):
                self.exits[pid] = code
            case ("spoiled", module):
                self.spoiled.append(module)
            case _:
                raise AssertionError(message)


class Worker:
    """The server's side of one."""

    def __init__(self, nursery: Nursery, token: int) -> None:
        self.nursery = nursery
        self.token = token
        self.pid = 0
        self.calls = 0
        self.logs: list[dict[str, Any]] = []
        self.fractions: list[tuple[int, float]] = []
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self._pidfd = -1
        self.wire, wire = socket.socketpair()
        self.wire.settimeout(PATIENCE)
        self.lifeline, lifeline = socket.socketpair()
        page = os.memfd_create("page", os.MFD_CLOEXEC)
        os.ftruncate(page, 4096)
        self.page = mmap.mmap(page, 4096)
        self.trace = os.memfd_create("trace", os.MFD_CLOEXEC)
        self.theirs = [wire.detach(), lifeline.detach(), page, self.trace]

    def born(self, pid: int, descriptors: list[int]) -> None:
        (self._pidfd,) = descriptors
        self.pid = pid
        self.let_go()

    def let_go(self) -> None:
        for descriptor in self.theirs[:3]:
            os.close(descriptor)
        self.theirs = []

    def close(self) -> None:
        """Hang up, and wait for its end."""
        self.wire.close()
        self.wait()
        self._decoder.close()
        self.lifeline.close()
        self.page.close()
        if self.trace >= 0:
            os.close(self.trace)
            if self._pidfd >= 0:
                os.close(self._pidfd)
            self.trace = self._pidfd = -1

    def wait(self) -> None:
        """Until it has ended."""
        if self._pidfd >= 0 and not select.select([self._pidfd], [], [], PATIENCE)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError("a worker did not end")

    # -- calls -------------------------------------------------------------------------------------

    def send(
        self,
        function: Callable[..., Any] | Address,
        *args: Any,
        context: Sequence[Variable] = (),
        **kwargs: Any,
    ) -> int:
        address = function if isinstance(function, Address) else address_of(function)
        self.calls += 1
        pieces, descriptors = encode(Kind.CALL, self.calls, pack_call(address, args, kwargs, context))
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        data = b"".join(pieces)
        assert self.wire.sendmsg([data], passed) == len(data)
        for descriptor in descriptors:
            os.close(descriptor)
        return self.calls

    def frame(self) -> Frame:
        """The next frame.

        Raises:
            EOFError: If there will not be one.
        """
        while not self._frames:
            try:
                data, ancillary, _, _ = self.wire.recvmsg(1 << 16, 1024)
            except ConnectionError:
                raise EOFError from None
            if not data:
                raise EOFError
            self._frames = self._decoder.feed(data, passed_descriptors(ancillary))
        return self._frames.pop(0)

    def answer(self) -> tuple[Kind, Any]:
        """The answer to the call; what else comes is kept."""
        while True:
            kind, call, body = self.frame()
            if kind is Kind.LOG:
                (message,) = body.unpack(("it",))
                assert isinstance(message, dict)
                self.logs.append(message)
            elif kind is Kind.PROGRESS:
                (fraction,) = body.unpack(("it",))
                assert isinstance(fraction, float)
                self.fractions.append((call, fraction))
            else:
                assert call == self.calls
                return kind, unseal(body) if kind is Kind.ERROR else body.unpack(("it",))[0]

    def call(self, function: Callable[..., Any] | Address, *args: Any, **kwargs: Any) -> Any:
        """What it returns; raises what it raises."""
        self.send(function, *args, **kwargs)
        kind, value = self.answer()
        if kind is Kind.ERROR:
            raise value
        assert kind is Kind.RESULT, value
        return value

    def progress(self) -> float:
        """Wait until the function reports some."""
        frame = self.frame()
        assert frame.kind is Kind.PROGRESS, frame
        (fraction,) = frame.body.unpack(("it",))
        assert isinstance(fraction, float)
        return fraction

    def records(self) -> list[logging.LogRecord]:
        return [logging.makeLogRecord(message) for message in self.logs]

    def aim(self, call: int) -> None:
        self.page[0:8] = call.to_bytes(8, "little")

    def signal(self, number: int = signal.SIGUSR1) -> None:
        os.kill(self.pid, number)

    def interrupt(self, call: int | None = None) -> None:
        self.aim(self.calls if call is None else call)
        self.signal()

    def stack(self) -> str:
        return os.pread(self.trace, 1 << 16, 0).decode()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
