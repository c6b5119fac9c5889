"""Offloading in the tests of a project, which run in several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.offload_servers import Family

PATIENCE = 120.0
ROOT = Path(__file__).parents[2]

WORK = """\
import os
import sys
from pathlib import Path

from fastapi import FastAPI

import asyncguard
from asyncguard import offload

FOLDER = Path(__file__).parent


def note(name, *words):
    with (FOLDER / name).open("a") as file:
        print(*words, file=file)


@offload
def square(number):
    print("said by a worker")  # standard output is how pytest-xdist talks to its own processes
    os.write(1, b"written by a worker")
    note("workers", os.getpid())
    return number * number


@offload
def spin():
    note("spins", os.getpid())
    while True:
        pass


app = FastAPI()
asyncguard.install(app, offload_workers=1)


@app.get("/square/{number}")
async def get_square(number: int) -> int:
    return await square(number)
"""

TESTS = """\
import asyncio
import os

import pytest
from fastapi.testclient import TestClient

from asyncguard import OffloadPool, offload
from work import app, note, spin, square


@offload
def here(number):
    return number + 1, os.getpid()


@pytest.fixture(autouse=True)
def tell():
    note("runners", os.environ["PYTEST_XDIST_WORKER"], os.getpid())


@pytest.mark.parametrize("number", range(2))
def test_called(number):
    assert asyncio.run(square(number)) == number * number


@pytest.mark.parametrize("number", range(2))
def test_in_a_pool_of_its_own(number):
    async def main():
        async with OffloadPool(1) as pool:
            return await here(number), await pool.run(os.getpid)

    (found, pid), worker = asyncio.run(main())
    assert (found, pid) == (number + 1, worker)
    assert pid != os.getpid()


@pytest.mark.parametrize("number", range(2))
def test_in_an_application(number):
    with TestClient(app) as client:
        assert client.get(f"/square/{number}").json() == number * number
"""

CRASH = """\
import asyncio
import os

from work import FOLDER, spin


def test_that_crashes():
    async def main():
        call = asyncio.ensure_future(spin())
        while not ((FOLDER / "spins").exists() and (FOLDER / "spins").read_text()):
            await asyncio.sleep(0.01)
        os._exit(3)

    asyncio.run(main())
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Without settings of its own, and so with pytest's own way of imports."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "test_work.py").write_text(TESTS)
    return tmp_path


def run_tests(project: Path, *options: str) -> tuple[int, str]:
    """Run its tests in two processes; returns the exit code and what was written."""
    family = Family()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *options],
            cwd=project,
            env={**os.environ, "PYTHONPATH": path, **family.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        family.await_end()
    finally:
        family.end()
    return done.returncode, done.stdout


def noted(project: Path, name: str) -> list[str]:
    return (project / name).read_text().splitlines()


@pytest.mark.parametrize("options", [[], ["-s"]], ids=["captured", "not captured"])
def test_calls_in_two_processes(project: Path, options: list[str]) -> None:
    code, output = run_tests(project, *options)
    assert code == 0, output
    assert "6 passed" in output
    runners = {*noted(project, "runners")}
    assert {line.split()[0] for line in runners} == {"gw0", "gw1"}
    assert len(runners) == 2
    workers = noted(project, "workers")
    assert len(workers) == 4
    assert not {*workers} & {line.split()[1] for line in runners}


def test_a_test_process_that_crashes(project: Path) -> None:
    """Its workers end with it, and the others' do not."""
    (project / "test_crash.py").write_text(CRASH)
    code, output = run_tests(project, "-k", "crashes or called")
    assert code == 1, output
    assert "crashed while running" in output
    assert "1 failed, 2 passed" in output
    assert len(noted(project, "spins")) == 1
