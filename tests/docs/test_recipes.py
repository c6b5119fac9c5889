"""The recipes that the pages show are the files that tests/e2e/test_recipes.py runs against real servers."""

from __future__ import annotations

import re

from tests.servers import ROOT

BLOCK = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def test_they_are_shown_as_they_are_run() -> None:
    pages = [page.read_text() for page in sorted((ROOT / "docs" / "recipes").glob("*.md"))]
    shown = {name: code for page in pages for name, code in BLOCK.findall(page)}
    files = (ROOT / "examples" / "shared_clients").glob("[!_]*.py")
    assert shown == {file.name: file.read_text() for file in files}


def test_nothing_else_is_shown() -> None:
    for page in (ROOT / "docs" / "recipes").glob("*.md"):
        text = page.read_text()
        assert text.count("```python") == len(BLOCK.findall(text)), page
