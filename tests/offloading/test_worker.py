"""A worker answers, call after call, whatever functions do."""

from __future__ import annotations

import array
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncguard.offloading._address import Address
from asyncguard.offloading._control import WorkerSettings
from asyncguard.offloading._payload import pack
from asyncguard.offloading._summons import Variable
from asyncguard.offloading._wire import Kind, encode
from tests.offloading import chores
from tests.offloading.nursery import PATIENCE, Nursery, Worker


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def worker(nursery: Nursery) -> Iterator[Worker]:
    worker = nursery.fork()
    yield worker
    worker.close()


# -- answers -----------------------------------------------------------------------------------------


def test_results(worker: Worker) -> None:
    assert worker.call(chores.add, 1) == 1
    assert worker.call(chores.add, 1, b=2) == 3
    assert worker.call(chores.add, a=1, b=2) == 3
    assert worker.call(chores.pid) == worker.pid


@pytest.mark.parametrize("size", [0, 1000, 200_000, 5_000_000])
def test_values_of_any_size(worker: Worker, size: int) -> None:
    value = np.arange(size, dtype=np.uint8)
    returned = worker.call(chores.same, value)
    assert (returned == value).all()
    returned[:1] = 1


def test_what_the_function_raises(worker: Worker) -> None:
    with pytest.raises(ValueError, match="no good") as caught:
        worker.call(chores.fail, "no good")
    trace = str(caught.value.__cause__)
    assert "in fail" in trace
    assert "_worker.py" not in trace


def test_a_keyboard_interrupt_is_an_exception_like_any_other(worker: Worker) -> None:
    with pytest.raises(KeyboardInterrupt):
        worker.call(chores.press_ctrl_c)
    assert worker.call(chores.add, 1) == 1


def test_context_variables(worker: Worker) -> None:
    variable = Variable(chores.__name__, "request", "r1")
    assert worker.call(chores.request_name, context=[variable]) == "r1"
    assert worker.call(chores.request_name) == "none"


def test_a_context_variable_that_is_not_there(worker: Worker) -> None:
    worker.send(chores.request_name, context=[Variable(chores.__name__, "not_a_variable", 1)])
    kind, (reason, text) = worker.answer()
    assert (kind, reason) == (Kind.FAULT, "argument")
    assert "no context variable not_a_variable in tests.offloading.chores" in text


# -- calls that cannot be made, outcomes that cannot be sent -----------------------------------------


def test_an_argument_that_cannot_be_rebuilt(worker: Worker) -> None:
    worker.send(chores.add, 1, chores.Unbuildable())
    kind, (reason, text) = worker.answer()
    assert (kind, reason) == (Kind.FAULT, "argument")
    assert "argument 2 cannot be rebuilt: ValueError: cannot be built" in text
    worker.send(chores.add, 1, b=chores.Unbuildable())
    assert "argument 'b' cannot be rebuilt" in worker.answer()[1][1]
    assert worker.call(chores.add, 1) == 1


def test_a_result_that_cannot_be_pickled(worker: Worker) -> None:
    worker.send(chores.lock)
    kind, (reason, text) = worker.answer()
    assert (kind, reason) == (Kind.FAULT, "result")
    assert "the result (_thread.lock) cannot be pickled" in text
    assert worker.call(chores.add, 1) == 1


def test_its_name_says_what_it_is(nursery: Nursery) -> None:
    worker = nursery.fork()
    names = [Path(f"/proc/{pid}/comm").read_text() for pid in (nursery.process.pid, worker.pid)]
    assert names == ["offload-zygote\n", "offload-worker\n"]


def test_a_function_that_is_not_there(worker: Worker) -> None:
    worker.send(Address(chores.__name__, "gone", 0))
    kind, (reason, text) = worker.answer()
    assert (kind, reason) == (Kind.FAULT, "function")
    assert "there is no function gone" in text


def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("{}['no such key']\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Nursery() as nursery:
        nursery.send(("preload", ["broken", "leaving", "no_such_module"]))
        worker = nursery.fork()
        for _ in range(2):
            with pytest.raises(KeyError, match="no such key") as caught:
                worker.call(Address("broken", "f", 0))
            assert 'broken.py", line 1' in str(caught.value.__cause__)
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            worker.call(Address("no_such_module", "f", 0))
        worker.send(Address("leaving", "f", 0))
        kind, (reason, text) = worker.answer()
        assert (kind, reason) == (Kind.FAULT, "function")
        assert text.startswith(
            "leaving ends the process with sys.exit(7) when it is imported: put what starts"
        )
        assert nursery.spoiled == []


def test_nonsense_on_the_wire_ends_it(nursery: Nursery) -> None:
    worker = nursery.fork()
    worker.wire.sendall(b"GET / HTTP/1.1\r\n" * 10)
    assert nursery.exit_of(worker) == 0
    worker = nursery.fork()
    pieces, _ = encode(Kind.READY, 0, pack(()))
    worker.wire.sendmsg(pieces)
    assert nursery.exit_of(worker) == 0


# -- workers that end --------------------------------------------------------------------------------


def test_it_ends_when_the_server_hangs_up(nursery: Nursery) -> None:
    worker = nursery.fork()
    worker.call(chores.add, 1)
    worker.wire.close()
    assert nursery.exit_of(worker) == 0


def test_it_ends_when_nobody_takes_its_answer(nursery: Nursery) -> None:
    worker = nursery.fork()
    worker.send(chores.swallow)
    worker.progress()
    worker.wire.close()
    worker.interrupt()
    assert nursery.exit_of(worker) == 0


@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (chores.leave, (3,), 3),
        (chores.leave, (None,), 0),
        (chores.leave, ("a message",), 1),
        (chores.leave_hard, (4,), 4),
        (chores.crash, (), -signal.SIGSEGV),
        (chores.segfault, (), -signal.SIGSEGV),
    ],
)
def test_ends_that_the_server_sees(nursery: Nursery, function: Any, args: Any, code: int) -> None:
    worker = nursery.fork()
    worker.send(function, *args)
    with pytest.raises(EOFError):
        worker.answer()
    assert nursery.exit_of(worker) == code
    if code == -signal.SIGSEGV:
        assert "Segmentation fault" in worker.stack()
        assert f"in {function.__name__}" in worker.stack()
    else:
        assert worker.stack() == ""


def test_what_its_functions_left_to_the_exit_is_done(nursery: Nursery, tmp_path: Path) -> None:
    worker = nursery.fork()
    worker.call(chores.touch_at_exit, str(tmp_path / "done"))
    worker.close()
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_the_server_are_none_of_its_business(worker: Worker, number: int) -> None:
    worker.send(chores.sleep, 0.2)
    worker.progress()
    worker.signal(number)
    assert worker.answer() == (Kind.RESULT, None)
    assert int(worker.call(chores.handlers_of_a_program), 16) & (1 << (number - 1)) == 0


@pytest.mark.parametrize("function", [chores.count_in_c, chores.match])
def test_it_tells_what_it_does(nursery: Nursery, function: Any) -> None:
    worker = nursery.fork()
    worker.send(function)
    worker.progress()
    worker.signal(signal.SIGUSR2)
    end = time.monotonic() + PATIENCE
    while f"in {function.__name__}" not in worker.stack():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert worker.stack().startswith("Stack (most recent call first):")
    worker.signal(signal.SIGKILL)
    assert nursery.exit_of(worker) == -signal.SIGKILL


# -- what it has -------------------------------------------------------------------------------------


def test_its_descriptors(nursery: Nursery) -> None:
    others = [nursery.fork() for _ in range(2)]
    worker = nursery.fork()
    found = worker.call(chores.descriptors)
    assert found[0] == os.devnull
    own = sorted(target.partition(":")[0] for number, target in found.items() if number > 2)
    assert own == sorted(["/memfd", "/memfd", "socket", "socket"]), found
    worker.call(chores.same, np.zeros(1_000_000, np.uint8))
    assert sorted(worker.call(chores.descriptors)) == sorted(found)
    # 0 to 2, and that of the listing
    assert len(worker.call(chores.descriptors_of_a_program)) == 4
    for each in (*others, worker):
        each.close()


def test_there_is_nothing_to_read(worker: Worker) -> None:
    assert worker.call(chores.listen) == ""


def test_what_it_prints_comes_when_the_call_ends() -> None:
    with Nursery(stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""}) as nursery:
        worker = nursery.fork()
        worker.call(chores.say, "hello")
        worker.call(chores.add, 1)
        assert nursery.process.stdout is not None
        assert os.read(nursery.process.stdout.fileno(), 100) == b"hello\n"
        nursery.process.stdout.close()
        worker.call(chores.say, "nobody hears that")
        assert worker.call(chores.add, 1) == 1
        worker.close()


def test_its_settings(nursery: Nursery) -> None:
    mine = os.nice(0)
    worker = nursery.fork(WorkerSettings(nice=3, log_level=logging.ERROR, modules=("colorsys", "no_such")))
    assert worker.call(chores.niceness) == min(19, mine + 3)
    assert worker.call(chores.log_level) == logging.ERROR
    assert worker.call(chores.is_imported, "colorsys")


def test_workers_draw_different_numbers() -> None:
    with Nursery() as nursery:
        nursery.send(("preload", ["numpy", "random"]))
        drawn = [number for _ in range(3) for number in nursery.fork().call(chores.draw)]
    assert len(set(drawn)) == 6
    assert nursery.spoiled == []


def test_a_child_of_its_own(worker: Worker) -> None:
    """It says nothing on the wire, and it can be terminated."""
    assert worker.call(chores.fork) == (0, True)
    assert worker.logs == []
    worker.call(chores.log)
    assert len(worker.logs) == 1


# -- what it says ------------------------------------------------------------------------------------


def test_progress(worker: Worker) -> None:
    call = worker.send(chores.report, 0, 0.5, np.float32(0.75), 1)
    worker.answer()
    assert worker.fractions == [(call, 0.0), (call, 0.5), (call, 0.75), (call, 1.0)]
    call = worker.send(chores.report_from_thread)
    worker.answer()
    assert worker.fractions[4:] == [(call, 0.25)]


def test_threads_may_talk_while_results_are_sent(worker: Worker) -> None:
    for _ in range(5):
        assert len(worker.call(chores.log_from_threads, 4, 40)) == 200_000
    assert len(worker.logs) == 5 * 4 * 40
    assert len(worker.fractions) == 5 * 40


def test_a_thread_may_talk_while_calls_come_and_go(worker: Worker) -> None:
    worker.call(chores.start_talking)
    for number in range(200):
        assert worker.call(chores.add, number) == number
        assert len(worker.call(chores.same, bytes(200_000))) == 200_000
    worker.call(chores.stop_talking)
    assert {record.getMessage()[:10] for record in worker.records()} == {"still here"}


# -- what is left of a call --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ignore", "return", "raise", "cycle", "unpicklable"])
def test_nothing_is_left(worker: Worker, how: str) -> None:
    worker.send(chores.take, chores.Tracked(), how=how)
    worker.answer()
    assert worker.call(chores.alive) == 0


def test_memory_is_given_back(worker: Worker) -> None:
    worker.call(chores.take, np.ones(1000), how="ignore")
    before = worker.call(chores.memory)
    for value in (np.ones(5_000_000), array.array("d", [1.0]) * 5_000_000, bytes(40_000_000)):
        worker.send(chores.take, value, how="return")
        worker.answer()
    assert worker.call(chores.memory) < before + 10_000_000
