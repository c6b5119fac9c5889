"""The files of large arguments are written again, and never while somebody still reads them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from asyncguard import OffloadPool
from asyncguard.offloading import _scratch
from asyncguard.offloading._nameless import Descriptor
from asyncguard.offloading._scratch import ScratchFiles
from tests.offloading import chores_large

PATIENCE = 60.0
KIBI = 1 << 10


class FakeLoop:
    """Keeps its timers, until they are rung."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, call: Callable[[], None]) -> FakeTimer:
        self.timers.append((delay, call))
        return FakeTimer(self, len(self.timers) - 1)


class FakeTimer:
    def __init__(self, loop: FakeLoop, index: int) -> None:
        self._loop, self._index = loop, index

    def cancel(self) -> None:
        self._loop.timers[self._index] = (0, lambda: None)


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def files(loop: FakeLoop) -> Iterator[ScratchFiles]:
    before = descriptors()
    files = ScratchFiles(loop)  # type: ignore[arg-type]
    yield files
    files.close()
    assert descriptors() == before


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def used(files: ScratchFiles, size: int) -> tuple[Descriptor, int]:
    """A file that something was written to; and what names it, however often it is opened."""
    file = Descriptor(files.take(size))
    assert os.write(file.fd, bytes(size)) == size
    return file, os.fstat(file.fd).st_ino


def test_a_file_that_was_given_back_is_taken_again(files: ScratchFiles) -> None:
    file, name = used(files, 10 * KIBI)
    files.give(file)
    del file
    for size in (4 * KIBI, 20 * KIBI):
        file, found = used(files, size)
        assert (found, os.fstat(file.fd).st_size) == (name, size)
        files.give(file)
        del file


def test_what_was_not_given_back_is_not_taken_again(files: ScratchFiles) -> None:
    file, name = used(files, 10)
    other, found = used(files, 10)
    assert found != name
    del file, other


def test_the_smallest_that_is_large_enough_is_taken_else_the_largest(files: ScratchFiles) -> None:
    names = {}
    held = []
    for size in (30, 10, 20):
        file, names[size] = used(files, size)
        held.append(file)
    for file in held:
        files.give(file)
    held.clear()
    del file
    taken = [used(files, size) for size in (15, 100, 1)]
    assert [name for _, name in taken] == [names[20], names[30], names[10]]


def test_no_more_is_kept_than_a_certain_size(files: ScratchFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scratch, "_MOST", 100)
    first, kept = used(files, 60)
    second, dropped = used(files, 60)
    files.give(first)
    files.give(second)
    del first, second
    taken = [used(files, 60), used(files, 60)]
    assert [taken[0][1] == kept, taken[1][1] == dropped] == [True, False]


def test_after_a_while_they_are_given_up(files: ScratchFiles, loop: FakeLoop) -> None:
    for _ in range(2):
        files.give(used(files, 10)[0])
    ((delay, ring),) = loop.timers
    assert delay == 5
    before = len(descriptors())
    ring()
    assert len(descriptors()) == before - 1
    files.give(used(files, 10)[0])
    assert len(loop.timers) == 2


def test_closed_it_keeps_none(files: ScratchFiles) -> None:
    file, _ = used(files, 10)
    files.close()
    files.give(file)
    del file


# -- with real workers -------------------------------------------------------------------------------


@pytest.fixture
async def pool() -> AsyncIterator[OffloadPool]:
    with anyio.fail_after(PATIENCE):
        async with OffloadPool(1) as pool:
            yield pool


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The files that were given back, by what names them."""
    given: list[int] = []
    give = ScratchFiles.give

    def note(files: ScratchFiles, file: Descriptor) -> None:
        given.append(os.fstat(file.fd).st_ino)
        give(files, file)

    monkeypatch.setattr(ScratchFiles, "give", note)
    return given


def array(fill: int, kibi: int = 300) -> np.ndarray[Any, Any]:
    return np.full(kibi * KIBI, fill, dtype=np.uint8)


@pytest.mark.anyio
async def test_arguments_of_any_size_arrive_whole(pool: OffloadPool, given: list[int]) -> None:
    for fill, kibi in enumerate([300, 900, 200, 700, 200], 1):
        assert await pool.run(chores_large.total, array(fill, kibi)) == fill * kibi * KIBI
        text = bytes([fill]) * (kibi * KIBI)
        assert await pool.run(chores_large.length, text) == kibi * KIBI
    assert len(given) == 10
    assert len(set(given)) == 1


@pytest.mark.anyio
async def test_what_a_function_keeps_is_not_written_to(pool: OffloadPool, given: list[int]) -> None:
    await pool.run(chores_large.keep, array(1))
    for fill in (2, 3):
        await pool.run(chores_large.total, array(fill))
    assert await pool.run(chores_large.total_of_kept) == 300 * KIBI
    assert len(given) == 2
    await pool.run(chores_large.keep, None)


@pytest.mark.anyio
async def test_nor_is_what_it_returns(pool: OffloadPool, given: list[int]) -> None:
    results = [await pool.run(chores_large.same, array(fill)) for fill in (1, 2, 3)]
    assert [int(result.sum()) for result in results] == [fill * 300 * KIBI for fill in (1, 2, 3)]
    assert given == []


@pytest.mark.anyio
async def test_nor_what_a_forked_child_reads(pool: OffloadPool, given: list[int], tmp_path: Path) -> None:
    go, answer = tmp_path / "go", tmp_path / "answer"
    await pool.run(chores_large.fork_and_total, array(1), str(go), str(answer))
    for fill in (2, 3):
        await pool.run(chores_large.total, array(fill))
    go.touch()
    with anyio.fail_after(PATIENCE):
        while not answer.exists():
            await anyio.sleep(0.01)
    assert answer.read_text() == str(300 * KIBI)
    assert len(given) == 2


@pytest.mark.anyio
async def test_nor_what_a_call_that_was_given_up_may_still_read(pool: OffloadPool, given: list[int]) -> None:
    with anyio.move_on_after(0.3):
        await pool.run(chores_large.total_later, array(1), 20)
    assert await pool.run(chores_large.total, array(2)) == 600 * KIBI
    assert len(given) == 1
