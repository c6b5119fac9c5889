"""The monitor on real loops, and what it makes of the stalls that it is told of."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import uvloop

import asyncguard
from asyncguard import BlockReport, LoopMonitor
from asyncguard._request import RequestRecord
from asyncguard.blocking import _monitor
from asyncguard.blocking._ledger import Ledger
from asyncguard.blocking._stall import Stall
from asyncguard.events import Advice, SourceLine, Victim

if TYPE_CHECKING:
    from tests.conftest import TurnedClock

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def watch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncguard-")}


def eventually(condition: Callable[[], object]) -> None:
    """For what another thread does in its own time; fails after a time that no machine needs."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


# -- real stalls on real loops -----------------------------------------------------------------------


def block_for(seconds: float) -> None:
    time.sleep(seconds)  # sleep


@pytest.mark.anyio
async def test_a_stall_is_reported_with_its_line(marked: Callable[[str], int]) -> None:
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False) as monitor:
        await anyio.sleep(0.01)
        block_for(0.15)
        await anyio.sleep(0.01)
    assert len(reports) == 1, monitor.excused
    report = reports[0]
    assert report.line is not None
    assert (report.line.line, report.line.function) == (marked("sleep"), "block_for")
    assert (report.call, report.innermost, report.exact) == ("time.sleep", "sleep", True)
    assert report.cause == "waiting"
    assert 0.1 < report.duration < 5
    assert abs(report.started - time.time()) < 60
    assert (report.request, report.victims, report.starting) == (None, (), False)
    assert report.advice is not None
    assert report.advice.docs == "cures/#sleep"
    assert report.thread == threading.current_thread().name
    assert [(entry.line, entry.count) for entry in monitor.lines] == [(report.line, 1)]


@pytest.mark.anyio
async def test_a_computation_is_told_from_a_wait(marked: Callable[[str], int]) -> None:
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False):
        await anyio.sleep(0.01)
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            _ = sum(range(1000))  # computation
        await anyio.sleep(0.01)
    report = max(reports, key=lambda report: report.duration)
    assert report.cause == "cpu"
    assert report.line is not None
    assert report.line.function.endswith("test_a_computation_is_told_from_a_wait")
    assert marked("computation") - 1 <= report.line.line <= marked("computation")


@pytest.mark.anyio
async def test_waiting_asynchronously_is_no_stall() -> None:
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.25, on_block=reports.append, log=False) as monitor:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(anyio.sleep, 0.6)
            await anyio.to_thread.run_sync(time.sleep, 0.6)
    assert reports == []
    assert monitor.lines == ()


@pytest.mark.anyio
async def test_a_stall_in_a_child_task_is_reported_too(marked: Callable[[str], int]) -> None:
    reports: list[BlockReport] = []

    async def child() -> None:
        await anyio.sleep(0.01)
        time.sleep(0.15)  # in a child

    async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False):
        async with anyio.create_task_group() as group:
            group.start_soon(child)
    (report,) = reports
    assert report.line is not None
    assert report.line.line == marked("in a child")


@pytest.mark.anyio
async def test_stopped_in_the_middle_of_a_stall() -> None:
    """The stall is still going on when the block ends: nothing was awaited since."""
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False):
        await anyio.sleep(0.01)
        block_for(0.15)
    assert len(reports) == 1


@pytest.mark.anyio
async def test_two_monitors_on_one_loop() -> None:
    short: list[BlockReport] = []
    long: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, on_block=short.append, log=False):
        async with LoopMonitor(threshold=0.5, on_block=long.append, log=False):
            await anyio.sleep(0.01)
            before = watch_threads()
            block_for(0.15)
            await anyio.sleep(0.01)
            block_for(1.0)
            await anyio.sleep(0.01)
            assert len({thread for thread in before if "watchdog" in thread.name}) >= 1
    assert [round(report.duration, 1) > 0.5 for report in short] == [False, True]
    assert [report.duration > 0.5 for report in long] == [True]


@pytest.mark.anyio
async def test_stopped_in_the_middle_of_a_stall_while_another_monitor_goes_on() -> None:
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, log=False):
        async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False):
            await anyio.sleep(0.01)
            block_for(0.15)
        assert len(reports) == 1
        await anyio.sleep(0.01)
    assert len(reports) == 1


@pytest.mark.anyio
async def test_the_last_reports_are_out_while_another_monitor_goes_on() -> None:
    reports: list[BlockReport] = []

    def slow(report: BlockReport) -> None:
        time.sleep(0.2)
        reports.append(report)

    async with LoopMonitor(threshold=0.05, log=False):
        async with LoopMonitor(threshold=0.05, on_block=slow, log=False):
            await anyio.sleep(0.01)
            block_for(0.15)
            await anyio.sleep(0.01)
        assert len(reports) == 1


@pytest.mark.anyio
async def test_a_second_monitor_with_a_shorter_threshold() -> None:
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=60, log=False):
        await anyio.sleep(0.1)
        async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False):
            await anyio.sleep(0.01)
            block_for(0.15)
            await anyio.sleep(0.01)
    assert [report.call for report in reports] == ["time.sleep"]


@pytest.mark.anyio
async def test_a_monitor_may_be_used_again() -> None:
    reports: list[BlockReport] = []
    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)
    for count in (1, 2):
        async with monitor:
            await anyio.sleep(0.01)
            block_for(0.15)
            await anyio.sleep(0.01)
        assert len(reports) == count
    (entry,) = monitor.lines
    assert entry.count == 2


@pytest.mark.anyio
async def test_stopping_twice_or_without_a_start() -> None:
    monitor = LoopMonitor()
    await monitor.stop()
    async with monitor:
        await monitor.stop()
        await monitor.stop()


@pytest.mark.anyio
async def test_nothing_is_left_on_the_loop() -> None:
    before = watch_threads()
    loop = asyncio.get_running_loop() if asyncio._get_running_loop() else None
    factory = loop.get_task_factory() if loop else None
    async with LoopMonitor(threshold=0.05, log=False):
        await anyio.sleep(0.01)
        block_for(0.12)
        await anyio.sleep(0.01)
    if loop:
        assert loop.get_task_factory() is factory
        assert "select" not in vars(getattr(loop, "_selector", object))
    await anyio.to_thread.run_sync(eventually, lambda: watch_threads() <= before)


@pytest.mark.anyio
async def test_stopping_takes_no_more_than_two_seconds() -> None:
    release, done = threading.Event(), threading.Event()
    free = threading.Timer(8, release.set)  # so that the test ends in any case
    free.start()

    def stuck(report: BlockReport) -> None:
        release.wait()
        done.set()

    async def in_thread() -> None:
        await anyio.to_thread.run_sync(release.wait)

    limiter = anyio.to_thread.current_default_thread_limiter()
    monitor = LoopMonitor(threshold=0.05, on_block=stuck, log=False)
    async with anyio.create_task_group() as group:
        for _ in range(int(limiter.total_tokens)):
            group.start_soon(in_thread)
        await anyio.sleep(0.05)
        async with monitor:
            await anyio.sleep(0.01)
            block_for(0.15)
        in_time = not release.is_set()
        release.set()
    free.cancel()
    assert in_time
    await anyio.to_thread.run_sync(done.wait, 30)


def test_outside_a_loop() -> None:
    monitor = LoopMonitor()
    with pytest.raises(RuntimeError):
        monitor._watch()
    assert monitor.in_flight == ()


# -- the ends of loops -------------------------------------------------------------------------------


def run_and_leave(kind: str, monitor: LoopMonitor) -> weakref.ref[Any]:
    """A loop that is closed while it is watched, as test clients do."""

    async def main() -> None:
        await monitor.__aenter__()
        await asyncio.sleep(0.01)
        block_for(0.15)
        await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        runner.run(main())
        return weakref.ref(runner.get_loop())


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_that_is_closed_without_a_stop(kind: str) -> None:
    before = watch_threads()
    reports: list[BlockReport] = []
    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)
    run_and_leave(kind, monitor)
    eventually(lambda: watch_threads() <= before)
    assert len(reports) == 1


def test_a_trio_run_that_ends_without_a_stop() -> None:
    before = watch_threads()
    reports: list[BlockReport] = []
    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)

    async def main() -> None:
        await monitor.__aenter__()
        await anyio.sleep(0.01)
        block_for(0.15)
        await anyio.sleep(0.01)

    anyio.run(main, backend="trio")
    eventually(lambda: watch_threads() <= before)
    assert len(reports) == 1


@pytest.mark.parametrize("kind", LOOPS)
def test_a_closed_loop_is_not_kept(kind: str) -> None:
    before, watches = watch_threads(), len(_monitor._watches)
    loop = run_and_leave(kind, LoopMonitor(threshold=0.05, log=False))
    eventually(lambda: watch_threads() <= before)
    gc.collect()
    assert loop() is None
    assert len(_monitor._watches) <= watches


def test_two_loops_in_two_threads(marked: Callable[[str], int]) -> None:
    reports: list[BlockReport] = []
    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)
    together = threading.Barrier(2)

    async def main() -> None:
        async with monitor:
            await anyio.sleep(0.01)
            together.wait()
            block_for(0.3)
            await anyio.sleep(0.01)

    threads = [
        threading.Thread(target=anyio.run, args=[main], kwargs={"backend": backend}, name=backend)
        for backend in ("asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The wait for each other may be a stall of its own.
    blocked = [report for report in reports if report.call == "time.sleep"]
    assert sorted(report.thread for report in blocked) == ["asyncio", "trio"]
    assert {report.line.line for report in blocked if report.line} == {marked("sleep")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", LOOPS)
def test_a_forked_child_watches_anew(tmp_path: Path, kind: str) -> None:
    """The threads stay with the parent: the child's loop has no watch, and can have a new one."""
    program = """
    import asyncio, os, threading, time, traceback, uvloop, warnings
    from asyncguard import LoopMonitor

    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, from 3.12 on
    reports = []
    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)

    async def child():
        async with monitor:
            await asyncio.sleep(0.01)
            time.sleep(0.15)
            await asyncio.sleep(0.01)
        assert len(reports) == 1, reports

    async def parent():
        async with monitor:
            await asyncio.sleep(0.01)
            selector = getattr(asyncio.get_running_loop(), "_selector", object)
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    assert monitor.in_flight == ()
                    assert "select" not in vars(selector)
                    names = [thread.name for thread in threading.enumerate()]
                    assert not any("asyncguard" in name for name in names), names
                    with asyncio.Runner(loop_factory=FACTORY) as runner:
                        runner.run(child())
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await asyncio.sleep(0.01)
            time.sleep(0.15)
            await asyncio.sleep(0.01)
        assert [report.call for report in reports][-1] == "time.sleep", reports

    with asyncio.Runner(loop_factory=FACTORY) as runner:
        runner.run(parent())
    """
    run_program(tmp_path, program.replace("FACTORY", FACTORIES[kind]))


# At that time Python 3.12 starts no thread any more.
@pytest.mark.parametrize("kind", LOOPS)
def test_the_last_iteration_of_a_loop_that_is_never_closed(tmp_path: Path, kind: str) -> None:
    """No poll comes after it: the process's end tells of it."""
    program = """
    import asyncio, time, uvloop
    from asyncguard import guard

    async def app(scope, receive, send):
        time.sleep(0.15)

    async def main():
        await guarded({"type": "http", "method": "GET", "path": "/last"}, None, None)

    guarded = guard(app, block_threshold=0.05, log=False, on_block=lambda report: print(report.request))
    loop = FACTORY()
    loop.run_until_complete(main())
    """
    assert run_program(tmp_path, program.replace("FACTORY", FACTORIES[kind])) == "GET /last\n"


FACTORIES = {"asyncio": "asyncio.new_event_loop", "uvloop": "uvloop.new_event_loop"}


def run_program(folder: Path, program: str) -> str:
    """Its output; it must succeed and be silent otherwise."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("kind", LOOPS)
def test_between_two_runs_of_a_loop_nobody_holds_it(kind: str) -> None:
    reports: list[BlockReport] = []
    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)

    async def begin() -> None:
        await monitor.__aenter__()
        await asyncio.sleep(0.01)

    async def end() -> None:
        await asyncio.sleep(0.01)
        block_for(0.15)
        await asyncio.sleep(0.01)
        await monitor.stop()

    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        runner.run(begin())
        time.sleep(0.4)
        runner.run(end())
    assert [report.line.function for report in reports if report.line] == ["block_for"]
    assert len(reports) == 1


def test_a_threshold_that_is_as_good_as_off() -> None:
    async def main() -> None:
        async with LoopMonitor(threshold=1e12, log=False):
            await asyncio.sleep(0.01)
            assert any("watchdog" in thread.name for thread in watch_threads() - before)

    before = watch_threads()
    asyncio.run(main())


@pytest.mark.parametrize("kind", LOOPS)
def test_the_last_iteration_of_a_loop_that_is_closed(kind: str) -> None:
    """The stall ends with the run: no poll comes after it."""
    reports: list[BlockReport] = []

    loop = LOOPS[kind]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01)
        loop.stop()
        block_for(0.15)

    async def main() -> None:
        await guarded({"type": "http", "method": "GET", "path": "/last"}, None, None)  # type: ignore[arg-type]

    guarded = asyncguard.guard(app, block_threshold=0.05, on_block=reports.append, log=False)
    task = loop.create_task(main())
    loop.run_forever()
    assert task.done()
    loop.close()
    eventually(lambda: reports)
    assert [report.request for report in reports] == ["GET /last"]


@pytest.mark.anyio
async def test_a_fork_forgets_the_parents_watches() -> None:
    """What happens in the child, tried here: the locks may have been held by threads that it has not."""
    before = watch_threads()
    monitor = LoopMonitor(threshold=0.05, log=False)
    watch = monitor._watch()
    watch.in_flight.add(RequestRecord({"type": "http", "method": "GET", "path": "/"}, 0.0))
    monitor._ledger._lock.acquire()
    _monitor._watches_lock.acquire()
    _monitor._forget_watches()
    assert not watch.active
    assert monitor.in_flight == ()
    assert monitor.lines == ()
    assert monitor._watch() is not watch
    await monitor.stop()
    await anyio.to_thread.run_sync(eventually, lambda: watch_threads() <= before)


# -- what becomes of a stall -------------------------------------------------------------------------


def report(line: int | None = 1, duration: float = 1.0, **changes: Any) -> BlockReport:
    plain: dict[str, Any] = {
        "id": 1,
        "started": 0.0,
        "duration": duration,
        "cause": "waiting",
        "line": None if line is None else SourceLine("app.py", line, "f"),
        "exact": True,
        "call": "time.sleep",
        "innermost": "sleep",
        "request": "GET /",
        "left_behind": False,
        "starting": False,
        "pieces": 1,
        "stack": (),
        "victims": (),
        "advice": Advice("Rest", "cures/#rest"),
        "thread": "MainThread",
    }
    return BlockReport(**(plain | changes))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tells a monitor of a stall that is to become a given report."""
    monkeypatch.setattr(_monitor, "excuse", lambda stall, threshold: None)
    monkeypatch.setattr(_monitor, "compose", lambda stall, threshold, project_root: stall)

    def tell(monitor: LoopMonitor, *reports: BlockReport) -> None:
        for each in reports:
            monitor._receive(cast(Stall, each))

    return tell


def test_each_line_is_counted(told: Callable[..., None]) -> None:
    monitor = LoopMonitor(log=False)
    victims = (Victim("GET /v", 1.0), Victim("GET /w", 1.0))
    told(
        monitor,
        report(1, 1.0, request="GET /a", call="small"),
        report(2, 7.0),
        report(1, 3.0, request="GET /b", call="big", victims=victims, advice=Advice("Big", "cures/#big")),
        report(1, 2.0, request="GET /a", call="middle", victims=victims),
        report(None, 20.0, request=None),
    )
    nowhere, two, one = monitor.lines
    assert (nowhere.line, nowhere.requests, nowhere.total) == (None, (), 20.0)
    assert (two.count, two.total, two.worst) == (1, 7.0, 7.0)
    assert one.line == SourceLine("app.py", 1, "f")
    assert (one.count, one.total, one.worst, one.victims) == (3, 6.0, 3.0, 4)
    assert one.requests == ("GET /a", "GET /b")
    assert (one.call, one.advice) == ("big", Advice("Big", "cures/#big"))


def test_the_tables_are_bounded(told: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "MOST_LINES", 3)
    monitor = LoopMonitor()
    told(monitor, *(report(line, request=f"GET /{line}") for line in (1, 2, 3, 1, 4, 5)))
    assert sorted(entry.line.line for entry in monitor.lines if entry.line) == [1, 4, 5]
    assert len(monitor._ledger._entries) == 3
    told(monitor, *(report(1, request=f"GET /more/{n}") for n in range(100)))
    (one,) = [entry for entry in monitor.lines if entry.line and entry.line.line == 1]
    assert len(one.requests) == 10
    assert one.requests[0] == "GET /1"


def test_the_log_is_grouped(
    told: Callable[..., None], clock: TurnedClock, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = LoopMonitor()

    def logged(*reports: BlockReport) -> list[str]:
        caplog.clear()
        told(monitor, *reports)
        return [record.getMessage() for record in caplog.records]

    assert logged(report(1)) == [str(report(1))]
    assert logged(report(1), report(1)) == []
    assert logged(report(2)) == [str(report(2))]
    clock.turn(59)
    assert logged(report(1)) == []
    clock.turn(1)
    (again,) = logged(report(1, 2.0))
    assert again.startswith(str(report(1, 2.0)))
    assert "3 more of this line" in again
    assert logged(report(1)) == []
    clock.turn(60)
    assert "1 more of this line" in logged(report(1))[0]
    clock.turn(60)
    assert logged(report(1)) == [str(report(1))]


def test_the_log_record(told: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    event = report()
    told(LoopMonitor(), event)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asyncguard.blocking", logging.WARNING)
    assert record.__dict__["asyncguard_report"] is event


def test_a_start_up_is_no_warning_and_costs_no_line(
    told: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    events: list[BlockReport] = []
    monitor = LoopMonitor(on_block=events.append)
    told(monitor, report(starting=True, advice=None, request=None))
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert monitor.lines == ()
    assert len(events) == 1


def test_a_log_that_is_switched_off(told: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    told(LoopMonitor(log=False), report())
    assert caplog.records == []


def test_a_broken_hook_keeps_nothing_from_the_log(
    told: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[BlockReport] = []

    def broken(event: BlockReport) -> None:
        calls.append(event)
        raise LookupError

    monitor = LoopMonitor(on_block=broken)
    told(monitor, report(1), report(2))
    assert len(calls) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING"]
    assert len(monitor.lines) == 2


@pytest.mark.parametrize("reason", ["starved", "suspended", "gil", "unexplained"])
def test_the_innocent_are_counted_and_not_reported(
    told: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    monkeypatch.setattr(_monitor, "excuse", lambda stall, threshold: reason)
    events: list[BlockReport] = []
    monitor = LoopMonitor(on_block=events.append)
    told(monitor, report(), report())
    assert (events, monitor.lines, caplog.records) == ([], (), [])
    assert monitor.excused[reason] == 2
    assert sum(monitor.excused.values()) == 2


def test_what_is_excused_is_a_copy() -> None:
    monitor = LoopMonitor()
    cast(dict[str, int], monitor.excused)["starved"] = 5
    assert set(monitor.excused.values()) == {0}
