"""One of three shared things fails, or hangs, at the start or the end of a real server.

The server starts or refuses to, and ends, within the limits; the log names the thing and its declaration;
the others are closed.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.e2e.recording import marked
from tests.e2e.shared_servers import FILE, sharing
from tests.raw_client import get
from tests.servers import accepts, eventually

pytestmark = pytest.mark.e2e

CASES = [
    ("uvicorn-asyncio", "raises"),
    ("uvicorn-asyncio", "hangs"),
    ("uvicorn-asyncio", "is stubborn"),
    ("hypercorn-trio", "hangs"),
    ("hypercorn-trio", "is stubborn"),
    ("granian", "hangs"),
]
SWIFT = 12.0
"""Seconds; the limits are half a second, and some for what does not heed its cancellation."""

SWALLOWED = "swallows a cancellation"
NAMED = f"the shared resource 'second' (declared at {FILE}:{marked(FILE, 'second', 'declared')})"


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_at_the_start(kind: str, fault: str, tmp_path: Path) -> None:
    with sharing(kind, tmp_path, fault=f"start {fault}", wait=False) as found:
        found.await_event("+first")
        began = time.monotonic()
        found.await_event("-first")
        assert time.monotonic() - began < SWIFT
        if (kind, fault) == ("hypercorn-trio", "is stubborn"):
            found.server.kill()  # trio leaves no task behind
        else:
            # hypercorn's is 0 whatever becomes of its worker.
            assert found.server.process.wait(20) == {"uvicorn": 3, "hypercorn": 0, "granian": 1}[server(kind)]
        assert time.monotonic() - began < SWIFT
        eventually(lambda: not found.server.remnants(), "no process is left")
        assert not accepts(found.port)
        assert [event for event in found.life() if event != SWALLOWED] == ["+first", "-first"]
        did_not_start = f"{NAMED} did not start within 0.5 s; it was awaiting {FILE}:"
        said = {
            "raises": [f"{NAMED} could not be opened: ConnectionRefusedError: nobody listens"],
            "hangs": [f"{did_not_start}{marked(FILE, 'here', 'hangs')}"],
            "is stubborn": [did_not_start, f"{NAMED} was cancelled, and goes on"],
        }
        for sentence in said[fault]:
            assert sentence in found.written


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_at_the_end(kind: str, fault: str, tmp_path: Path) -> None:
    with sharing(kind, tmp_path, fault=f"close {fault}") as found:
        assert get(found.port, "/injected").status == 200
        began = time.monotonic()
        # The one has uvicorn end all tasks; after the other it is just killed by the signal.
        number = signal.SIGINT if kind == "uvicorn-asyncio" else signal.SIGTERM
        found.server.process.send_signal(number)
        found.await_event("-first")
        if (kind, fault) == ("hypercorn-trio", "is stubborn"):
            found.server.kill()  # trio leaves no task behind
        else:
            assert found.server.process.wait(20) in (0, -number)
        assert time.monotonic() - began < SWIFT
        eventually(lambda: not found.server.remnants(), "no process is left")
        life = [event for event in found.life() if event != SWALLOWED]
        assert life == ["+first", "+second", "+third", "-third", "-first"]
        was_not_closed = f"{NAMED} was not closed within 0.5 s; it was awaiting {FILE}:"
        said = {
            "raises": [f"{NAMED} could not be closed: ConnectionRefusedError: nobody listens"],
            "hangs": [f"{was_not_closed}{marked(FILE, 'here', 'hangs')}"],
            "is stubborn": [was_not_closed, f"{NAMED} was cancelled, and goes on"],
        }
        for sentence in said[fault]:
            assert sentence in found.written


def test_a_supervisor_that_ends_it_before_it_has_started(tmp_path: Path) -> None:
    with sharing("uvicorn-uvloop", tmp_path, fault="start hangs", wait=False) as found:
        found.await_event("+first")
        assert found.server.terminate() == 3
        assert found.life() == ["+first", "-first"]
        assert f"{NAMED} did not start within 0.5 s" in found.written


def test_an_impatient_ctrl_c(tmp_path: Path) -> None:
    with sharing("uvicorn-uvloop", tmp_path, fault="close hangs") as found:
        found.server.process.send_signal(signal.SIGINT)
        found.await_event("-third")
        found.server.process.send_signal(signal.SIGINT)
        assert found.server.process.wait(20) in (0, -signal.SIGINT)
        assert found.life() == ["+first", "+second", "+third", "-third", "-first"]
        assert f"{NAMED} was not closed within 0.5 s" in found.written


def server(kind: str) -> str:
    return kind.partition("-")[0]
