"""What tests of offloading share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import TurnedClock
from tests.offloading.stage import Stage

OPEN = "/proc/self/fd"


@pytest.fixture
def staged(clock: TurnedClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    """Makes stages; nothing of them is left afterwards."""
    before = len(os.listdir(OPEN))
    made: list[Stage] = []

    def make(**limits: Any) -> Stage:
        made.append(Stage(clock, monkeypatch, **limits))
        return made[-1]

    yield make
    for stage in made:
        stage.close()
        assert (stage.loop.watched, stage.counts()) == (0, (0, 0, 0, 0))
        stage.loop.turn(60)
        assert (stage.loop.timers, stage.strays) == ([], [])
    assert len(os.listdir(OPEN)) <= before
