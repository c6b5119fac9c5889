"""Functions stop when they are told to, and only those that are meant."""

from __future__ import annotations

import contextlib
import mmap
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncguard.offloading._interrupt import Interrupted, Interrupts
from asyncguard.offloading._wire import Kind
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


@pytest.fixture
def page() -> mmap.mmap:
    return mmap.mmap(-1, 4096)  # `Interrupts` keeps a view of it: it cannot be closed


@pytest.fixture
def interrupts(page: mmap.mmap) -> Iterator[Interrupts]:
    before, hook = signal.getsignal(signal.SIGUSR1), sys.unraisablehook
    interrupts = Interrupts(page)
    interrupts.install()
    yield interrupts
    interrupts.end()
    signal.signal(signal.SIGUSR1, before)
    sys.unraisablehook = hook


def aim(page: mmap.mmap, call: int) -> None:
    page[:8] = call.to_bytes(8, "little")


def strike() -> None:
    signal.raise_signal(signal.SIGUSR1)


def until(condition: Callable[[], object]) -> None:
    """In Python's own loop, in which signals arrive."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# -- which call is meant -----------------------------------------------------------------------------


def test_the_call_that_runs_is_interrupted_once(interrupts: Interrupts, page: mmap.mmap) -> None:
    interrupts.begin(7)
    aim(page, 7)
    with pytest.raises(Interrupted):
        strike()
    strike()
    interrupts.end()
    strike()
    assert interrupts.running == 0


@pytest.mark.parametrize("other", [0, 6, 8, 7 + (1 << 32)])
def test_another_call_is_not_meant(interrupts: Interrupts, page: mmap.mmap, other: int) -> None:
    interrupts.begin(7)
    aim(page, other)
    strike()


def test_who_comes_early_is_not_forgotten(interrupts: Interrupts, page: mmap.mmap) -> None:
    aim(page, 7)
    strike()
    interrupts.begin(6)
    interrupts.end()
    with pytest.raises(Interrupted):
        interrupts.begin(7)


def test_every_call_can_be_interrupted(interrupts: Interrupts, page: mmap.mmap) -> None:
    for call in range(1, 100):
        interrupts.begin(call)
        aim(page, call)
        with pytest.raises(Interrupted):
            strike()
        interrupts.end()


# -- when it is not raised ---------------------------------------------------------------------------


def test_what_is_held_back_comes_at_the_end(interrupts: Interrupts, page: mmap.mmap) -> None:
    interrupts.begin(7)
    steps = []

    def run() -> None:
        with interrupts.hold():
            with interrupts.hold():
                aim(page, 7)
                strike()
                steps.append("inner")
            steps.append("outer")
        steps.append("never")

    with pytest.raises(Interrupted):
        run()
    assert steps == ["inner", "outer"]


def test_another_thread_holds_nothing_back(interrupts: Interrupts, page: mmap.mmap) -> None:
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with interrupts.hold():
            is_held.set()
            may_go.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(PATIENCE)
    interrupts.begin(7)
    aim(page, 7)
    with pytest.raises(Interrupted):
        strike()
    may_go.set()
    thread.join()


def test_where_exceptions_come_to_nothing_it_is_tried_again(interrupts: Interrupts, page: mmap.mmap) -> None:
    class Dying:
        def __del__(self) -> None:
            strike()

    interrupts.begin(7)
    aim(page, 7)
    Dying()
    with pytest.raises(Interrupted):
        until(lambda: False)


def test_what_others_raise_there_is_reported_as_ever(
    interrupts: Interrupts, page: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))
    interrupts.install()

    class Dying:
        def __del__(self) -> None:
            raise KeyError

    Dying()
    assert reported == [KeyError]


def test_the_end_of_a_call_calls_off_a_second_try(interrupts: Interrupts, page: mmap.mmap) -> None:
    interrupts.begin(7)
    aim(page, 7)
    with contextlib.suppress(Interrupted):
        assert interrupts._come_again()
        assert interrupts._come_again()
        interrupts.end()
    until(lambda: not interrupts._is_coming_again)
    time.sleep(0.01)


def test_without_another_thread_it_does_not_wait(
    interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("asyncguard.offloading._interrupt.start_new_thread", refuse)
    assert not interrupts._come_again()


# -- in a worker -------------------------------------------------------------------------------------

STOPPED = [
    pytest.param(chores.spin, (), id="python"),
    pytest.param(chores.sleep, (), id="sleep"),
    pytest.param(chores.wait, (), id="lock"),
    pytest.param(chores.linger, (), id="finally"),
    pytest.param(chores.slow_to_pickle, (), id="result"),
    pytest.param(chores.die_in_del, (), id="del"),
    pytest.param(chores.log_for_ever, (), id="logging"),
    pytest.param(chores.report_for_ever, (), id="sending"),
]


@pytest.mark.parametrize(("function", "args"), STOPPED)
def test_a_function_stops(worker: Worker, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    worker.send(function, *args)
    while not worker.fractions:
        if worker.frame().kind is Kind.PROGRESS:
            break
    worker.interrupt()
    kind, error = worker.answer()
    assert (kind, type(error)) == (Kind.ERROR, Interrupted)
    assert worker.call(chores.add, 1, 2) == 3


def test_its_finally_runs_to_its_end(worker: Worker, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    worker.send(chores.clean_up, str(ended))
    worker.progress()
    worker.interrupt()
    assert worker.progress() == 0.5
    for _ in range(3):
        worker.interrupt()
    assert isinstance(worker.answer()[1], Interrupted)
    assert ended.exists()


def test_what_it_makes_of_it_is_its_answer(worker: Worker) -> None:
    worker.send(chores.swallow)
    worker.progress()
    worker.interrupt()
    assert worker.answer() == (Kind.RESULT, "Interrupted")
    worker.send(chores.translate)
    worker.progress()
    worker.interrupt()
    kind, error = worker.answer()
    assert (kind, str(error)) == (Kind.ERROR, "translated")


def test_an_import_is_not_cut_off(worker: Worker) -> None:
    worker.send(chores.import_slowly)
    worker.progress()
    worker.interrupt()
    kind, error = worker.answer()
    assert (kind, type(error)) == (Kind.ERROR, Interrupted)
    assert worker.call(chores.slow_import_is_whole)


def test_a_tracer_is_not_cut_off(worker: Worker) -> None:
    """Coverage and debuggers hold locks while they look, and would wait for them for ever."""
    for _ in range(20):
        worker.send(chores.be_traced)
        worker.progress()
        worker.interrupt()
        kind, error = worker.answer()
        assert (kind, type(error)) == (Kind.ERROR, Interrupted)
        assert worker.call(chores.tracer_is_whole)


def test_a_call_that_is_to_stop_before_it_has_begun(worker: Worker) -> None:
    worker.interrupt(worker.calls + 1)
    worker.send(chores.sleep)
    assert isinstance(worker.answer()[1], Interrupted)


def test_arguments_are_rebuilt_first(worker: Worker) -> None:
    worker.send(chores.same, chores.SlowToRebuild(0.2))
    worker.interrupt()
    assert isinstance(worker.answer()[1], Interrupted)


def test_signals_that_come_late_do_nothing(worker: Worker) -> None:
    """Whenever it comes, the call is stopped or it is not, and the next one knows nothing of it."""
    rng = random.Random(1)
    stopped = 0
    for _ in range(400):
        call = worker.send(chores.short, 3000)
        # The call takes less than that, most times: many come after its end, some in its last lines.
        end = time.perf_counter() + rng.random() * 0.0004
        while time.perf_counter() < end:
            pass
        worker.interrupt(call)
        kind, value = worker.answer()
        if kind is Kind.ERROR:
            assert type(value) is Interrupted
            stopped += 1
        else:
            assert value == sum(range(3000))
        late = rng.randrange(3)
        worker.send(chores.short, 3000)
        for _ in range(late):
            worker.signal()
        assert worker.answer() == (Kind.RESULT, sum(range(3000)))
    assert worker.call(chores.pid) == worker.pid


def test_a_storm_of_signals_hurts_nobody(worker: Worker) -> None:
    """Hundreds to one call, while it ends and the next begins."""
    is_over = threading.Event()

    def storm() -> None:
        while not is_over.wait(0.0001):
            worker.signal()

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for number in range(300):
            if number % 60 == 59:
                call = worker.send(chores.log_from_threads, 2, 5)
            else:
                call = worker.send(chores.short, 1000)
            if number % 2:
                worker.aim(call)
            kind, value = worker.answer()
            assert kind is Kind.RESULT or (number % 2 and type(value) is Interrupted)
    finally:
        is_over.set()
        thread.join()
