"""The benchmark of request timeouts: one run of a few requests."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator

import pytest

from benchmarks import timeouts

FEW = {"bare ASGI": 20, "FastAPI": 5}
ROUNDS = 2


@pytest.fixture(autouse=True)
def _few_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert set(timeouts._REQUESTS) == set(FEW)
    monkeypatch.setattr(timeouts, "_REQUESTS", FEW)
    yield
    gc.unfreeze()  # what a benchmark freezes, in a process of its own


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_one_short_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["timeouts", "--loop", loop, "--rounds", str(ROUNDS)])
    timeouts.main()
    results = json.loads(capsys.readouterr().out)

    assert {kind: set(times) for kind, times in results.items()} == {
        kind: set(timeouts.variants(kind)) for kind in FEW
    }
    for times in results.values():
        assert {"bare", "pass-through", "asyncguard, one layer", "asyncio.timeout"} < set(times)
        assert all(len(samples) == ROUNDS and min(samples) > 0 for samples in times.values())
    assert "asyncguard, installed" in results["FastAPI"]

    budgets = timeouts.report(loop, results)
    printed = capsys.readouterr().out
    for kind, times in results.items():
        assert f"{kind} on {loop}: microseconds of CPU per request" in printed
        assert all(f"\n{name} " in printed for name in times)
    assert [budget.what for budget in budgets] == [
        f"asyncguard, one layer, bare ASGI on {loop}",
        f"asyncguard, one layer, FastAPI on {loop}",
        f"asyncguard, installed, FastAPI on {loop}",
    ]
