"""The monitor on real loops: what it reports of them, and what it tells when asked."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import statistics
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
from asyncguard import BlockReport, LoopMonitor, Windows
from asyncguard._reporter import Reporter
from asyncguard._request import RequestRecord
from asyncguard.blocking import _monitor
from asyncguard.blocking._probes import running_loop
from asyncguard.blocking._watch import LoopWatch
from asyncguard.blocking._watchdog import Watchdog

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
async def test_a_stall_in_the_very_first_iteration(
    monkeypatch: pytest.MonkeyPatch, marked: Callable[[str], int]
) -> None:
    """The watchdog may have looked before there was anything to look at: it must not rest for that."""
    looked = threading.Event()
    is_alive, start = LoopWatch.is_alive, Watchdog.start

    def is_alive_after_a_look(watch: LoopWatch) -> bool:
        looked.set()
        return is_alive(watch)

    def start_and_wait(watchdog: Watchdog, name: str) -> None:
        start(watchdog, name)
        assert looked.wait(30)

    monkeypatch.setattr(LoopWatch, "is_alive", is_alive_after_a_look)
    monkeypatch.setattr(Watchdog, "start", start_and_wait)
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, on_block=reports.append, log=False) as monitor:
        block_for(0.15)
        await anyio.sleep(0.01)
    assert [report.line and report.line.line for report in reports] == [marked("sleep")], monitor.excused


@pytest.mark.anyio
@pytest.mark.parametrize("loop_goes_on", [True, False])
async def test_the_hook_hears_of_a_stall_soon_after_its_end(loop_goes_on: bool) -> None:
    """Most often: on a busy machine, threads may have to wait for a core."""
    heard: queue.SimpleQueue[float] = queue.SimpleQueue()
    waits = []
    async with LoopMonitor(threshold=0.02, on_block=lambda _: heard.put(time.monotonic()), log=False):
        for _ in range(5):
            block_for(0.1)
            ended = time.monotonic()
            if (
                not loop_goes_on
            ):  # the next hold begins in the aftermath of the stall, and is longer than that
                await anyio.lowlevel.checkpoint()
                block_for(0.5)
            waits.append(await anyio.to_thread.run_sync(heard.get, True, 30) - ended)
            if not loop_goes_on:
                await anyio.to_thread.run_sync(heard.get, True, 30)
    assert statistics.median(waits) < 0.3


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
async def test_stopped_while_other_callbacks_hold_the_loop(marked: Callable[[str], int]) -> None:
    """Of one iteration, what was before the stop is told; what comes after it is not, nor what is later."""
    reports: list[BlockReport] = []
    heard: list[threading.Event] = []
    stopped: list[float] = []
    loop = running_loop()
    soon = loop.call_soon if isinstance(loop, asyncio.AbstractEventLoop) else loop.run_sync_soon

    def block() -> None:
        time.sleep(0.15)  # before and after the stop

    def stop() -> None:
        stopped.append(time.time())
        heard.append(monitor._leave(watch))

    monitor = LoopMonitor(threshold=0.05, on_block=reports.append, log=False)
    watch = monitor._watch()
    await anyio.sleep(0.02)
    for callback in (block, stop, block):
        soon(callback)
    await anyio.sleep(0.02)
    block()
    await anyio.sleep(0.02)
    await anyio.to_thread.run_sync(eventually, heard[0].is_set)
    (report,) = reports
    assert report.line is not None
    assert report.line.line == marked("before and after the stop")
    assert report.duration > 0.1
    assert report.started + report.duration < stopped[0] + 0.1
    assert not watch.active


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
@pytest.mark.parametrize("joins", [True, False])
async def test_a_monitor_that_comes_or_leaves_in_mid_stall_takes_nothing_from_others(joins: bool) -> None:
    reports: list[BlockReport] = []
    other = LoopMonitor(threshold=0.05, log=False)
    async with LoopMonitor(threshold=0.2, on_block=reports.append, log=False):
        if not joins:
            await other.__aenter__()
        await anyio.sleep(0.05)
        block_for(0.4)
        if joins:
            await other.__aenter__()
        else:
            other._leave(other._watch())
        await anyio.sleep(0.05)
        await other.stop()
    assert len(reports) == 1
    assert reports[0].duration > 0.35


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


def test_requests_in_flight_while_another_loop_begins() -> None:
    """Its watch is entered in the same table, in another thread."""
    monitor = LoopMonitor()
    asked, answered = threading.Event(), threading.Event()

    def ask() -> None:
        asked.set()
        assert monitor.in_flight == ()
        answered.set()

    thread = threading.Thread(target=ask)
    with _monitor._watches_lock:
        assert monitor.in_flight == ()
        thread.start()
        asked.wait()
        assert not answered.wait(0.05)
    thread.join()
    assert answered.is_set()


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", LOOPS)
def test_a_forked_child_may_leave_the_block(tmp_path: Path, kind: str) -> None:
    """What ends it comes through."""
    program = """
    import asyncio, os, uvloop, warnings
    from asyncguard import LoopMonitor

    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, from 3.12 on

    async def main():
        pid = None
        try:
            async with LoopMonitor(log=False):
                await asyncio.sleep(0.01)
                pid = os.fork()
                if pid == 0:
                    raise SystemExit(7)
        except BaseException as error:
            os._exit(error.code if type(error) is SystemExit and pid == 0 else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7

    with asyncio.Runner(loop_factory=FACTORY) as runner:
        runner.run(main())
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


@pytest.mark.parametrize("kind", LOOPS)
def test_who_runs_in_the_next_run_of_a_loop_is_no_victim_of_the_last(kind: str) -> None:
    """As in a test suite whose tests share a loop: the stall that ended one run is nobody else's."""
    reports: list[BlockReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01)
        if scope["path"] == "/last":
            block_for(0.15)

    async def request(path: str) -> None:
        await guarded({"type": "http", "method": "GET", "path": path}, None, None)  # type: ignore[arg-type]

    guarded = asyncguard.guard(app, block_threshold=0.05, on_block=reports.append, log=False)
    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        runner.run(request("/last"))
        eventually(lambda: reports)  # although nobody runs the loop
        runner.run(request("/next"))
    assert [(report.request, report.victims) for report in reports] == [("GET /last", ())]


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_that_is_closed_with_a_request_in_flight_is_not_kept(kind: str) -> None:
    """The request awaits something of the loop, so whoever keeps the one keeps the other."""
    before = watch_threads()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> weakref.ref[asyncio.Task[None]]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *arguments: None)  # of the task that is destroyed
        scope = {"type": "http", "method": "GET", "path": "/"}
        task = asyncio.ensure_future(guarded(scope, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        return weakref.ref(task)

    guarded = cast(asyncguard.BlockingMiddleware, asyncguard.guard(app, block_threshold=0.05, log=False))
    loop = LOOPS[kind]()
    gone: list[weakref.ref[Any]] = [loop.run_until_complete(main()), weakref.ref(loop)]
    assert len(guarded.monitor.in_flight) == 1
    loop.close()
    del loop
    eventually(lambda: watch_threads() <= before)
    gc.collect()
    assert [each() for each in gone] == [None, None]


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
    monitor._listener.ledger._lock.acquire()
    monitor._listener.ledger._dropping.acquire()
    _monitor._watches_lock.acquire()
    _monitor._forget_watches()
    assert not watch.active
    assert monitor.in_flight == ()
    assert monitor.lines == ()
    assert monitor.dropped == 0
    assert monitor._watch() is not watch
    await monitor.stop()
    await anyio.to_thread.run_sync(eventually, lambda: watch_threads() <= before)


# -- what a monitor tells of itself ------------------------------------------------------------------


def test_of_no_loop_there_is_nothing_to_tell() -> None:
    monitor = LoopMonitor(threshold=0.25)
    assert monitor.threshold == 0.25
    assert monitor.utilisation == monitor.lag == (0, 0, 0)
    assert monitor.dropped == 0
    assert sum(monitor.stalls.counts) == 0
    assert (monitor.lines, monitor.in_flight) == ((), ())
    assert set(monitor.excused.values()) == {0}


def test_what_is_excused_is_a_copy() -> None:
    monitor = LoopMonitor()
    cast(dict[str, int], monitor.excused)["starved"] = 5
    assert set(monitor.excused.values()) == {0}


@pytest.mark.anyio
async def test_how_busy_the_loop_is() -> None:
    async with LoopMonitor(threshold=0.25, log=False) as monitor:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(0.02)
        busy = monitor.utilisation
        assert all(0.05 < share <= 1 for share in busy), busy
        assert all(0 <= late < 0.5 for late in monitor.lag)
        await anyio.sleep(1.3)
        idle = monitor.utilisation
        assert idle.last_1s < busy.last_1s
        # The longer windows still have it.
        assert idle.last_1s < idle.last_60s
    assert monitor.utilisation == (0, 0, 0)


@pytest.mark.anyio
async def test_a_stall_makes_the_loop_late() -> None:
    async with LoopMonitor(threshold=0.05, log=False) as monitor:
        await anyio.sleep(0.05)
        block_for(0.3)
        await anyio.sleep(0.05)
        # What became due within the stall, at any moment of it, waited for half of it on average.
        assert 0.02 < monitor.lag.last_10s < 5
        assert 0.1 < monitor.utilisation.last_10s <= 1
    assert sum(monitor.stalls.counts) == 1
    assert 0.2 < monitor.stalls.total < 5


@pytest.mark.asyncio
async def test_a_hold_counts_while_it_lasts(clock: TurnedClock) -> None:
    async with LoopMonitor(threshold=1000, log=False) as monitor:
        await anyio.lowlevel.checkpoint()
        clock.turn(2.0)
        assert monitor.utilisation == (1.0, 1.0, 1.0)
        assert monitor.lag.last_10s == pytest.approx(1.0)
        await anyio.lowlevel.checkpoint()
        assert monitor.utilisation.last_10s == pytest.approx(1.0)


def test_the_busiest_loop_stands_for_all() -> None:
    worst = _monitor._worst([Windows(0.1, 0.9, 0.3), Windows(0.4, 0.2, 0.3)])
    assert worst == Windows(0.4, 0.9, 0.3)
    assert worst.last_1s == 0.4
    assert _monitor._worst([]) == Windows(0, 0, 0)


@pytest.mark.anyio
async def test_what_is_dropped_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stall is reported or counted, however slow the hook; each monitor counts its own."""
    monkeypatch.setattr(Reporter, "MOST_WAITING", 2)
    busy, go_on = threading.Event(), threading.Event()
    events: list[BlockReport] = []

    def stuck(event: BlockReport) -> None:
        busy.set()
        go_on.wait()
        events.append(event)

    async with LoopMonitor(threshold=0.05, on_block=stuck, log=False) as monitor:
        async with LoopMonitor(threshold=60, log=False) as patient:
            await anyio.sleep(0.01)
            block_for(0.1)
            await anyio.to_thread.run_sync(busy.wait)
            for _ in range(5):
                block_for(0.1)
                await anyio.sleep(0.01)
            dropped = monitor.dropped
            go_on.set()
    assert dropped >= 1
    assert len(events) + sum(monitor.excused.values()) + monitor.dropped >= 6
    assert patient.dropped == 0


@pytest.mark.anyio
async def test_the_end_of_the_watch_is_the_end_of_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """What has come since the last summary is summed up then."""
    async with LoopMonitor(threshold=0.05):
        for _ in range(3):
            await anyio.sleep(0.01)
            block_for(0.15)
            await anyio.sleep(0.01)
    first, summary = [record.getMessage() for record in caplog.records]
    assert "blocked the loop for" in first
    assert "block_for: time.sleep(seconds)  # sleep blocked the loop 2 more times, for 0." in summary


@pytest.mark.anyio
async def test_a_monitor_that_is_gone_is_told_nothing() -> None:
    """It is held by nobody but its user; the loop's watch goes on without it."""
    reports: list[BlockReport] = []
    async with LoopMonitor(threshold=0.05, log=False) as other:
        monitor = LoopMonitor(threshold=0.01, on_block=reports.append, log=False)
        watch = monitor._watch()
        assert watch.threshold == 0.01
        del monitor
        await anyio.sleep(0.01)
        block_for(0.15)
        await anyio.sleep(0.01)
        assert watch.threshold == 0.05
    assert reports == []
    assert sum(other.stalls.counts) == 1
