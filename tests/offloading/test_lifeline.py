"""A process ends when the one ends that holds the other end of its lifeline."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from asyncguard.offloading import _lifeline
from tests.offloading.nursery import PATIENCE, is_alive

CODE = """
import sys, time
from asyncguard.offloading import _lifeline
if {no_signal}:
    _lifeline._ask_for_signal = lambda lifeline: False
_lifeline.arm({lifeline})
print("armed", flush=True)
{then}
"""


def start(then: str, lifeline: socket.socket, *, no_signal: bool = False) -> subprocess.Popen[bytes]:
    code = CODE.format(then=then, lifeline=lifeline.fileno(), no_signal=no_signal)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=(lifeline.fileno(),)
    )


@pytest.mark.parametrize("then", ["time.sleep(60)", "sum(range(10**12))"])
def test_it_ends_whatever_it_does(then: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, start(then, theirs) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"armed\n"
        theirs.close()
        assert process.poll() is None
        ours.close()
        assert process.wait(PATIENCE) == -signal.SIGKILL


def test_where_the_system_sends_no_signal_a_thread_waits() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, start("time.sleep(60)", theirs, no_signal=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"armed\n"
        theirs.close()
        ours.close()
        assert process.wait(PATIENCE) == 1


def test_an_end_that_was_closed_before() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, start("", theirs) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b""
        assert process.wait(PATIENCE) in (1, -signal.SIGKILL)


def test_whether_it_is_cut() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not _lifeline.is_cut(theirs.fileno())
        ours.close()
        assert _lifeline.is_cut(theirs.fileno())


def test_a_system_that_knows_no_such_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert not _lifeline._ask_for_signal(0)
    monkeypatch.delattr(fcntl, "F_SETSIG")
    assert not _lifeline._ask_for_signal(0)


SERVER = """
import os, time
from tests.offloading import chores
from tests.offloading.nursery import Nursery
nursery = Nursery()
workers = [nursery.fork() for _ in range(3)]
for worker, function in zip(workers, [chores.count_in_c, chores.spin]):
    worker.send(function)
    worker.progress()
print(os.getpid(), nursery.process.pid, *(worker.pid for worker in workers), flush=True)
time.sleep(60)
"""


def test_nothing_outlives_a_server_that_is_killed() -> None:
    """Not even a worker that never lets go of the GIL."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pids = [int(word) for word in server.stdout.readline().split()]
        assert len(pids) == 5
        named = [os.pidfd_open(pid) for pid in pids]
        try:
            assert all(map(is_alive, pids))
            server.kill()
            end = time.monotonic() + PATIENCE
            for each in named:
                assert select.select([each], [], [], end - time.monotonic())[0]
        finally:
            for each in named:
                os.close(each)
            for pid in pids:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
