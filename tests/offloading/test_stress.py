"""Everything at once: many calls of all kinds, most of them innocent, from many tasks at random."""

from __future__ import annotations

import gc
import os
import random
import time
import uuid
from pathlib import Path

import anyio
import pytest

from asyncguard.offloading import _scratch
from asyncguard.offloading._pool import OffloadPool
from tests.offloading.storm import Storm

pytestmark = pytest.mark.anyio

TASKS = 100
WORKERS = 3
PATIENCE = 60.0
"""Seconds that a test waits for an end, beyond those that it is to last."""
MARK = "ASYNCGUARD_STRESS"
GROWTH = 64 << 20
"""Bytes by which the memory of this process may differ between two moments of rest."""


def marked(mark: str) -> dict[int, str]:
    """The processes that were started by this test, and what each is."""
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_text()
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def zombies() -> set[int]:
    """Children of this process, and their children, that have ended and were not waited for."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        parents[int(path.name)] = int(parent), state
    ours = {os.getpid()}
    ours |= {pid for pid, (parent, _) in parents.items() if parent in ours}
    return {pid for pid, (parent, state) in parents.items() if parent in ours and state == "Z"}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept_files() -> list[str]:
    """The files of arguments that are kept for a while."""
    return [path for path in map(_target, Path("/proc/self/fd").iterdir()) if "memfd:asyncguard " in path]


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


async def at_rest(storm: Storm) -> tuple[int, int]:
    """The open descriptors and the memory, once nothing runs and all workers are there."""
    with anyio.fail_after(PATIENCE):
        await storm.calm()
        while zombies():
            await anyio.sleep(0.01)
        while gc.collect() >= 0 and kept_files():
            await anyio.sleep(0.01)
    return len(os.listdir("/proc/self/fd")), resident()


async def rage(monkeypatch: pytest.MonkeyPatch, seconds: float, warm_up: float) -> None:
    seed = os.environ.get("ASYNCGUARD_STRESS_SEED") or str(random.getrandbits(32))
    print(f"ASYNCGUARD_STRESS_SEED={seed}")
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setattr(_scratch, "_KEPT_FOR", 0.1)
    with anyio.fail_after(warm_up + seconds + 4 * PATIENCE):
        async with OffloadPool(WORKERS, max_queue=95, grace=0.1) as pool:
            storm = Storm(pool, seed)
            await storm.rage(TASKS, warm_up)
            descriptors, memory = await at_rest(storm)
            await storm.rage(TASKS, seconds)
            descriptors_after, memory_after = await at_rest(storm)
            print(*sorted(storm.by_kind.items()), pool.stats, f"{memory_after - memory} B more", sep="\n")
            storm.audit()
            assert storm.outcomes["result"] > 0
            assert descriptors_after <= descriptors
            assert memory_after - memory < GROWTH
            assert len(marked(mark)) == WORKERS + 1, "the workers, and what they are forked from"
    deadline = time.monotonic() + PATIENCE
    while left := marked(mark) or zombies():
        assert time.monotonic() < deadline, left
        await anyio.sleep(0.05)


async def test_a_short_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    await rage(monkeypatch, 0.7, 0.3)


@pytest.mark.slow
async def test_a_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    await rage(monkeypatch, 30, 5)
