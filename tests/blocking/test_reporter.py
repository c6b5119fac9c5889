"""Stalls are handed over in order, on a thread of their own, and never at the loop's expense."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import cast

import pytest

from asyncguard.blocking._reporter import Reporter
from asyncguard.blocking._stall import Stall


def stall(number: int) -> Stall:
    return cast(Stall, number)


def test_in_order_on_a_thread_of_its_own() -> None:
    reporter = Reporter("reporter")
    seen: list[tuple[object, str, bool]] = []

    def listener(stall: Stall) -> None:
        thread = threading.current_thread()
        seen.append((stall, thread.name, thread.daemon))

    for number in range(5):
        reporter.put(listener, stall(number))
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == [(number, "reporter", True) for number in range(5)]


def test_without_a_stall_there_is_no_thread() -> None:
    before = threading.active_count()
    reporter = Reporter("reporter")
    assert reporter.flush().is_set()
    reporter.finish()
    assert reporter.flush().is_set()
    assert threading.active_count() == before


def test_a_flush_waits_for_what_was_put_before() -> None:
    reporter = Reporter("reporter")
    go_on = threading.Event()

    def wait(stall: Stall) -> None:
        go_on.wait()

    reporter.put(wait, stall(0))
    flushed = reporter.flush()
    reporter.put(lambda _: None, stall(1))
    assert not flushed.wait(0.01)
    go_on.set()
    assert flushed.wait(30)
    reporter.finish()
    assert reporter.flush().wait(30)


def test_the_thread_ends() -> None:
    before = set(threading.enumerate())
    reporter = Reporter("reporter")
    reporter.put(lambda _: None, stall(0))
    (thread,) = set(threading.enumerate()) - before
    reporter.finish()
    thread.join(30)
    assert not thread.is_alive()


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever puts is told; the next stall tries again."""
    reporter = Reporter("reporter")
    seen: list[object] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            reporter.put(seen.append, stall(0))
    assert reporter.flush().is_set()
    reporter.put(seen.append, stall(1))
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == [1]


def test_a_listener_that_fails_is_logged_and_the_next_stall_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter("reporter")
    seen: list[object] = []

    def listener(stall: Stall) -> None:
        seen.append(stall)
        raise LookupError("no source")

    for number in range(2):
        reporter.put(listener, stall(number))
    reporter.finish()
    assert reporter.flush().wait(30)
    assert seen == [0, 1]
    assert [record.getMessage() for record in caplog.records] == ["a stall could not be reported"] * 2
    assert {record.name for record in caplog.records} == {"asyncguard.blocking"}
    assert caplog.records[0].levelno == logging.ERROR


def test_beyond_the_limit_stalls_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "MOST_WAITING", 3)
    reporter = Reporter("reporter")
    busy, go_on = threading.Event(), threading.Event()
    seen: list[object] = []

    def listener(stall: Stall) -> None:
        seen.append(stall)
        busy.set()
        go_on.wait()

    reporter.put(listener, stall(0))
    busy.wait()
    for number in range(1, 100):
        reporter.put(listener, stall(number))
    reporter.finish()
    go_on.set()
    assert reporter.flush().wait(30)
    assert seen == [0, 1, 2, 3]


def test_nothing_is_held_while_waiting_for_the_next() -> None:
    """A stall leads to its requests: they are let go when it has been reported."""

    class Held:
        pass

    reporter = Reporter("reporter")
    held = Held()
    gone = weakref.ref(held)
    reporter.put(lambda _: None, cast(Stall, held))
    del held
    assert reporter.flush().wait(30)
    assert gone() is None
    reporter.finish()
    assert reporter.flush().wait(30)
