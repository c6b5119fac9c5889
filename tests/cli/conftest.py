"""Fixtures and hooks of the tests of the command line."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.servers import attach_output

MAIN = """\
import asyncio
import os
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


async def hello(request: Request) -> Response:
    return PlainTextResponse(f"{type(asyncio.get_running_loop()).__module__} {os.getpid()}")


async def slow(request: Request) -> Response:
    time.sleep(0.25)  # blocks
    return PlainTextResponse("done")


async def endless(request: Request) -> Response:
    Path("arrived").touch()
    await asyncio.Event().wait()  # awaits
    return PlainTextResponse("never")


app = Starlette(
    routes=[Route("/hello", hello), Route("/slow/{name}", slow), Route("/endless/{name}", endless)]
)


def create() -> Starlette:
    return app


async def _private(scope, receive, send) -> None:
    pass


class Made:
    def __init__(self) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        await self.app(scope, receive, send)


def takes_arguments(settings) -> Starlette:
    return app


def garbage() -> int:
    return 42


def failing() -> Starlette:
    raise LookupError("no settings")


things = [app]
nested = Made()
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    attach_output(report)
    return report


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with modules to serve, good ones and bad ones."""
    package = tmp_path / "shop" / "web"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    for file in (tmp_path / "main.py", package / "main.py"):
        file.write_text(MAIN)
    (tmp_path / "broken.py").write_text('def read():\n    raise LookupError("no file")\n\n\nread()\n')
    (tmp_path / "wants.py").write_text("import no_such_library\n")
    (tmp_path / "unfinished.py").write_text("app = (\n")
    return tmp_path
