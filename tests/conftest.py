"""What tests of several modules share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asyncguard import _clock


class TurnedClock:
    """Asyncguard's monotonic clock, which stands still until a test turns it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    clock = TurnedClock()
    monkeypatch.setattr(_clock, "monotonic", clock)
    return clock


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture
def marked(request: pytest.FixtureRequest) -> Callable[[str], int]:
    """The number of the one line of the test's module that ends in the comment ``# <name>``."""

    def find(name: str) -> int:
        lines = request.path.read_text().splitlines()
        (number,) = (n for n, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {name}"))
        return number

    return find
