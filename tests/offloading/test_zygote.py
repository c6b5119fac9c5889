"""The zygote forks what it is asked for, and imports what does no harm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncguard.offloading._address import Address
from asyncguard.offloading._control import Surroundings, WorkerSettings
from tests.offloading import chores
from tests.offloading.nursery import PATIENCE, Nursery, is_alive


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where modules are found."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


# -- workers -----------------------------------------------------------------------------------------


def test_workers_are_its_children(nursery: Nursery) -> None:
    workers = [nursery.fork() for _ in range(3)]
    for worker in workers:
        assert worker.call(chores.pid) == worker.pid
        assert worker.call(os.getppid) == nursery.process.pid
        assert worker.call(os.getpgrp) == nursery.process.pid


def test_it_tells_of_those_that_end(nursery: Nursery) -> None:
    workers = [nursery.fork() for _ in range(6)]
    codes = {worker.pid: code for code, worker in enumerate(workers)}
    for worker in workers[:3]:
        worker.send(chores.leave_hard, codes[worker.pid])
    for worker in workers[3:]:
        codes[worker.pid] = -signal.SIGKILL
        worker.signal(signal.SIGKILL)
    for worker in workers:
        assert nursery.exit_of(worker) == codes[worker.pid]
        assert not os.path.exists(f"/proc/{worker.pid}")


def test_a_request_without_descriptors(nursery: Nursery) -> None:
    nursery.send(("fork", 77, WorkerSettings()))
    assert nursery.receive() == (("failed", 77, "it was not given its descriptors"), [])
    nursery.send(("nonsense",))
    nursery.send("nonsense")
    assert nursery.fork().call(chores.add, 1) == 1


def test_a_fork_that_fails(tmp_path: Path, modules: Path) -> None:
    (modules / "no_more.py").write_text(
        "import os\ndef fork():\n    raise BlockingIOError(11, 'no more processes')\nos.fork = fork\n"
    )
    with Nursery() as nursery:
        nursery.send(("preload", ["no_more"]))
        worker = nursery.ask()
        assert nursery.receive()[0] == ("failed", worker.token, "[Errno 11] no more processes")
        worker.let_go()
        worker.close()


def test_it_keeps_no_descriptors(nursery: Nursery) -> None:
    def count() -> int:
        return len(os.listdir(f"/proc/{nursery.process.pid}/fd"))

    first = nursery.fork()
    first.close()
    nursery.exit_of(first)
    before = count()
    workers = [nursery.fork() for _ in range(5)]
    for worker in workers:
        worker.close()
        nursery.exit_of(worker)
    assert count() == before


def test_it_ends_when_the_server_hangs_up() -> None:
    with Nursery() as nursery:
        worker = nursery.fork()
        nursery.control.close()
        assert nursery.process.wait(PATIENCE) == 0
        assert worker.call(chores.add, 1) == 1, "workers do not depend on it"


def test_it_ends_when_its_lifeline_is_cut() -> None:
    with Nursery() as nursery:
        worker = nursery.fork()
        nursery.lifeline.close()
        assert nursery.process.wait(PATIENCE) == -signal.SIGKILL
        assert worker.call(chores.add, 1) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_the_server_are_none_of_its_business(nursery: Nursery, number: int) -> None:
    nursery.fork()
    nursery.process.send_signal(number)
    assert nursery.fork().call(chores.add, 1) == 1
    assert nursery.process.poll() is None


def test_blocked_signals_are_not_inherited() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGCHLD])
    try:
        nursery = Nursery()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with nursery:
        worker = nursery.fork()
        worker.send(chores.swallow)
        worker.progress()
        worker.interrupt()
        assert worker.answer()[1] == "Interrupted"


# -- surroundings ------------------------------------------------------------------------------------


def test_imports_find_what_the_server_finds(tmp_path: Path, modules: Path) -> None:
    (modules / "mine.py").write_text("import os, sys\ndef f():\n    return os.getcwd(), sys.argv, sys.path\n")
    here = Surroundings.of_this_process()
    changed = here._replace(cwd=str(tmp_path), argv=["prog", "--option"], path=[str(modules), *here.path])
    with Nursery(changed) as nursery:
        found = nursery.fork().call(Address("mine", "f", 0))
    assert found == (str(tmp_path), ["prog", "--option"], changed.path)


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with Nursery(Surroundings.of_this_process()._replace(cwd=str(gone))) as nursery:
        assert nursery.fork().call(os.getcwd) == os.getcwd()
    with Nursery(Surroundings.of_this_process()._replace(cwd=None)) as nursery:
        assert nursery.fork().call(os.getcwd) == os.getcwd()


def test_the_server_has_lost_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Surroundings.of_this_process().cwd is None


# -- imports -----------------------------------------------------------------------------------------


def test_what_is_preloaded_is_there_in_workers(nursery: Nursery, modules: Path) -> None:
    first = nursery.fork()
    nursery.send(("preload", ["colorsys", "wave"]))
    second = nursery.fork()
    assert not first.call(chores.is_imported, "colorsys")
    assert second.call(chores.is_imported, "colorsys")
    assert second.call(chores.is_imported, "wave")


def test_what_it_prints_is_printed_once(modules: Path) -> None:
    (modules / "talker.py").write_text("print('hello')\n")
    with Nursery(stdout=subprocess.PIPE) as nursery:
        nursery.send(("preload", ["talker"]))
        for _ in range(2):
            nursery.fork().close()
        assert nursery.process.stdout is not None
        assert os.read(nursery.process.stdout.fileno(), 100) == b"hello\n"


SPOILERS = {
    "starter": """
import threading
stop = threading.Event()
thread = threading.Thread(target=stop.wait, args=(60,))
thread.start()
""",
    "opener": "import socket\nours, theirs = socket.socketpair()\n",
    "failing_starter": "import threading\nthreading.Thread(target=threading.Event().wait).start()\n1/0\n",
}


@pytest.mark.parametrize("module", SPOILERS)
def test_a_module_that_a_fork_would_break(modules: Path, module: str) -> None:
    (modules / f"{module}.py").write_text(SPOILERS[module])
    with Nursery() as nursery:
        first = nursery.fork()
        nursery.send(("preload", ["colorsys", module, "wave"]))
        assert nursery.receive() == (("spoiled", module), [])
        second = nursery.ask()
        (message, token, reason), _ = nursery.receive()
        assert (message, token) == ("failed", second.token)
        assert f"the import of {module} left threads or open descriptors behind" in reason
        second.let_go()
        second.close()
        assert first.call(chores.add, 1) == 1
        first.close()
        assert nursery.exit_of(first) == 0


def test_a_module_that_changes_what_signals_do(modules: Path) -> None:
    (modules / "meddler.py").write_text(
        "import signal, subprocess\n"
        "for number in signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1:\n"
        "    signal.signal(number, signal.SIG_DFL)\n"
        "signal.set_wakeup_fd(-1)\n"
        "subprocess.run(['true'])\n"
    )
    with Nursery() as nursery:
        nursery.send(("preload", ["meddler"]))
        worker = nursery.fork()
        nursery.process.send_signal(signal.SIGTERM)
        worker.signal(signal.SIGTERM)
        worker.signal(signal.SIGUSR1)
        assert worker.call(chores.add, 1) == 1
        worker.signal(signal.SIGKILL)
        assert nursery.exit_of(worker) == -signal.SIGKILL


def test_a_module_that_waits_for_all_children(modules: Path) -> None:
    (modules / "waiter.py").write_text(
        "import os\nwhile True:\n    try:\n        os.wait()\n    except ChildProcessError:\n        break\n"
    )
    with Nursery() as nursery:
        worker = nursery.fork()
        worker.send(chores.leave_hard, 3)
        worker.wait()
        time.sleep(0.05)
        nursery.send(("preload", ["waiter"]))
        assert nursery.exit_of(worker) in (0, 3)


def test_a_server_that_is_gone_at_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline, their_lifeline = socket.socketpair()
    with ours, theirs, lifeline, their_lifeline:
        fds = (theirs.fileno(), their_lifeline.fileno())
        code = f"from asyncguard.offloading._zygote import main; main{fds}"
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=fds)
        theirs.close()
        their_lifeline.close()
        ours.close()
        lifeline.close()
        assert process.wait(PATIENCE) in (0, 1, -signal.SIGKILL)
        assert not is_alive(process.pid)
