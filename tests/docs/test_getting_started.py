"""What the getting-started page tells to type is typed, and what it shows is what comes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.raw_client import get
from tests.servers import HOST, ROOT, Server, free_port, start

pytestmark = pytest.mark.e2e

PAGE = (ROOT / "docs" / "getting-started.md").read_text()


def shown(title: str) -> str:
    """The text block of that title."""
    match = re.search(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
    assert match, title
    return match[1]


def without_times(text: str) -> str:
    return re.sub(r"\d+ ms", "N ms", text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("main.py", "guarded.py", "reported.py"):
        (tmp_path / name).write_text(shown(name))
    return tmp_path


def test_run(folder: Path) -> None:
    assert "$ asyncguard run main:app\n" in PAGE
    with serving("asyncguard", "run", "main:app", cwd=folder) as server:
        assert get(server.port, "/receipt/1").body == b'{"number":1}'
        assert get(server.port, "/invoice/1").body == b'{"number":1}'
        server.await_stderr("(cures/#sleep)")
        assert without_times(shown("what asyncguard prints")) in without_times(server.stderr)
        assert "receipt" not in server.stderr


def test_install(folder: Path) -> None:
    assert "$ uvicorn guarded:app\n" in PAGE
    with serving("uvicorn", "guarded:app", cwd=folder) as server:
        get(server.port, "/invoice/1")
        server.await_stderr("(cures/#sleep)")
        assert without_times(shown("what the log shows")) in without_times(server.stderr)


def test_hook(folder: Path) -> None:
    with serving("uvicorn", "reported:app", cwd=folder) as server:
        get(server.port, "/invoice/1")
        assert server.terminate() is not None  # what the hook prints is out by then
        assert re.search(r"^GET /invoice/\{number\} main\.py:11 in invoice: .* 0\.\d 0$", server.stdout, re.M)
        assert "blocked the loop" not in server.stderr


@contextmanager
def serving(*command: str, cwd: Path) -> Iterator[Server]:
    port = free_port()
    line = [sys.executable, "-m", *command, "--host", HOST, "--port", str(port)]
    with start(line, port, cwd=cwd) as server:
        server.await_port()
        yield server
