"""How many CPUs there are for this process, as containers limit them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncguard.offloading._cpus import usable_cpus


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("5000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("nonsense\n", 8),
        ("", 8),
        ("0 100000\n", 8),
        ("100000 0\n", 8),
    ],
)
def test_a_containers_limit(tmp_path: Path, limit: str, cpus: int) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    assert usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1\n", 8), ("300000\n", 3), ("250000\n", 3)])
def test_the_first_version_of_control_groups(tmp_path: Path, quota: str, cpus: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cpus(tmp_path) == cpus


def test_without_control_groups(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == 8


def test_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path) == 1


def test_this_process() -> None:
    assert usable_cpus() >= 1
