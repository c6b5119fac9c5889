"""Applications and functions in one module: workers import it, and serve nothing."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.offload_servers import Family, Offloading, assert_free, offloading, run_marked, server_of
from tests.raw_client import get
from tests.servers import ROOT, free_port

pytestmark = pytest.mark.e2e

WITHIN = 60.0

MAIN = """\
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

import asyncguard
from asyncguard import offload

FOLDER = Path(os.environ["ASYNCGUARD_TEST_FOLDER"])


def note(name):
    with (FOLDER / name).open("a") as file:
        print(os.getpid(), file=file)


@asynccontextmanager
async def lifespan(app):
    note("lifespans")
    yield


app = FastAPI(lifespan=lifespan)
asyncguard.install(app, offload_workers={workers})
note("imports")


class Point:
    def __init__(self, x):
        self.x = x


@offload
def double(point):
    assert type(point) is Point
    point.x *= 2
    return point, os.getpid(), __name__


@app.get("/double/{{x}}")
async def get_double(x: int):
    point, worker, name = await double(Point(x))
    assert type(point) is Point
    return {{"x": point.x, "server": os.getpid(), "worker": worker, "module": name}}


{start}
"""
STARTS = {
    "app": 'if __name__ == "__main__":\n    uvicorn.run(app, port=int(sys.argv[1]))',
    "name": 'if __name__ == "__main__":\n    uvicorn.run("main:app", port=int(sys.argv[1]))',
    "workers": 'if __name__ == "__main__":\n    uvicorn.run("main:app", port=int(sys.argv[1]), workers=2)',
    "hypercorn": """\
if __name__ == "__main__":
    import hypercorn.config
    import hypercorn.trio
    import trio

    config = hypercorn.config.Config.from_mapping(bind=[f"127.0.0.1:{sys.argv[1]}"])
    trio.run(hypercorn.trio.serve, app, config)""",
}


def assert_serves(found: Offloading, servers: int, module: str) -> None:
    found.server.await_port()
    answers = [get(found.port, f"/double/{x}").json() for x in range(4)]
    assert [answer["x"] for answer in answers] == [0, 2, 4, 6]
    assert {answer["module"] for answer in answers} == {module}
    for answer in answers:
        assert server_of(answer["worker"]) == answer["server"]
    # One for each server process, none for a worker.
    lifespans = found.noted("lifespans")
    assert len(lifespans) == len({*lifespans}) <= servers
    assert {answer["server"] for answer in answers} <= {*lifespans}
    imports = {*found.noted("imports")}
    assert found.server.pid in imports
    assert imports - {found.server.pid, *lifespans}, "workers have imported it as well"


@pytest.mark.parametrize("workers", [2, None], ids=["warm", "lazy"])
@pytest.mark.parametrize("how", STARTS)
def test_run_as_a_script(how: str, workers: int | None, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(MAIN.format(workers=workers, start=STARTS[how]))
    port = free_port()
    module = "main" if how in ("name", "workers") else "__mp_main__"
    command = [sys.executable, str(script), str(port)]
    with run_marked(command, port, Family(), tmp_path, cwd=tmp_path) as found:
        assert_serves(found, 2 if how == "workers" else 1, module)
        found.server.process.terminate()
        assert found.server.process.wait(WITHIN) in (0, -signal.SIGTERM)
        found.family.await_end(timeout=WITHIN)
        assert_free(port)
        found.assert_quiet()


def test_run_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN.format(workers=2, start=STARTS["app"]))
    port = free_port()
    with run_marked(["main", str(port)], port, Family(), tmp_path, cwd=tmp_path) as found:
        assert_serves(found, 1, "__mp_main__")


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn", "hypercorn-trio", "granian"])
def test_run_by_a_server(kind: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN.format(workers=2, start=STARTS["app"]))
    env = {"PYTHONPATH": str(ROOT)}
    with offloading(kind, tmp_path, app="main:app", cwd=tmp_path, env=env) as found:
        found.server.await_port()
        answers = [get(found.port, f"/double/{x}").json() for x in range(4)]
        assert [answer["x"] for answer in answers] == [0, 2, 4, 6]
        assert {answer["module"] for answer in answers} == {"main"}
        assert {server_of(answer["worker"]) for answer in answers} == {*found.noted("lifespans")}
        assert len(found.noted("lifespans")) == 1


def test_a_script_that_serves_when_it_is_imported(tmp_path: Path) -> None:
    """A worker would do so too: it is told what is wrong, and starts no workers of its own."""
    (tmp_path / "main.py").write_text(MAIN.format(workers=2, start="uvicorn.run(app, port=int(sys.argv[1]))"))
    port = free_port()
    with run_marked([sys.executable, "main.py", str(port)], port, Family(), tmp_path, cwd=tmp_path) as found:
        found.server.await_port()
        for _ in range(2):
            assert get(port, "/double/1").status == 500
        found.server.await_stderr("put that under `if __name__ == '__main__':`")
        assert found.noted("lifespans") == [found.server.pid]
