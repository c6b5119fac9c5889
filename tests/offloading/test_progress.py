"""How far a function has come is told to whoever listens."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from asyncguard.offloading._progress import report_progress, report_to


@pytest.fixture
def reported() -> Iterator[list[float]]:
    reported: list[float] = []
    report_to(reported.append)
    yield reported
    report_to(None)


@pytest.mark.parametrize("fraction", [0, 0.5, 1, Fraction(1, 4), np.float32(0.5)])
def test_numbers(reported: list[float], fraction: Any) -> None:
    report_progress(fraction)
    assert reported == [float(fraction)]
    assert type(reported[0]) is float


@pytest.mark.parametrize("fraction", ["0.5", None, []])
def test_no_numbers(reported: list[float], fraction: Any) -> None:
    with pytest.raises(TypeError, match="fraction must be a number from 0 to 1, not "):
        report_progress(fraction)
    assert reported == []


def test_nobody_listens() -> None:
    report_progress(0.5)
