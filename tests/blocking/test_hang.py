"""A stall that does not end: what is told of it, and how a process is ended for it."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import anyio
import pytest

from asyncguard import HangReport, LoopMonitor
from asyncguard._frames import RawFrame
from asyncguard._request import RequestRecord
from asyncguard.blocking import _hang
from asyncguard.blocking._hang import Hang, RawThread, abort, is_debugged, look_at_threads, report_hang


def waits(go_on: threading.Event) -> None:
    go_on.wait()  # waits


@pytest.fixture
def waiting_thread() -> Any:
    go_on = threading.Event()
    thread = threading.Thread(target=waits, args=[go_on], name="the waiting one")
    thread.start()
    yield thread
    go_on.set()
    thread.join(30)


def eventually(condition: Callable[[], object]) -> None:
    """For what another thread does in its own time; fails after a time that no machine needs."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


# -- what the threads do -----------------------------------------------------------------------------


def test_all_threads_are_looked_at_the_loops_first(waiting_thread: threading.Thread) -> None:
    here = threading.get_ident()
    threads = look_at_threads(here)
    assert threads[0].name == threading.current_thread().name
    codes = [frame.code.co_name for frame in threads[0].frames]
    assert "test_all_threads_are_looked_at_the_loops_first" in codes
    assert "the waiting one" in {thread.name for thread in threads}
    assert waiting_thread.ident is not None
    assert look_at_threads(waiting_thread.ident)[0].name == "the waiting one"


def test_asyncguards_own_threads_are_left_out(waiting_thread: threading.Thread) -> None:
    waiting_thread.name = "asyncguard-watchdog-MainThread"
    names = {thread.name for thread in look_at_threads(threading.get_ident())}
    assert names
    assert waiting_thread.name not in names


def test_a_thread_that_threading_does_not_know(
    waiting_thread: threading.Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was made in C: it has a number only."""
    monkeypatch.setattr(_hang, "living_threads", dict)
    assert str(waiting_thread.ident) in {thread.name for thread in look_at_threads(threading.get_ident())}


def test_the_report(waiting_thread: threading.Thread, marked: Callable[[str], int]) -> None:
    assert waiting_thread.ident is not None
    record = RequestRecord({"type": "http", "method": "GET", "path": "/stuck"}, 0.0)
    eventually(
        lambda: "wait" in {f.code.co_name for f in look_at_threads(waiting_thread.ident or 0)[0].frames}
    )
    report = report_hang(Hang(12.5, record, look_at_threads(waiting_thread.ident)))
    assert (report.seconds, report.request) == (12.5, "GET /stuck")
    first = report.threads[0]
    assert first.name == "the waiting one"
    functions = [line.function for line in first.stack]
    # From the outermost call inwards; how a thread begins is left out.
    assert functions.index("waits") < functions.index("Event.wait")
    assert not any("_bootstrap" in function for function in functions)
    (line,) = [line for line in first.stack if line.function == "waits"]
    assert line.line == marked("waits")
    assert report_hang(Hang(1.0, None, ())) == HangReport(1.0, None, ())


def thread_in(*modules: object) -> RawThread:
    return RawThread("MainThread", tuple(RawFrame(waits.__code__, 0, {"__name__": m}) for m in modules))


@pytest.mark.parametrize(
    ("modules", "debugged"),
    [
        (("pdb", "app"), True),
        (("cmd", "pdb", "bdb", "app"), True),
        (("_pydevd_bundle.pydevd_frame", "app"), True),
        (("_pydevd_sys_monitoring._pydevd_sys_monitoring", "app"), True),
        (("pydevd", "app"), True),
        (("debugpy.server", "app"), True),
        (("IPython.core", "ipdb.__main__"), True),
        (("pudb.debugger",), True),
        (("app.pdb",), False),
        (("pdbfixer.pdbfixer", "app"), False),  # of protein data banks
        (("threading", "app"), False),
        ((None, 7), False),
        ((), False),
    ],
)
def test_a_debugger_in_the_loops_stack(modules: tuple[object, ...], debugged: bool) -> None:
    assert is_debugged(Hang(10.0, None, (thread_in(*modules), thread_in("app")))) is debugged


def test_a_debugger_in_another_thread_is_none_of_the_loops() -> None:
    assert not is_debugged(Hang(10.0, None, (thread_in("app"), thread_in("pdb"))))
    assert not is_debugged(Hang(10.0, None, ()))


# -- the end -----------------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the process would have been ended."""
    log: list[str] = []
    monkeypatch.setattr(os, "abort", lambda: log.append("abort"))
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda file: log.append("stacks"))
    monkeypatch.setattr(_hang, "_FLUSH_TIMEOUT", 0.01)
    return log


def test_the_report_is_out_before_the_end(ended: list[str]) -> None:
    reported = threading.Event()
    reported.set()
    abort(reported)
    assert ended == ["abort"]


def test_without_a_report_the_stacks_go_to_standard_error(
    ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    abort(threading.Event())
    assert ended == ["stacks", "abort"]
    monkeypatch.setattr(sys, "__stderr__", None)  # a service may have none
    abort(threading.Event())
    assert ended == ["stacks", "abort", "abort"]


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_stacks_that_cannot_be_written_do_not_keep_it_alive(
    ended: list[str], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Standard error may have been closed, or have no descriptor."""

    def refuse(file: IO[str]) -> None:
        raise error

    monkeypatch.setattr(faulthandler, "dump_traceback", refuse)
    abort(threading.Event())
    assert ended == ["abort"]


# -- on real loops -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_stall_that_lasts_is_told_once_while_it_does(
    marked: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[HangReport] = []
    told = threading.Event()

    def hear(report: HangReport) -> None:
        reports.append(report)
        told.set()

    async with LoopMonitor(threshold=0.05, hang_after=0.2, on_hang=hear):
        await anyio.sleep(0.01)
        assert told.wait(30)  # hangs
        time.sleep(0.3)
        await anyio.sleep(0.01)
        await anyio.sleep(0.01)
    (report,) = reports
    assert report.seconds >= 0.2
    assert report.request is None
    assert report.threads[0].name == threading.current_thread().name
    assert marked("hangs") in {line.line for line in report.threads[0].stack}
    (record,) = [record for record in caplog.records if "and still is" in record.getMessage()]
    assert record.levelno == logging.ERROR


@pytest.mark.anyio
async def test_each_hang_is_told() -> None:
    heard = threading.Semaphore(0)
    async with LoopMonitor(threshold=0.05, hang_after=0.1, on_hang=lambda _: heard.release(), log=False):
        for _ in range(2):
            await anyio.sleep(0.05)
            assert heard.acquire(timeout=30)
    assert not heard.acquire(blocking=False)


@pytest.mark.anyio
async def test_a_short_stall_and_an_idle_loop_are_no_hang() -> None:
    reports: list[HangReport] = []
    async with LoopMonitor(threshold=0.05, hang_after=0.5, on_hang=reports.append, log=False):
        await anyio.sleep(0.01)
        time.sleep(0.2)
        await anyio.sleep(0.7)
    assert reports == []


# -- in a process that may be ended ------------------------------------------------------------------

PROGRAM = """
import asyncio, logging, resource, sys, threading, time
import uvloop
from asyncguard import LoopMonitor

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
logging.basicConfig(format="%(levelname)s %(message)s")

def stuck():
    BODY

async def main():
    async with LoopMonitor(threshold=0.05, hang_after=0.3, on_hang="abort"):
        await asyncio.sleep(0.01)
        stuck()
        await asyncio.sleep(0.01)
    print("alive")

with asyncio.Runner(loop_factory=FACTORY) as runner:
    runner.run(main())
"""

FACTORIES = {"asyncio": "asyncio.new_event_loop", "uvloop": "uvloop.new_event_loop"}
unix_only = pytest.mark.skipif(sys.platform == "win32", reason="no signals here")


def start(folder: Path, body: str, kind: str = "asyncio") -> subprocess.Popen[str]:
    file = folder / "program.py"
    body = textwrap.indent(textwrap.dedent(body), "    ").strip()
    file.write_text(PROGRAM.replace("BODY", body).replace("FACTORY", FACTORIES[kind]))
    return subprocess.Popen(
        [sys.executable, "-u", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@unix_only
@pytest.mark.parametrize("kind", FACTORIES)
def test_a_process_that_hangs_is_ended(tmp_path: Path, kind: str) -> None:
    """By a signal that its supervisor sees, when the stacks are in the log."""
    body = """
    lock = threading.Lock()
    with lock:
        lock.acquire()
    """
    with start(tmp_path, body, kind) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert output == ""
    assert errors.startswith("CRITICAL the loop has been blocked for ")
    assert "thread MainThread, innermost call last:" in errors
    assert "in stuck: lock.acquire()" in errors


@unix_only
def test_a_hang_that_holds_a_lock_of_the_logs(tmp_path: Path) -> None:
    """Then the report cannot be written: the stacks go past the log, and the process ends all the same."""
    body = """
    logging.getLogger().handlers[0].acquire()
    time.sleep(300)
    """
    with start(tmp_path, body) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert output == ""
    assert "the loop has been blocked" not in errors
    assert " in stuck\n" in errors
    assert "most recent call first" in errors


@unix_only
def test_a_debugger_keeps_the_process_alive(tmp_path: Path) -> None:
    """It stands at its prompt, for as long as somebody looks: there is a hang, and no end."""
    body = """
    breakpoint()
    time.sleep(0)
    """
    with start(tmp_path, body) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        text = ""
        while "pdb" not in text or "and still is" not in text:
            line = process.stderr.readline()
            assert line, text
            text += line
        process.stdin.write("c\n")
        process.stdin.flush()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.endswith("alive\n")


@unix_only
def test_a_stall_that_ends_in_time_ends_no_process(tmp_path: Path) -> None:
    with start(tmp_path, "time.sleep(0.15)") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "alive\n")
    assert "still is" not in errors
