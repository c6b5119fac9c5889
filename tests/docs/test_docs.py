"""The examples in the documentation run, and its links to cures lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from asyncguard.blocking import _advice

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r'^```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str | None, str]]:
    return [(match["title"], match["code"]) for match in BLOCK.finditer(page.read_text())]


def examples() -> list[object]:
    return [
        pytest.param(page, code, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (_, code) in enumerate(blocks(page), 1)
    ]


@pytest.mark.parametrize(("page", "code"), examples())
def test_example_runs(page: Path, code: str, tmp_path: Path) -> None:
    """Each block is a whole program; blocks with a title may import those before them."""
    for title, text in blocks(page):
        if title is not None:
            (tmp_path / title).write_text(text)
    (tmp_path / "example.py").write_text(code)
    # Not `-W error`: the example's libraries are not asyncguard's to judge.
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_every_cure_has_a_heading() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "cures.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    causes = (_advice._COLLECTING, _advice._GIL, _advice._COMPUTING, _advice._WAITING)
    others = (*causes, _advice._BUSY, _advice._FAN_OUT)
    cures = {*_advice._CURES, *others}
    assert {cure.anchor for cure in cures} == anchors
