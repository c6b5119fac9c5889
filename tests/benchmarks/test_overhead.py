"""The benchmark of the overhead: its arithmetic, its clock, and one run of a few requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.apps import VARIANTS, Variant, hello
from benchmarks.servers import CONNECTIONS, Failed, cpu_time, serve
from benchmarks.summary import Budget, Spread, differences, ratios, table

# -- arithmetic ------------------------------------------------------------------------------------


def test_the_spread_is_the_middle_half() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(median=3, low=2, high=4)
    assert Spread.of([7]) == Spread(median=7, low=7, high=7)
    assert Spread(1.0501, 1.0, 1.1).show(2) == "1.05 (1.00 to 1.10)"


def test_samples_are_compared_with_the_baseline_of_their_own_round() -> None:
    assert ratios([2, 6], [1, 2]) == [2, 3]
    assert differences([2, 6], [1, 2]) == [1, 4]
    with pytest.raises(ValueError, match="longer"):
        ratios([1], [1, 2])


@pytest.mark.parametrize(("value", "met"), [(1.05, True), (1.051, False)])
def test_a_budget_is_met_up_to_its_limit(value: float, met: bool) -> None:
    budget = Budget("CPU", 1.05, value, " x")
    assert budget.met is met
    assert str(budget).startswith("met " if met else "MISSED ")


def test_a_table_lines_up_its_columns() -> None:
    made = table("Title", ["", "CPU"], [["bare", "1"], ["asyncguard", "1.04 s"]])
    assert made.splitlines() == [
        "Title",
        "",
        "               CPU",
        "bare             1",
        "asyncguard  1.04 s",
    ]


# -- variants --------------------------------------------------------------------------------------


def test_every_variant_is_compared_with_a_bare_one_on_the_same_loop() -> None:
    for variant in VARIANTS.values():
        baseline = VARIANTS[variant.baseline]
        assert baseline.loop == variant.loop
        assert baseline.make is hello


def test_a_choice_brings_its_baselines() -> None:
    assert overhead._chosen(None) == list(VARIANTS)
    assert overhead._chosen("asyncguard on uvloop,pyleak") == [
        "bare",
        "bare on uvloop",
        "asyncguard on uvloop",
        "pyleak",
    ]


def test_a_round_is_shared_evenly_by_the_connections(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--round", str(CONNECTIONS + 1)])
    assert "--round: takes a multiple of" in capsys.readouterr().err


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(SystemExit, match="no such variant: nothing"):
        overhead._chosen("bare,nothing")


# -- processes -------------------------------------------------------------------------------------


def test_the_clock_counts_all_threads_of_another_process() -> None:
    burn = """
import threading, time
def work():
    while time.thread_time() < 0.1: pass
thread = threading.Thread(target=work)
thread.start()
thread.join()
work()
print(time.process_time(), flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told = float(process.stdout.readline())
        used = cpu_time(process.pid) / 1e9
        again = cpu_time(process.pid) / 1e9
        process.stdin.write("\n")
    # Until it sleeps in `input`, it uses a little more than it could tell.
    assert 0.2 < told <= used < told + 0.1
    assert used <= again < told + 0.1


@pytest.mark.e2e
def test_a_server_that_ends_by_itself_says_why() -> None:
    unknown = Variant("unknown to it", hello)
    with serve(unknown, http="h11") as server, pytest.raises(Failed, match="KeyError: 'unknown to it'"):
        server.await_answer()


@pytest.mark.e2e
def test_load_is_measured_by_the_servers_own_cpu() -> None:
    with serve(VARIANTS["bare"], http="h11") as server:
        server.await_answer()
        server.connect()
        few = server.load(2 * CONNECTIONS)
        wall = time.monotonic_ns()
        many = server.load(40 * CONNECTIONS)
        wall = time.monotonic_ns() - wall
    # Some clocks tick every 10 ms: the few may fall between two ticks. And it works before and after the time
    # from the first request to the last answer.
    assert 0 <= few < many <= 2 * wall


@pytest.mark.e2e
def test_a_server_that_dies_under_load_fails() -> None:
    with serve(VARIANTS["bare"], http="h11") as server:
        server.await_answer()
        server.connect()
        server._process.kill()
        server._process.wait()
        with pytest.raises(Failed, match="bare ended by itself"):
            server.load(CONNECTIONS)


@pytest.mark.e2e
@pytest.mark.slow
def test_one_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = "--only asyncguard --requests 40 --round 20 --starts 2 --idle 0.2 --in-process 3 --imports 2"
    assert overhead.main([*options.split(), "--json", str(file)]) == 0

    results = json.loads(file.read_text())
    assert not results["failures"]
    assert {name: len(samples) for name, samples in results["load"].items()} == {"bare": 2, "asyncguard": 2}
    assert set(results["idle"]) == {"bare", "asyncguard"}
    assert set(results["in_process"]) == {"asyncio", "uvloop"}
    for apps in results["in_process"].values():
        for variants in apps.values():
            assert all(len(samples) == 3 and min(samples) > 0 for samples in variants.values())
    assert len(results["imports"]) == 2
    assert len(results["budgets"]) == 7

    printed = capsys.readouterr().out
    for title in ("Under uvicorn (h11)", "Idle: 0.2 s", "In process", "Import after FastAPI", "Budgets"):
        assert title in printed
    assert f"Python: CPython {sys.version.split()[0]}" in printed
    assert "cores: " in printed


def test_a_missed_budget_fails_only_a_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "_measure_servers", lambda *_: None)
    monkeypatch.setattr(overhead, "_measure_in_process", lambda *_: None)
    monkeypatch.setattr(
        overhead, "_measure_imports", lambda results, _: results.imports.append(overhead.MOST_IMPORT + 1)
    )
    assert overhead.main([]) == 0
    assert overhead.main(["--check"]) == 1
    assert "MISSED  import after FastAPI" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_variant_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = Variant("broken", hello)  # of which its server knows nothing
    monkeypatch.setattr(overhead, "VARIANTS", {"bare": VARIANTS["bare"], "broken": broken})
    monkeypatch.setattr(overhead, "_measure_in_process", lambda *_: None)
    monkeypatch.setattr(overhead, "_measure_imports", lambda *_: None)
    file = tmp_path / "results.json"
    options = "--requests 40 --round 20 --starts 2 --idle 0.1"
    assert overhead.main([*options.split(), "--json", str(file)]) == 1
    results = json.loads(file.read_text())
    (failure,) = results["failures"]
    assert "KeyError: 'broken'" in failure
    assert set(results["load"]) == set(results["idle"]) == {"bare"}
    assert len(results["load"]["bare"]) == 2


def test_what_cannot_be_measured_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "_measure_servers", lambda *_: None)
    monkeypatch.setattr(overhead, "_measure_in_process", lambda *_: None)
    monkeypatch.setattr(overhead, "_IMPORT", "import asyncguard_is_not_called_this")
    assert overhead.main([]) == 1
    assert "ModuleNotFoundError" in capsys.readouterr().out


def test_one_core_is_used_and_all_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with overhead._on_one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_quick_is_a_set_of_options() -> None:
    options = overhead._parser().parse_args(["--quick", "--idle", "1"])
    assert (options.requests, options.idle) == (2000, 1.0)
