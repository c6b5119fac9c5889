"""From stalls made by hand to reports: the line, the request, the victims, and who is not to blame."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Router

from asyncguard import _source
from asyncguard._frames import RawFrame
from asyncguard._request import RequestRecord
from asyncguard.blocking._lookups import read_stack
from asyncguard.blocking._report import awaited_line, compose, compose_gil, excuse
from asyncguard.blocking._stall import Aftermath, LongTurn, Others, OtherThread, Sample, Stall, Wait
from asyncguard.blocking._vitals import Reading
from asyncguard.events import BlockReport

Frames = tuple[RawFrame, ...]


def request(path: str, endpoint: object = None, released: float = -math.inf) -> RequestRecord:
    scope = {"type": "http", "method": "GET", "path": path, "endpoint": endpoint}
    record = RequestRecord(scope, 0.0)
    record.released = released
    return record


def reading(**changes: Any) -> Reading:
    plain = Reading(
        at=1.0,
        cpu=0.0,
        queued=0.0,
        turns=0,
        process_cpu=0.0,
        collecting=0.0,
        watchdog_turns=0,
        overslept=0.0,
    )
    return plain._replace(**changes)


def make_stall(
    *samples: Sample,
    start: float = 100.0,
    end: float = 101.0,
    turn: LongTurn | None = None,
    others: Sequence[Others] = (),
    waits: Sequence[Wait] = (),
    due: Mapping[RequestRecord, float] | None = None,
    ended_in_round: int = 0,
    starting: bool = False,
    **spent: Any,
) -> Stall:
    return Stall(
        start=start,
        end=end,
        wall_end=5000.0,
        samples=samples,
        others=others,
        turn=turn,
        aftermath=Aftermath(waits=list(waits), due=dict(due or {})),
        spent=reading(**{"at": end - start} | spent),
        loop="asyncio.UnixSelectorEventLoop",
        thread="MainThread",
        starting=starting,
        round=ended_in_round,
    )


def composed(stall: Stall, project_root: str | None = None) -> BlockReport:
    return compose(stall, 0.1, project_root)


def long_turn(record: RequestRecord, since: float = 100.0, until: float = 101.0) -> LongTurn:
    return LongTurn(record, since, until)


class Project:
    """A project with files of the user's and a library, whose functions are called for their frames.

    Modules call ``look()`` where the watchdog is to look.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, dict[str, Any]] = {}
        self._seen: list[Frames] = []

    def add(self, name: str, source: str, *, library: bool = False) -> Path:
        parent = self.folder / ("site-packages" if library else "app")
        parent.mkdir(exist_ok=True)
        file = parent / f"{name}.py"
        file.write_text(source)
        modules = {known: _Module(namespace) for known, namespace in self.modules.items()}
        namespace: dict[str, Any] = {"__name__": name, "look": self._look, **modules}
        exec(compile(source, str(file), "exec"), namespace)
        self.modules[name] = namespace
        return file

    def frames(self, name: str, function: str, *arguments: Any) -> list[Frames]:
        """The stacks at each ``look()`` of a call."""
        self._seen = []
        self._outside = id(sys._getframe())
        self.modules[name][function](*arguments)
        return self._seen

    def _look(self, *_: Any) -> bool:
        self._seen.append(read_stack(sys._getframe(1), self._outside).frames)
        return True


class _Module:
    def __init__(self, namespace: dict[str, Any]) -> None:
        self.__dict__ = namespace


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.add("lib", "def get(url):\n    return _recv()\n\ndef _recv():\n    return look()\n", library=True)
    project.add(
        "main",
        "def handler():\n"
        "    first = lib.get('secret')\n"
        "    second = lib.get('secret')\n"
        "    return helper()\n"
        "\n"
        "def helper():\n"
        "    look()\n"
        "    lib.get('x')\n"
        "\n"
        "def other():\n"
        "    lib.get('x')\n",
    )
    project.add("framework", "def serve(handler):\n    look()\n    handler()\n    look()\n", library=True)
    return project


def sample(
    at: float,
    frames: Frames,
    record: RequestRecord | None = None,
    callback: int = 1,
    task: str | None = None,
) -> Sample:
    return Sample(at, frames, record, callback, task)


# -- whose line --------------------------------------------------------------------------------------


def test_a_line_of_the_users_that_calls_a_library(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    record = request("/report")
    report = composed(make_stall(sample(100.1, frames, record)))
    assert report.line is not None
    assert (report.line.line, report.line.function) == (2, "handler")
    assert report.line.source == "first = lib.get('secret')"
    assert report.line.file.endswith("main.py")
    assert report.exact
    assert (report.call, report.innermost) == ("lib.get", "look")
    assert (report.request, report.pieces, report.thread) == ("GET /report", 1, "MainThread")
    assert (report.duration, report.started) == (1.0, 4999.0)
    assert not report.starting


def test_the_stack_goes_from_the_outermost_to_the_innermost(project: Project) -> None:
    frames = project.frames("main", "handler")[-1]
    report = composed(make_stall(sample(100.1, frames)))
    assert [line.function for line in report.stack] == ["handler", "helper", "get", "_recv"]
    assert report.line == report.stack[1]


def test_the_stack_begins_at_the_users_outermost_line(project: Project) -> None:
    handler = project.modules["main"]["handler"]
    frames = project.frames("framework", "serve", handler)[1]
    assert frames[-1].code.co_name == "serve"
    report = composed(make_stall(sample(100.1, frames)))
    assert [line.function for line in report.stack] == ["handler", "get", "_recv"]


def test_the_line_that_had_most_of_the_time(project: Project) -> None:
    first, second, *_ = project.frames("main", "handler")
    samples = [sample(100.2, first), sample(100.3, second), sample(100.4, first), sample(100.5, second)]
    report = composed(make_stall(*samples))
    assert report.line is not None
    assert report.line.line == 3  # 0.2 + 0.1 s against 0.1 + 0.6 s, the time until the end
    report = composed(make_stall(*samples, end=100.55))
    assert report.line is not None
    assert report.line.line == 2


def test_the_function_that_had_most_of_the_time(project: Project) -> None:
    """Two lines of one function outweigh a heavier line of another."""
    first, second, *_ = project.frames("main", "handler")
    (other,) = project.frames("main", "other")
    samples = [sample(100.4, other), sample(100.7, first), sample(101.0, second)]
    report = composed(make_stall(*samples))
    assert report.line is not None
    assert (report.line.function, report.line.line) == ("handler", 2)


def test_a_computation_on_the_users_own_line(project: Project) -> None:
    frames = project.frames("main", "handler")[2]
    report = composed(make_stall(sample(100.5, frames), cpu=0.9))
    assert report.line is not None
    assert (report.line.function, report.line.source, report.call) == ("helper", "look()", "look")
    assert report.cause == "cpu"
    assert report.advice is not None
    assert report.advice.docs == "cures/#computing"


def test_asyncguards_own_frames_are_left_out(project: Project) -> None:
    """A look may fall into its callback at a garbage collection."""
    own = [RawFrame(compose.__code__, 0, {"__name__": "asyncguard"})] * 2
    frames = project.frames("main", "handler")[2]
    report = composed(make_stall(sample(100.5, (*own, *frames))))
    assert report.line is not None
    assert (report.line.function, report.call, report.innermost) == ("helper", "look", "look")
    assert [line.function for line in report.stack] == ["handler", "helper"]
    assert composed(make_stall(sample(100.5, tuple(own)))).line is None


def test_an_example_that_is_installed_with_asyncguard(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shop of ``asyncguard demo`` lies inside the package then, and is the user's by its root."""
    shop = project.add("shop", "def checkout():\n    look()\n", library=True)
    monkeypatch.setattr(_source, "_OWN", f"{shop.parent.parent}{os.sep}")
    (frames,) = project.frames("shop", "checkout")
    report = composed(make_stall(sample(100.5, frames)), str(shop.parent))
    assert report.line is not None
    assert (report.line.function, report.line.line, report.exact) == ("checkout", 2, True)


def test_a_call_that_is_not_written_out(tmp_path: Path) -> None:
    """A loop calls the `__next__` of what it goes over: the name of that stands for the call."""
    project = Project(tmp_path)
    project.add(
        "rows",
        "class Rows:\n"
        "    def __iter__(self): return self\n"
        "    def __next__(self):\n"
        "        look()\n"
        "        raise StopIteration\n",
        library=True,
    )
    project.add("main", "def handler():\n    table = rows.Rows()\n    for row in table:\n        pass\n")
    (frames,) = project.frames("main", "handler")
    report = composed(make_stall(sample(100.5, frames)))
    assert report.line is not None
    assert (report.line.line, report.call) == (3, "rows.Rows.__next__")


@pytest.mark.parametrize(
    ("spent", "cause"),
    [
        # Half of the time that the thread could have had is the line between computing and waiting.
        ({"cpu": 0.5}, "cpu"),
        ({"cpu": 0.49}, "waiting"),
        ({"cpu": 0.49, "queued": 0.1}, "cpu"),
        ({"cpu": 0.9, "at": 2.0}, "waiting"),
        ({"cpu": None}, "unknown"),
        # Without the collections there would have been no stall.
        ({"collecting": 0.95, "cpu": 1.0}, "gc"),
        ({"collecting": 0.95, "cpu": None}, "gc"),
        ({"collecting": 0.8, "cpu": 1.0}, "cpu"),
    ],
)
def test_the_cause(spent: dict[str, Any], cause: str) -> None:
    assert composed(make_stall(**spent)).cause == cause


def test_a_collection_is_nobodys_fault(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    record = request("/unlucky", endpoint)
    stall = make_stall(sample(100.5, frames, record), turn=long_turn(record), cpu=1.0, collecting=0.95)
    report = composed(stall)
    assert (report.cause, report.line, report.request, report.call) == ("gc", None, None, "")
    assert report.advice is not None
    assert report.advice.docs == "cures/#garbage-collection"
    assert composed(dataclasses.replace(stall, starting=True)).advice is None


def test_a_task_that_its_request_left_behind(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    record = request("/gone")
    record.finish()
    record.finished_at = 99.0
    assert composed(make_stall(sample(100.5, frames, record))).left_behind
    record.finished_at = 100.5
    assert not composed(make_stall(sample(100.5, frames, record))).left_behind
    assert not composed(make_stall(sample(100.5, frames))).left_behind


def test_project_root_decides_whose_line(project: Project, tmp_path: Path) -> None:
    frames = project.frames("main", "handler")[0]
    elsewhere = composed(make_stall(sample(100.5, frames)), str(tmp_path / "elsewhere"))
    assert elsewhere.line is None
    assert not elsewhere.exact
    inside = composed(make_stall(sample(100.5, frames)), str(tmp_path.resolve()))
    assert inside.exact


# -- without a line of the user's --------------------------------------------------------------------


def endpoint(item: int) -> None: ...  # endpoint


@functools.wraps(endpoint)
def decorated(*arguments: Any) -> None: ...


class Endpoint:
    pass


@pytest.mark.parametrize("function", [endpoint, decorated], ids=["plain", "decorated"])
def test_the_framework_at_work_for_an_endpoint(
    project: Project, marked: Callable[[str], int], function: object
) -> None:
    frames, *_ = project.frames("framework", "serve", lambda: None)
    record = request("/big", function)
    report = composed(make_stall(sample(100.5, frames, record), cpu=1.0))
    assert report.line is not None
    assert (report.line.line, report.line.function) == (marked("endpoint"), "endpoint")
    assert not report.exact
    assert (report.call, report.innermost, report.stack) == ("", "look", ())
    assert report.request == "GET /big"
    assert report.advice is not None


@pytest.mark.parametrize(
    "function", [None, Endpoint, Endpoint(), functools.partial(endpoint), "endpoint", len]
)
def test_an_endpoint_without_a_line(project: Project, function: object) -> None:
    frames, *_ = project.frames("framework", "serve", lambda: None)
    report = composed(make_stall(sample(100.5, frames, request("/big", function))))
    assert (report.line, report.exact, report.advice) == (None, False, None)
    assert report.request == "GET /big"


def test_a_middleware_is_not_blamed_for_what_the_framework_does(project: Project) -> None:
    """It stands further out than the router, on the line that awaits the application."""
    project.add("main", "def middleware():\n    framework.serve(lambda: None)\n")
    frames, *_ = project.frames("main", "middleware")
    router = RawFrame(Router.app.__code__, 0, {"__name__": "starlette.routing"})
    at_work, *outer = frames
    record = request("/big", endpoint)
    report = composed(make_stall(sample(100.5, (at_work, router, *outer), record), cpu=1.0))
    assert report.line is not None
    assert (report.line.function, report.exact) == ("endpoint", False)
    # Inside of the router, the endpoint's own lines are found as ever.
    endpoints, *_ = project.frames("main", "middleware")
    report = composed(make_stall(sample(100.5, (*endpoints, router), record), cpu=1.0))
    assert report.line is not None
    assert (report.line.function, report.exact) == ("middleware", True)


def test_a_call_that_kept_the_watchdog_from_looking() -> None:
    """No sample, but a long turn: the request is known, and its endpoint stands for the line."""
    record = request("/sort", endpoint)
    report = composed(make_stall(turn=long_turn(record), cpu=1.0))
    assert report.request == "GET /sort"
    assert report.line is not None
    assert report.line.function == "endpoint"
    assert (report.exact, report.innermost, report.call, report.pieces) == (False, "", "", 1)


def test_code_of_nobody() -> None:
    report = composed(make_stall())
    assert (report.request, report.line, report.advice) == (None, None, None)
    assert report.headline.startswith("code outside any request")


def test_a_start_up_gets_no_advice(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    report = composed(make_stall(sample(100.5, frames), starting=True))
    assert report.starting
    assert report.line is not None
    assert report.advice is None


# -- whose request -----------------------------------------------------------------------------------


def test_a_long_turn_outweighs_the_looks(project: Project) -> None:
    """It is timed exactly: a look may have been too late and show what came next."""
    a, b = request("/a"), request("/b")
    frames, *_ = project.frames("main", "handler")
    stall = make_stall(sample(100.9, frames, b), turn=long_turn(a, 100.0, 100.6))
    assert composed(stall).request == "GET /a"
    # Not if it was the smaller part of the stall.
    stall = make_stall(sample(100.9, frames, b), turn=long_turn(a, 100.0, 100.4))
    assert composed(stall).request == "GET /b"


def test_a_burst_of_many_callbacks_of_different_requests(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    records = [request(f"/{n}") for n in range(5)]
    samples = [sample(100 + (n + 1) / 5, frames, record, callback=n) for n, record in enumerate(records, 1)]
    report = composed(make_stall(*samples, end=101.2))
    assert report.request is None
    assert report.pieces == 5
    assert report.headline.startswith("5 or more callbacks in a row blocked the loop")


def test_a_fan_out_of_one_request(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    record = request("/fan")
    samples = [sample(100 + n / 5, frames, record, callback=n) for n in range(1, 6)]
    report = composed(make_stall(*samples))
    assert (report.request, report.pieces) == ("GET /fan", 5)
    assert report.advice is not None
    assert report.advice.docs == "cures/#unbounded-fan-out"


@pytest.mark.parametrize("looks", [2, 9])
def test_one_long_hold_of_a_request_is_no_fan_out(project: Project, looks: int) -> None:
    """One look caught the callback before it."""
    frames, *_ = project.frames("main", "handler")
    record = request("/long")
    samples = [
        sample(100 + n / looks, frames, record, callback=1 if n > 1 else 2) for n in range(1, looks + 1)
    ]
    report = composed(make_stall(*samples))
    assert report.pieces == 2
    assert report.advice is not None
    assert report.advice.docs != "cures/#unbounded-fan-out"


def test_the_task_that_had_most_of_the_time(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    mine = [sample(100.3, frames, task="Task-2"), sample(100.4, frames, task="Task-1")]
    report = composed(make_stall(*mine))
    assert (report.task, report.loop) == ("Task-1", "asyncio.UnixSelectorEventLoop")
    even = [sample(100.5, frames, task="Task-1"), sample(101.0, frames)]
    assert composed(make_stall(*even)).task is None
    assert composed(make_stall()).task is None


# -- where the time went -----------------------------------------------------------------------------


def test_all_that_was_seen_comes_with_the_report(project: Project) -> None:
    """Equal stacks together, whole from the framework inwards, and the heaviest first."""
    first, second, *_ = project.frames("main", "handler")
    served = project.frames("framework", "serve", project.modules["main"]["other"])[1]
    looks = [sample(100.25, first), sample(100.5, served), sample(100.75, second), sample(100.875, first)]
    report = composed(make_stall(*looks, sample(101.0, ())))
    assert [
        (tuple((line.function, line.line) for line in seen.stack), seen.seconds) for seen in report.samples
    ] == [
        ((("handler", 2), ("get", 2), ("_recv", 5)), 0.375),
        ((("serve", 3), ("other", 11), ("get", 2), ("_recv", 5)), 0.25),
        ((("handler", 3), ("get", 2), ("_recv", 5)), 0.25),
    ]
    assert report.samples[0].stack[0].source == "first = lib.get('secret')"


def test_of_a_collection_nothing_is_shown(project: Project) -> None:
    frames, *_ = project.frames("main", "handler")
    assert composed(make_stall(sample(100.5, frames), cpu=1.0, collecting=0.95)).samples == ()


# -- another thread that had the GIL -----------------------------------------------------------------


def others(*threads: tuple[str, Frames]) -> Others:
    return tuple(OtherThread(name, frames, 0.5) for name, frames in threads)


def test_a_thread_that_kept_the_gil(project: Project) -> None:
    first, second, *_ = project.frames("main", "handler")
    victim = request("/victim", released=99.0)
    looks = [
        others(("worker", first), ("idle", second)),
        others(("worker", second)),
        others(("worker", first)),
        others(("worker", ())),
    ]
    stall = make_stall(others=looks, waits=[Wait(victim, 99.0, 101.5)])
    report = compose_gil(stall, None)
    assert report is not None
    assert (report.cause, report.held_by, report.exact) == ("gil", "worker", True)
    assert report.line is not None
    assert (report.line.function, report.line.line) == ("handler", 2)
    assert (report.call, report.innermost) == ("lib.get", "look")
    # It is no request's fault: the loop was kept from all of them.
    assert (report.request, report.task, report.left_behind, report.pieces) == (None, None, False, 1)
    assert [(seen.stack[0].line, round(seen.seconds, 3)) for seen in report.samples] == [
        (2, 0.667),
        (3, 0.333),
    ]
    assert [line.function for line in report.stack] == ["handler", "get", "_recv"]
    assert [(each.request, each.waited) for each in report.victims] == [("GET /victim", 1.5)]
    assert report.advice is not None
    assert report.advice.docs == "cures/#threads-that-compute"
    assert (report.duration, report.started, report.thread) == (1.0, 4999.0, "MainThread")
    assert report.headline == "thread worker kept the loop from the GIL for 1000 ms in look"


def test_the_thread_that_was_seen_last_is_the_one(project: Project) -> None:
    """Who had the GIL until just now still stands on its line."""
    first, second, *_ = project.frames("main", "handler")
    looks = [others(("early", first)), others(("early", first)), others(("late", second), ("early", first))]
    report = compose_gil(make_stall(others=looks), None)
    assert report is not None
    assert report.held_by == "late"
    assert report.line is not None
    assert report.line.line == 3


def test_a_thread_that_showed_no_line_of_the_users(project: Project) -> None:
    served, *_ = project.frames("framework", "serve", lambda: None)
    assert compose_gil(make_stall(), None) is None
    assert compose_gil(make_stall(others=[others(("worker", ()))]), None) is None
    assert compose_gil(make_stall(others=[others(("worker", served))]), None) is None
    frames, *_ = project.frames("main", "handler")
    report = compose_gil(make_stall(others=[others(("worker", frames))], starting=True), None)
    assert report is not None
    assert report.starting
    assert report.advice is None


# -- victims -----------------------------------------------------------------------------------------


def test_victims() -> None:
    culprit = request("/culprit")
    early = request("/early", released=99.0)
    late = request("/late", released=100.75)
    new = request("/new")
    waits = [
        Wait(culprit, 100.5, 101.25),  # its own next turn
        Wait(late, late.released, 101.25),
        Wait(early, early.released, 101.5),
        Wait(early, 101.5, 109.0),  # its second turn is no wait for the stall
        Wait(new, new.released, 101.75),
        Wait(request("/at-once"), 101.0, 101.0),
    ]
    report = composed(make_stall(turn=long_turn(culprit), waits=waits))
    assert [(victim.request, victim.waited) for victim in report.victims] == [
        ("GET /new", 1.75),
        ("GET /early", 1.5),
        ("GET /late", 0.5),
    ]


def test_what_had_long_been_due_by_its_timer_waited_since_then() -> None:
    """Of others it is only known that they came on after the stall: then its whole length may be too much."""
    napping, long_due, other = (request(path, released=99.0) for path in ("/napping", "/long-due", "/other"))
    waits = [Wait(each, each.released, 101.25) for each in (napping, long_due, other)]
    report = composed(make_stall(waits=waits, due={napping: 100.75, long_due: 99.5}))
    assert [(victim.request, victim.waited) for victim in report.victims] == [
        ("GET /long-due", 1.25),  # what it waited for before the stall is not the stall's
        ("GET /other", 1.25),
        ("GET /napping", 0.5),
    ]


def test_who_ran_between_two_stalls_of_one_iteration_waited_for_the_first_alone() -> None:
    """Both have the same aftermath: it begins with what ran before the second was over."""
    between, after = request("/between", released=99.0), request("/after", released=99.0)
    waits = [Wait(between, 99.0, 101.0), Wait(after, 99.0, 102.5)]
    first = composed(make_stall(waits=waits))
    assert {victim.request for victim in first.victims} == {"GET /between", "GET /after"}
    second = composed(make_stall(waits=waits, start=101.5, end=102.5))
    assert [(victim.request, victim.waited) for victim in second.victims] == [("GET /after", 1.0)]


def test_who_runs_in_a_later_round_did_not_wait() -> None:
    """Each stall of an aftermath counts those of so many iterations, from its own end on."""
    waits = [
        Wait(request(f"/{round_}", released=99.0), 99.0, 102.0 + round_, round_)
        for round_ in (0, Aftermath.ROUNDS, Aftermath.ROUNDS + 1, Aftermath.ROUNDS + 2)
    ]
    first = composed(make_stall(waits=waits))
    assert {victim.request for victim in first.victims} == {"GET /0", f"GET /{Aftermath.ROUNDS}"}
    second = composed(make_stall(waits=waits, ended_in_round=1))
    assert {victim.request for victim in second.victims} == {
        "GET /0",
        f"GET /{Aftermath.ROUNDS}",
        f"GET /{Aftermath.ROUNDS + 1}",
    }


def test_each_of_two_stalls_in_a_row_had_those_waiting_who_came_on_after_both() -> None:
    """The first kept them for longer than itself: nothing let them run between the two."""
    both, second_only = request("/both", released=99.0), request("/second-only", released=101.25)
    waits = [Wait(both, 99.0, 102.5, 1), Wait(second_only, 101.25, 102.75, 2)]
    first = composed(make_stall(waits=waits))
    assert [(victim.request, victim.waited) for victim in first.victims] == [("GET /both", 2.5)]
    second = composed(make_stall(waits=waits, start=101.5, end=102.5, ended_in_round=1))
    assert [(victim.request, victim.waited) for victim in second.victims] == [
        ("GET /second-only", 1.25),
        ("GET /both", 1.0),
    ]


def arrived(path: str, at: float | None, port: int = 0) -> RequestRecord:
    record = served_to(port, path)
    record.arrived = at
    return record


def test_a_newcomer_waited_since_its_data_was_there() -> None:
    newcomers = [
        arrived("/before", 99.0),
        arrived("/during", 100.75),
        arrived("/too-close-to-tell", 100.996),
        arrived("/after", 101.125),
        arrived("/unknown", None),
    ]
    waits = [Wait(newcomer, -math.inf, 101.25) for newcomer in newcomers]
    report = composed(make_stall(waits=waits))
    assert [(victim.request, victim.waited) for victim in report.victims] == [
        ("GET /before", 1.25),
        ("GET /unknown", 1.25),
        ("GET /during", 0.5),
    ]


def test_a_newcomer_that_is_known_to_have_been_there_waited_whatever_its_connection() -> None:
    """It was sent before the answer; of another on that connection, that can only be guessed."""
    culprit = served_to(5001, "/culprit")
    waits = [
        Wait(arrived("/sent-on", 100.5, 5001), -math.inf, 101.25),
        Wait(arrived("/next", 101.01, 5001), -math.inf, 101.25),
        Wait(arrived("/unknown", None, 5001), -math.inf, 101.25),
    ]
    report = composed(make_stall(turn=long_turn(culprit), waits=waits))
    assert [(victim.request, victim.waited) for victim in report.victims] == [("GET /sent-on", 0.75)]


def test_of_a_request_that_had_run_its_arrival_says_nothing() -> None:
    its = arrived("/", 50.0)
    report = composed(make_stall(waits=[Wait(its, 100.75, 101.25)]))
    assert [victim.waited for victim in report.victims] == [0.5]
    # Nor that of one whose second turn of the aftermath it is.
    its.arrived = 101.125
    report = composed(make_stall(waits=[Wait(its, -math.inf, 101.25), Wait(its, 100.0, 101.5)]))
    assert report.victims == ()


def served_to(port: int, path: str, http_version: str = "1.1") -> RequestRecord:
    scope = {"type": "http", "method": "GET", "path": path, "client": ("192.0.2.1", port)}
    return RequestRecord(scope | {"http_version": http_version}, 0.0)


@pytest.mark.parametrize(
    ("port", "http_version", "expected"),
    [
        (5001, "1.1", {"GET /first"}),
        (5001, "2", {"GET /first", "GET /next", "GET /after-that"}),  # sends many at once
        (0, "1.1", {"GET /first", "GET /next", "GET /after-that"}),  # not known behind a proxy
    ],
)
def test_who_sends_the_next_request_after_the_answer_did_not_wait(
    port: int, http_version: str, expected: set[str]
) -> None:
    culprit = served_to(port, "/culprit", http_version)
    waits = [
        Wait(served_to(port, "/next", http_version), -math.inf, 101.1),
        Wait(served_to(port and 5002, "/first", http_version), -math.inf, 101.2),
        Wait(served_to(port and 5002, "/after-that", http_version), -math.inf, 101.3),
    ]
    report = composed(make_stall(turn=long_turn(culprit), waits=waits))
    assert {victim.request for victim in report.victims} == expected


def test_several_requests_of_one_route_in_a_row(project: Project) -> None:
    """Each is too short to be a stall by itself: any of them stands for the route."""
    frames, *_ = project.frames("main", "handler")

    def blamed(*records: RequestRecord | None) -> str | None:
        samples = [sample(100 + n / 4, frames, each, n) for n, each in enumerate(records, 1)]
        return composed(make_stall(*samples)).request

    assert blamed(*(request("/same") for _ in range(4))) == "GET /same"
    assert blamed(*(request("/same") for _ in range(3)), request("/other")) == "GET /same"
    assert blamed(*(request(f"/{n}") for n in range(4))) is None
    # Code of nobody's may come first, and have less.
    assert blamed(None, *(request("/same") for _ in range(3))) == "GET /same"
    assert blamed(None, None, None, request("/same")) is None


def test_the_aftermath_is_bounded() -> None:
    aftermath = Aftermath()
    record = request("/")
    for _ in range(10_100):
        aftermath.note_turn(record, 1.0)
    assert len(aftermath.waits) == 10_000


# -- numbers -----------------------------------------------------------------------------------------


def test_reports_are_numbered() -> None:
    first, second = composed(make_stall()), composed(make_stall())
    assert second.id == first.id + 1


def test_a_report_holds_nothing_of_the_request(project: Project) -> None:
    """Only text and numbers: hooks may keep reports for as long as they like."""
    frames, *_ = project.frames("main", "handler")
    record = request("/", endpoint)
    report = composed(make_stall(sample(100.1, frames, record), waits=[Wait(request("/v"), 0, 102)]))
    json.dumps(dataclasses.asdict(report))
    assert isinstance(report, BlockReport)
    assert "secret" not in f"{report.call} {report.innermost}"


def test_the_line_is_right_without_columns(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import time, asyncio, asyncguard\n"
        "reports = []\n"
        "async def main():\n"
        "    async with asyncguard.LoopMonitor(threshold=0.05, on_block=reports.append, log=False):\n"
        "        await asyncio.sleep(0)\n"
        "        time.sleep(0.15)\n"
        "asyncio.run(main())\n"
        "print(reports[0].line.line)\n"
    )
    command = [sys.executable, "-X", "no_debug_ranges", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "6\n"


# -- excuses -----------------------------------------------------------------------------------------

FRAMES = (RawFrame(endpoint.__code__, 0, {}),)


INTERVAL = sys.getswitchinterval()


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        # Seen, and on the core or waiting of its own will: to blame.
        ({"cpu": 1.0}, None),
        ({"cpu": 0.0}, None),
        ({"cpu": None}, None),
        # Ready, but others had the cores for all but 0.05 s, all but 0.2 s.
        ({"queued": 0.95}, "starved"),
        ({"queued": 0.8}, None),
        ({"queued": 0.91, "cpu": 0.09}, "starved"),
        ({"queued": 0.89, "cpu": 0.11}, None),
        ({"queued": 0.95, "cpu": None}, "starved"),
        # Queueing that may have been before the stall is no excuse.
        ({"queued": 0.95, "at": 1.5}, None),
        ({"queued": 1.45, "at": 1.5}, "starved"),
        ({"queued": 0.1, "at": 50.0}, None),
        # The watchdog slept too long as well: the process was stopped.
        ({"overslept": 0.95}, "suspended"),
        ({"overslept": 0.8}, None),
        # Or the code held the GIL: then it computed,
        ({"overslept": 0.95, "cpu": 0.9}, None),
        ({"overslept": 0.95, "cpu": 0.24}, "suspended"),
        ({"overslept": 0.95, "cpu": 0.25}, None),
        # or it waited without giving the GIL up: then the watchdog woke again and again to ask for it.
        ({"overslept": 0.95, "watchdog_turns": int(0.95 / INTERVAL)}, None),
        ({"overslept": 0.95, "watchdog_turns": 1}, "suspended"),
        # That may also have been before a stop. But a thread that rests has turns in a stop only.
        ({"overslept": 0.95, "watchdog_turns": int(0.95 / INTERVAL), "resting_turns": 2}, "suspended"),
        ({"overslept": 0.81, "watchdog_turns": 1, "resting_turns": 2}, "suspended"),  # it napped when stopped
        ({"overslept": 0.81, "watchdog_turns": 1}, None),
        # It may have computed before, in the part of the window that the stall is not in.
        ({"at": 1.5, "cpu": 0.5, "overslept": 0.95, "watchdog_turns": 1, "resting_turns": 2}, "suspended"),
        ({"at": 1.5, "cpu": 0.75, "overslept": 0.95, "watchdog_turns": 1, "resting_turns": 2}, None),
        ({"overslept": 0.79, "watchdog_turns": 1, "resting_turns": 2}, None),
        ({"overslept": 0.95, "cpu": None}, None),
        # Other threads computed, and this one woke again and again to ask for the GIL.
        ({"cpu": 0.1, "process_cpu": 0.9, "turns": int(1 / INTERVAL)}, "gil"),
        ({"cpu": 0.1, "process_cpu": 0.9, "turns": 3}, None),
        # In one that began after it, all of that; but not if that is hardly anything.
        ({"at": 0.5, "cpu": 0.1, "process_cpu": 0.45, "turns": int(0.5 / INTERVAL)}, "gil"),
        ({"at": 0.2, "cpu": 0.0, "process_cpu": 0.2, "turns": int(1 / INTERVAL)}, None),
        # In a window that began before the stall, it all counts.
        ({"at": 4.0, "cpu": 0.3, "process_cpu": 3.0, "turns": int(4 / INTERVAL)}, None),
        ({"at": 4.0, "cpu": 0.2, "process_cpu": 2.3, "turns": int(4 / INTERVAL)}, "gil"),
        ({"at": 4.0, "cpu": 0.2, "process_cpu": 2.1, "turns": int(4 / INTERVAL)}, None),
        ({"at": 4.0, "cpu": 0.2, "process_cpu": 2.3, "turns": int(1 / INTERVAL) - 1}, None),
        # Other processes left them little of the cores, but the watchdog waited for the GIL as well.
        (
            {
                "cpu": 0.1,
                "process_cpu": 0.4,
                "turns": int(1 / INTERVAL),
                "overslept": 0.6,
                "watchdog_turns": int(0.6 / INTERVAL),
            },
            "gil",
        ),
        ({"cpu": 0.1, "process_cpu": 0.4, "turns": int(1 / INTERVAL), "overslept": 0.6}, None),
        ({"cpu": 0.1, "process_cpu": 0.5, "turns": int(1 / INTERVAL)}, None),
        ({"cpu": 0.3, "process_cpu": 2.0, "turns": int(1 / INTERVAL)}, None),
    ],
)
def test_excuses(spent: dict[str, Any], expected: str | None) -> None:
    assert excuse(make_stall(sample(100.5, FRAMES), **spent), 0.1, None) == expected


def test_a_stall_that_showed_nothing_is_unexplained() -> None:
    assert excuse(make_stall(), 0.1, None) == "unexplained"
    assert excuse(make_stall(sample(100.5, ())), 0.1, None) == "unexplained"
    assert excuse(make_stall(sample(100.5, ()), sample(100.6, FRAMES)), 0.1, None) is None
    assert excuse(make_stall(turn=long_turn(request("/"))), 0.1, None) is None
    # A callback of asyncguard's own, as its heartbeat, had to wait as all others had.
    own = RawFrame(compose.__code__, 0, {"__name__": "asyncguard"})
    assert excuse(make_stall(sample(100.5, (own, own))), 0.1, None) == "unexplained"
    # A garbage collection may fall between two callbacks, or into such a one.
    assert excuse(make_stall(sample(100.5, (own,)), collecting=0.95), 0.1, None) is None


@given(st.floats(0.1, 100), st.floats(0, 100), st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))
def test_no_excuse_without_a_cause(
    duration: float, before: float, cpu: float, queued: float, overslept: float
) -> None:
    """What the system took is less than the stall exceeds the threshold by: then it stays a stall."""
    stall = make_stall(
        sample(100.0, FRAMES),
        end=100 + duration,
        at=duration + before,
        cpu=cpu,
        process_cpu=cpu,
        queued=queued,
        overslept=overslept,
    )
    verdict = excuse(stall, 0.1, None)
    if max(queued, overslept) < stall.duration - 0.1 - 1e-6:
        assert verdict is None
    if verdict == "suspended":
        assert cpu < stall.duration / 4


# -- what a request awaits ---------------------------------------------------------------------------


async def waiter() -> None:
    await asyncio.sleep(0)  # waiter


def test_the_line_that_a_request_awaits(marked: Callable[[str], int]) -> None:
    record = request("/", endpoint)
    record.coroutine = waiter()
    record.coroutine.send(None)
    line = awaited_line(record, None)
    assert line is not None
    assert (line.line, line.function) == (marked("waiter"), "waiter")
    # No line of the user's on the way: the endpoint.
    line = awaited_line(record, "/no/such/root")
    assert line is not None
    assert line.line == marked("endpoint")
    record.coroutine.close()
    record.coroutine = None
    record.finish()
    line = awaited_line(record, None)
    assert line is not None
    assert line.line == marked("endpoint")


def test_nothing_is_known_of_a_request_before_routing() -> None:
    assert awaited_line(request("/"), None) is None
