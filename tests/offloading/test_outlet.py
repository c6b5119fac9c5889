"""Frames go out whole, whoever sends while another is being sent."""

from __future__ import annotations

import mmap
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from asyncguard.offloading._interrupt import Interrupts
from asyncguard.offloading._outlet import Outlet
from asyncguard.offloading._payload import pack
from asyncguard.offloading._wire import Kind
from tests.offloading import chores
from tests.offloading.nursery import Nursery, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Nursery() as nursery:
        yield nursery.fork()


def test_a_signal_handler_that_logs(worker: Worker) -> None:
    count = worker.call(chores.log_in_handler)
    assert count >= 100
    texts = [record.getMessage()[:6] for record in worker.records()]
    assert texts.count("alarm ") == count
    assert set(texts) == {"alarm ", "plain "}


def test_a_reader_that_is_slow(worker: Worker) -> None:
    """More than the socket's buffer holds, and nobody reads until the function has filled it."""
    worker.send(chores.log_from_threads, 4, 200)
    worker.signal(signal.SIGUSR1)
    kind, value = worker.answer()
    assert (kind, len(value)) == (Kind.RESULT, 200_000)
    assert len(worker.logs) == 800


def test_after_half_a_frame_nothing_follows() -> None:
    """A signal handler of the function may raise in the middle of one, as those of timeouts do."""

    class Interrupted(socket.socket):
        def sendall(self, data: Any, flags: int = 0) -> None:
            self.send(data[:5])
            raise KeyError

    ours, theirs = socket.socketpair()
    with ours, Interrupted(fileno=theirs.detach()) as wire:
        outlet = Outlet(wire, Interrupts(memory()))
        with pytest.raises(KeyError):
            outlet.send(Kind.LOG, 0, pack(()))
        assert len(ours.recv(1000)) == 5
        assert ours.recv(1000) == b""


def test_what_is_disowned_sends_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outlet = Outlet(theirs, Interrupts(memory()))
        outlet.send(Kind.READY, 0, pack(()))
        assert ours.recv(1000)
        outlet.disown()
        outlet.disown()
        outlet.send(Kind.READY, 0, pack(()))
        assert ours.recv(1000) == b""


def memory() -> mmap.mmap:
    return mmap.mmap(-1, 4096)
