"""The benchmark of shared clients: one run of a few requests, calls and openings."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from benchmarks import clients

ROUNDS = 2


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(clients, "_REQUESTS", 5)
    yield
    gc.unfreeze()  # what a benchmark freezes, in a process of its own


def test_each_way_gets_the_client() -> None:
    for name, app in clients.gets().items():
        with clients.plain.override(clients.Client()), clients.aging.override(clients.Client()):
            answer = TestClient(app).get("/")
        assert (answer.status_code, answer.json()) == (200, True), name


def test_getting_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = asyncio.run(clients.measure_gets(ROUNDS))
    assert {"no client", "module global", "request.state", "Depends(shared)"} < set(found)
    assert all(len(samples) == ROUNDS and min(samples) > 0 for samples in found.values())
    clients.report_gets(found)
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in found)


@pytest.mark.parametrize("library", clients.LIBRARIES)
def test_calling_one(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = asyncio.run(clients.measure_calls(library, ROUNDS, 2))
    assert {"bare", "shared, no deadline", "shared, in a request with a deadline"} < set(found)
    assert all(len(samples) == ROUNDS and min(samples) > 0 for samples in found.values())
    clients.report_calls(library, found)
    printed = capsys.readouterr().out
    assert f"a call of {library}: " in printed
    assert all(f"\n{name} " in printed for name in found)


@pytest.mark.parametrize("library", clients.LIBRARIES)
def test_opening_ten(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = clients.measure_openings(library, 1)
    assert set(found) == set(clients.WAYS_TO_OPEN)
    for samples in found.values():
        assert all(set(sample) == {"stall", "in all"} for sample in samples)
        assert all(min(sample.values()) > 0 for sample in samples)
    budget = clients.report_openings(library, found)
    printed = capsys.readouterr().out
    assert all(f"\n{way} " in printed for way in found)
    assert budget.what == f"stall while 10 clients of {library} are opened"
    assert budget.value == found["shared"][0]["stall"]


def test_one_opening_is_printed_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clients", "--open", "shared"])
    clients.main()
    assert set(json.loads(capsys.readouterr().out)) == {"stall", "in all"}
