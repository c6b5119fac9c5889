"""Fixtures and hooks of the end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.recording import Recording
from tests.servers import HOST, Server, attach_output, serve


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    attach_output(report)
    return report


@pytest.fixture(scope="session")
def upstream() -> Iterator[Server]:
    with serve("uvicorn-asyncio", "tests.e2e.upstream:app", "--log-level", "warning") as server:
        yield server


@pytest.fixture(scope="session")
def upstream_env(upstream: Server) -> dict[str, str]:
    return {"ASYNCGUARD_TEST_UPSTREAM": f"http://{HOST}:{upstream.port}"}


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A file that gives nothing until the test lets it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path
