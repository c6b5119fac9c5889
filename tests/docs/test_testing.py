"""The tests on the testing page pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.servers import ROOT

BLOCK = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def test_they_pass(tmp_path: Path) -> None:
    files = dict(BLOCK.findall((ROOT / "docs" / "testing.md").read_text()))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tests = sum(text.count("def test_") for text in files.values())
    assert tests == 5
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tests} passed" in done.stdout, done.stdout
