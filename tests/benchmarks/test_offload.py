"""The benchmark of offloading: one run of a few calls."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import offload

ROUNDS = 2
OPTIONAL = {"loky", "pebble"}
"""Libraries that only the environment of the benchmarks has."""


def test_one_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = asyncio.run(offload.measure(ROUNDS, offload.CALLERS, 1 << 20))

    assert set(offload.WAYS) - OPTIONAL <= set(found["one"])
    assert set(found["many"]) == set(found["one"]) - {"floor"}
    assert set(found["stall"]) == set(found["many"])
    assert set(found["ready"]) == set(found["many"]) - {"asyncio.to_thread"}
    assert set(found["large"]) == {"memcpy", *found["many"]}
    for what, ways in found.items():
        for samples in ways.values():
            assert len(samples) == ROUNDS
            assert what == "stall" or min(samples) > 0

    budgets = offload.report(found)
    printed = capsys.readouterr().out
    for ways in found.values():
        assert all(f"\n{name} " in printed for name in ways)
    assert [budget.what for budget in budgets] == [
        "a call, to the floor",
        "time per call of 100 callers, to ProcessPoolExecutor",
        "ready again after a cancelled call",
        "100 MB in, to a copy in memory",
        "the loop's stall meanwhile",
    ]
