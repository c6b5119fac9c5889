"""``asyncguard demo``: every pitfall of the shop is named, and no cure is accused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from asyncguard import _demo
from tests.servers import ROOT, Server, accepts, eventually, start

SHOP = "examples/shop/unhealthy.py"
CURES = {
    "sleep": "sleep",
    "http": "synchronous-http",
    "file": "files",
    "cpu": "computing",
    "json": "big-json",
    "client": "client-per-request",
    "gather": "unbounded-fan-out",
    "no-timeout": None,
}
"""The cure that each pitfall is to be reported with; `None` for the one that does not block."""


class Pitfall(NamedTuple):
    """A line of the shop that bears a marker, and the route that it is part of."""

    line: int
    route: str


def pitfalls() -> dict[str, Pitfall]:
    found = {}
    route = ""
    for number, line in enumerate((ROOT / SHOP).read_text().splitlines(), 1):
        if match := re.match(r'@router\.get\("(.*)"\)', line):
            route = match[1]
        if match := re.search(r"\S  # pitfall: ([\w-]+)$", line):
            assert match[1] not in found
            found[match[1]] = Pitfall(number, f"GET /unhealthy{route}")
    return found


def test_every_pitfall_is_known_here() -> None:
    assert pitfalls().keys() == CURES.keys()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_demo(loop: str) -> None:
    with start(["asyncguard", "demo", "--loop", loop], 0) as server:
        assert server.process.wait(240) == 0, server.stdout + server.stderr
        check(server)


def check(server: Server) -> None:
    shown = server.stderr
    blocking = pitfalls()
    endless = blocking.pop("no-timeout")
    stalls, _, closing = shown.partition("\nasyncguard: ")
    paragraphs = re.findall(r"^BLOCKED  .*?(?=^$|\Z)", stalls, re.MULTILINE | re.DOTALL)
    for name, pitfall in blocking.items():
        ours = [each for each in paragraphs if f"    line  {SHOP}:{pitfall.line} in " in each]
        assert ours, f"{name}: line {pitfall.line} is not named in\n{shown}"
        for paragraph in ours:
            assert paragraph.startswith(f"BLOCKED  {pitfall.route} blocked the loop for "), paragraph
            assert f"# pitfall: {name}\n" in paragraph
        # Which callbacks are seen in a stall of many is a matter of chance.
        assert any(f"(cures/#{CURES[name]})" in each for each in ours), ours

    # No other request is accused.
    culprits = re.findall(r"^BLOCKED  (.*) blocked the loop for", stalls, re.MULTILINE)
    assert len(culprits) == len(paragraphs)
    assert {each for each in culprits if "GET" in each} == {pitfall.route for pitfall in blocking.values()}

    table, _, waiting = closing.partition("Still waiting when the service was stopped:\n")
    assert "GET /healthy" not in table
    for name, pitfall in blocking.items():
        (row,) = re.findall(rf"^.*  {SHOP}:{pitfall.line} in .*$", table, re.MULTILINE)
        assert f"  {pitfall.route}  " in row, name
    assert re.fullmatch(
        rf" +\d+\.\d s  {endless.route}\n +{SHOP}:{endless.line} in .*  # pitfall: no-timeout\n", waiting
    ), waiting
    assert "Traceback" not in shown + server.stdout

    # The load's own lines: one a route, each answered as planned.
    assert len(re.findall(r"^  (200|504) +\d+ ms  GET /healthy/", server.stdout, re.MULTILINE)) == 8
    # The shop's port is in the first line; nothing listens there, and nothing that was started is left.
    first, _ = server.stdout.split("\n", 1)
    assert not accepts(int(first.rpartition(":")[2]))
    eventually(lambda: not server.remnants(), "all processes of the demonstration have ended")


def test_demo_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        return None if name in ("fastapi", "requests") else object()

    monkeypatch.setattr(_demo, "find_spec", find_spec)
    with pytest.raises(RuntimeError, match=r"needs fastapi, requests: pip install 'asyncguard\[demo\]'"):
        _demo.run_demo(threshold=0.05, loop="asyncio")


def test_demo_without_the_shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_demo, "__file__", os.fspath(tmp_path / "asyncguard" / "_demo.py"))
    with pytest.raises(RuntimeError, match="the demonstration's shop is missing"):
        _demo.run_demo(threshold=0.05, loop="asyncio")
