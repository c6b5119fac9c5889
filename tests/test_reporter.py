"""Calls are made in order, on a thread of their own, and never at the loop's expense."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from typing import TYPE_CHECKING

import pytest

from asyncguard._reporter import Reporter

if TYPE_CHECKING:
    from tests.conftest import TurnedClock


logger = logging.getLogger("asyncguard.blocking")


def nothing() -> None: ...


def make_reporter() -> Reporter:
    return Reporter("reporter", logger, each_minute=nothing)


def test_in_order_on_a_thread_of_its_own() -> None:
    reporter = make_reporter()
    seen: list[tuple[int, str, bool]] = []

    def call(number: int) -> None:
        thread = threading.current_thread()
        seen.append((number, thread.name, thread.daemon))

    for number in range(5):
        reporter.put(functools.partial(call, number))
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == [(number, "reporter", True) for number in range(5)]


def test_without_a_call_there_is_no_thread() -> None:
    before = threading.active_count()
    reporter = make_reporter()
    assert reporter.flush().is_set()
    assert not reporter.running
    reporter.finish()
    assert reporter.flush().is_set()
    assert threading.active_count() == before


def test_a_flush_waits_for_what_was_put_before() -> None:
    reporter = make_reporter()
    go_on = threading.Event()
    reporter.put(go_on.wait)
    assert reporter.running
    flushed = reporter.flush()
    reporter.put(nothing)
    assert not flushed.wait(0.01)
    go_on.set()
    assert flushed.wait(30)
    reporter.finish()
    assert reporter.flush().wait(30)


def test_the_thread_ends() -> None:
    before = set(threading.enumerate())
    reporter = make_reporter()
    reporter.put(nothing)
    (thread,) = set(threading.enumerate()) - before
    reporter.finish()
    thread.join(30)
    assert not thread.is_alive()


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever puts is told; the next call tries again."""
    reporter = make_reporter()
    seen: list[int] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            reporter.put(lambda: seen.append(0))
    assert reporter.flush().is_set()
    reporter.put(lambda: seen.append(1))
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == [1]


def test_a_call_that_fails_is_logged_and_the_next_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    reporter = make_reporter()
    seen: list[int] = []

    def call(number: int) -> None:
        seen.append(number)
        raise LookupError("no source")

    for number in range(2):
        reporter.put(functools.partial(call, number))
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == [0, 1]
    assert [record.getMessage() for record in caplog.records] == ["a report could not be made"] * 2
    assert {record.name for record in caplog.records} == {"asyncguard.blocking"}
    assert caplog.records[0].levelno == logging.ERROR


def test_beyond_the_limit_calls_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "MOST_WAITING", 3)
    reporter = make_reporter()
    busy, go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    def call(number: int) -> None:
        seen.append(number)
        busy.set()
        go_on.wait()

    assert reporter.put(functools.partial(call, 0))
    busy.wait()
    taken = [reporter.put(functools.partial(call, number)) for number in range(1, 100)]
    reporter.finish()
    go_on.set()
    assert reporter.flush().wait(30)
    assert seen == [0, 1, 2, 3]
    # Whoever puts is told.
    assert taken == [True] * 3 + [False] * 96


def test_nothing_is_held_while_waiting_for_the_next() -> None:
    """A stall leads to its requests: they are let go when it has been reported."""

    class Held:
        def tell(self) -> None: ...

    reporter = make_reporter()
    held = Held()
    gone = weakref.ref(held)
    reporter.put(held.tell)
    del held
    assert reporter.flush().wait(30)
    assert gone() is None
    reporter.finish()
    assert reporter.flush().wait(30)


# -- once a minute -----------------------------------------------------------------------------------


def test_once_a_minute_by_the_clock(clock: TurnedClock) -> None:
    minutes: list[float] = []
    reporter = Reporter("reporter", logger, each_minute=lambda: minutes.append(clock.now))

    def turned(seconds: float) -> int:
        clock.turn(seconds)
        for _ in range(2):  # the second one is made after the minute's call, if there was one
            reporter.put(nothing)
            assert reporter.flush().wait(30)
        return len(minutes)

    assert turned(0) == 0  # the first call starts the thread, and its first minute
    assert turned(59) == 0
    assert turned(1) == 1
    assert turned(59) == 1
    assert turned(1) == 2
    reporter.finish()
    assert reporter.flush().wait(30)


def test_a_minute_passes_though_nothing_is_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "MINUTE", 0.01)
    twice = threading.Semaphore(0)
    reporter = Reporter("reporter", logger, each_minute=twice.release)
    reporter.put(nothing)
    for _ in range(2):
        assert twice.acquire(timeout=30)
    reporter.finish()
    assert reporter.flush().wait(30)


def test_a_minute_whose_call_fails_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Reporter, "MINUTE", 0.01)
    twice = threading.Semaphore(0)

    def broken() -> None:
        twice.release()
        raise LookupError

    reporter = Reporter("reporter", logger, each_minute=broken)
    reporter.put(nothing)
    for _ in range(2):
        assert twice.acquire(timeout=30)
    reporter.finish()
    assert reporter.flush().wait(30)
    assert caplog.records


# -- without anything to do --------------------------------------------------------------------------


def thread_of(reporter: Reporter) -> threading.Thread:
    seen: list[threading.Thread] = []
    reporter.put(lambda: seen.append(threading.current_thread()))
    assert reporter.flush().wait(30)
    return seen[0]


def test_a_thread_that_lingered_for_nothing_ends_and_the_next_call_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Reporter, "LINGER", 0.01)
    reporter = Reporter("reporter", logger)
    threads: list[threading.Thread] = []
    for _ in range(3):
        threads.append(thread_of(reporter))
        threads[-1].join(30)
        assert not threads[-1].is_alive()
        assert not reporter.running
        assert reporter.flush().is_set()
    assert len(set(threads)) == 3
    assert {thread.name for thread in threads} == {"reporter"}


def test_within_that_time_the_thread_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "LINGER", 3600.0)
    reporter = Reporter("reporter", logger)
    assert thread_of(reporter) is thread_of(reporter)
    reporter.finish()
    assert reporter.flush().wait(30)


def test_with_a_call_each_minute_the_thread_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "LINGER", 0.0)
    monkeypatch.setattr(Reporter, "MINUTE", 0.005)
    twice = threading.Semaphore(0)
    reporter = Reporter("reporter", logger, each_minute=twice.release)
    thread = thread_of(reporter)
    for _ in range(2):
        assert twice.acquire(timeout=30)
    assert thread_of(reporter) is thread
    reporter.finish()
    assert reporter.flush().wait(30)


def test_nothing_is_lost_while_threads_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as one has nothing to do, it ends: many times in the middle of a `put`."""
    monkeypatch.setattr(Reporter, "LINGER", 0.0)
    reporter = Reporter("reporter", logger)
    seen: list[tuple[int, int]] = []

    def put_some(source: int) -> None:
        for number in range(200):
            assert reporter.put(functools.partial(seen.append, (source, number)))

    sources = [threading.Thread(target=put_some, args=(source,)) for source in range(3)]
    for thread in sources:
        thread.start()
    for thread in sources:
        thread.join(30)
    assert reporter.flush().wait(30)
    for source in range(3):
        assert [number for found, number in seen if found == source] == list(range(200))


def test_a_call_that_comes_as_the_thread_is_about_to_end_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "LINGER", 0.0)
    reporter = Reporter("reporter", logger)
    seen: list[str] = []
    is_idle = Reporter._is_idle

    def put_first(self: Reporter) -> bool:
        monkeypatch.setattr(Reporter, "_is_idle", is_idle)
        self.put(functools.partial(seen.append, "just in time"))
        return is_idle(self)

    monkeypatch.setattr(Reporter, "_is_idle", put_first)
    thread = thread_of(reporter)
    thread.join(30)
    assert reporter.flush().wait(30)
    assert seen == ["just in time"]


@pytest.mark.parametrize("first", ["it is finished", "the thread ends"])
def test_the_end_is_told_though_it_comes_as_the_thread_is_about_to_end(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reporter, "LINGER", 0.0)
    reporter = Reporter("reporter", logger)
    is_idle = Reporter._is_idle
    met = threading.Event()
    seen: list[str] = []

    def meet(self: Reporter) -> bool:
        monkeypatch.setattr(Reporter, "_is_idle", is_idle)
        if first == "it is finished":
            self.finish()
            idle = is_idle(self)
        else:
            idle = is_idle(self)
            self.finish()
        met.set()
        return idle

    monkeypatch.setattr(Reporter, "_is_idle", meet)
    assert reporter.put(functools.partial(seen.append, "made"))
    assert met.wait(30)
    assert reporter.flush().wait(30)
    assert seen == ["made"]


def test_whether_a_thread_is_there_to_be_ended_is_asked_under_the_lock() -> None:
    """Or it might end in between, and nobody would be told."""
    locked: list[bool] = []

    class Asked(Reporter):
        @property
        def _thread(self) -> threading.Thread | None:
            locked.append(self._starting.locked())
            return None

        @_thread.setter
        def _thread(self, thread: threading.Thread | None) -> None: ...

    reporter = Asked("reporter", logger)
    reporter.finish()
    assert locked == [True]
    assert reporter.flush().is_set()


def test_at_exit_a_call_after_the_thread_has_ended_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "LINGER", 0.0)
    reporter = Reporter("reporter", logger)
    thread_of(reporter).join(30)
    reporter.at_exit = True
    assert thread_of(reporter) is threading.current_thread()


# -- at the end of the process -----------------------------------------------------------------------


def test_at_exit_what_comes_without_a_thread_is_handled_at_once(caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    reporter = make_reporter()
    reporter.at_exit = True
    seen: list[threading.Thread] = []

    def broken() -> None:
        raise LookupError

    assert reporter.put(lambda: seen.append(threading.current_thread()))
    assert reporter.put(broken)
    assert seen == [threading.current_thread()]
    assert len(caplog.records) == 1
    assert threading.active_count() == before
    assert reporter.flush().is_set()


def test_at_exit_a_thread_that_runs_is_used_further() -> None:
    reporter = make_reporter()
    seen: list[str] = []
    for _ in range(2):
        reporter.put(lambda: seen.append(threading.current_thread().name))
        reporter.at_exit = True
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == ["reporter", "reporter"]
