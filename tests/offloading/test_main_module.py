"""The server's main module is found in a worker, and what it does as a program is not done again."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asyncguard.offloading._control import Surroundings
from asyncguard.offloading._main_module import MainModule
from tests.offloading.nursery import PATIENCE, Nursery

BODY = """
import os
import sys

class Point:
    def __init__(self, x):
        self.x = x

counted = 0

def count():
    global counted
    counted += 1
    return counted, __name__, sys.modules["__main__"].counted

def move(point):
    return Point(point.x + 1)

if __name__ == "__main__":
    from tests.offloading import chores
    from tests.offloading.nursery import Nursery
    with Nursery() as nursery:
        worker = nursery.fork()
        print(worker.call(chores.main_is_loaded))
        moved = worker.call(chores.same, Point(1))
        print(type(moved) is Point, moved.x, worker.call(move, moved).x)
        print(worker.call(count), worker.call(count))
"""

EXPECTED = "False\nTrue 1 2\n(1, '__mp_main__', 1) (2, '__mp_main__', 2)\n"


def run(*command: str, cwd: Path) -> str:
    found = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *map(str, sys.path)])},
        capture_output=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
    return found.stdout.decode()


def test_a_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(BODY)
    assert run("script.py", cwd=tmp_path) == EXPECTED


def test_a_package(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").write_text("x = 1\n")
    (package / "__main__.py").write_text("from . import other\n" + BODY)
    assert run("-m", "pkg", cwd=tmp_path) == EXPECTED


def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(BODY)
    assert run("-m", "module", cwd=tmp_path) == EXPECTED


def test_a_folder_and_an_archive(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "__main__.py").write_text(BODY)
    assert run("folder", cwd=tmp_path) == EXPECTED
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", BODY)
    assert run("app.pyz", cwd=tmp_path) == EXPECTED


def surroundings(main: MainModule | None) -> Surroundings:
    return Surroundings.of_this_process()._replace(main=main)


def test_one_that_was_typed_in() -> None:
    assert (
        run(
            "-c",
            "from asyncguard.offloading._main_module import of_this_process; print(of_this_process())",
            cwd=Path.cwd(),
        )
        == "None\n"
    )
    from asyncguard.offloading._address import Address

    with Nursery(surroundings(None)) as nursery:
        worker = nursery.fork()
        with pytest.raises(AttributeError, match="was not read from a file"):
            worker.call(Address("__main__", "f", 0))


def test_one_that_starts_workers_when_it_is_imported(tmp_path: Path) -> None:
    """Each of them would start others."""
    from asyncguard.offloading._address import Address

    path = tmp_path / "unguarded.py"
    path.write_text(
        "from asyncguard.offloading._control import Surroundings\n"
        "Surroundings.of_this_process()\n"
        "def f(): pass\n"
    )
    with Nursery(surroundings(MainModule(path=str(path)))) as nursery:
        worker = nursery.fork()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="if __name__ == '__main__':"):
                worker.call(Address("__main__", "f", 0))


def test_one_that_is_gone(tmp_path: Path) -> None:
    from asyncguard.offloading._address import Address

    with Nursery(surroundings(MainModule(name="no_such_package.module"))) as nursery:
        with pytest.raises(ImportError, match="no_such_package"):
            nursery.fork().call(Address("__main__", "f", 0))
    with Nursery(surroundings(MainModule(name="no_such_module"))) as nursery:
        with pytest.raises(ImportError, match="there is no module no_such_module as the server ran it"):
            nursery.fork().call(Address("__main__", "f", 0))


def test_it_can_be_preloaded(tmp_path: Path) -> None:
    from asyncguard.offloading._address import Address

    path = tmp_path / "script.py"
    path.write_text(BODY)
    with Nursery(surroundings(MainModule(path=str(path)))) as nursery:
        nursery.send(("preload", ["__main__"]))
        for _ in range(2):
            assert nursery.fork().call(Address("__main__", "count", 0)) == (1, "__mp_main__", 1)
