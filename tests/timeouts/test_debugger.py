"""Whether somebody looks at the process with a debugger."""

from __future__ import annotations

import bdb
import io
import sys
import threading
from types import ModuleType
from typing import Any

import pytest

from asyncguard.timeouts import _debugger
from asyncguard.timeouts._debugger import is_debugged

monitoring: Any = getattr(sys, "monitoring", None)


@pytest.fixture(autouse=True)
def _no_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest itself loads one."""
    for name in _debugger._DEBUGGERS:
        monkeypatch.delitem(sys.modules, name, raising=False)


class Debugger(bdb.Bdb):
    """One whose class is in another module than `bdb`."""


class Tracing(bdb.Bdb):
    """One that is the trace function itself."""

    def __call__(self, *event: object) -> None: ...


class TracingFurther(Tracing):
    pass


def asked_under(trace: Any) -> bool:
    """What is said on a thread that is traced by `trace`."""
    seen: list[bool] = []

    def ask() -> None:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            seen.append(is_debugged(0.0))
        finally:
            sys.settrace(before)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("kind", [bdb.Bdb, Debugger])
def test_a_debugger_traces(kind: type[bdb.Bdb]) -> None:
    debugger = kind()
    debugger.reset()
    assert asked_under(debugger.trace_dispatch)


@pytest.mark.parametrize("kind", [Tracing, TracingFurther])
def test_an_instance_of_a_debuggers_class_traces(kind: type[Tracing]) -> None:
    debugger = kind()
    assert asked_under(debugger)
    assert asked_under(debugger.__call__)


@pytest.mark.parametrize(
    "module", ["bdb", "pdb", "pydevd", "_pydevd_bundle.pydevd_trace_dispatch", "pudb.debugger"]
)
def test_a_plain_function_of_a_debuggers_module_traces(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*event: object) -> None: ...

    trace.__module__ = module
    assert asked_under(trace)
    monkeypatch.setattr(sys, "gettrace", lambda: trace)
    assert is_debugged(0.0)


class Tracer:
    """As tools that measure coverage have it."""

    def __call__(self, *event: object) -> None: ...

    def trace(self, *event: object) -> None: ...


def trace(*event: object) -> None: ...


@pytest.mark.parametrize(
    "other", [None, trace, Tracer(), Tracer().trace], ids=lambda other: type(other).__name__
)
def test_who_traces_is_not_always_a_debugger(other: Any) -> None:
    assert not asked_under(other)


def test_nobody_looks() -> None:
    """Not even where the coverage of this test is measured."""
    assert not is_debugged(0.0)


@pytest.mark.parametrize("name", ["pdb", "bdb"])
def test_loading_pdb_says_nothing_where_it_has_no_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "__stdin__", stream)
        assert not is_debugged(3600.0)


@pytest.mark.parametrize("name", ["pdb", "bdb", "debugpy", "pydevd"])
def test_a_timer_that_comes_very_late_where_a_debugger_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "__stdin__", Terminal())
    assert not is_debugged(3600.0)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert is_debugged(3600.0)
    assert is_debugged(1.01)
    assert not is_debugged(1.0)
    assert not is_debugged(0.0)


@pytest.mark.skipif(monitoring is None, reason="sys.monitoring is of 3.12")
def test_a_debugger_monitors() -> None:
    assert not is_debugged(0.0)
    monitoring.use_tool_id(monitoring.DEBUGGER_ID, "a debugger")
    try:
        assert is_debugged(0.0)
    finally:
        monitoring.free_tool_id(monitoring.DEBUGGER_ID)
    assert not is_debugged(0.0)


@pytest.mark.skipif(monitoring is None, reason="sys.monitoring is of 3.12")
def test_a_profiler_that_monitors_is_no_debugger() -> None:
    if monitoring.get_tool(monitoring.PROFILER_ID) is None:
        monitoring.use_tool_id(monitoring.PROFILER_ID, "a profiler")
        try:
            assert not is_debugged(0.0)
        finally:
            monitoring.free_tool_id(monitoring.PROFILER_ID)
