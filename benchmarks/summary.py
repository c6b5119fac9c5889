"""From samples to tables: quartiles, ratios within a round, budgets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Budget", "Spread", "differences", "ratios", "table"]


@dataclass(frozen=True)
class Spread:
    """The middle of some samples.

    Attributes:
        median: Half of them are below it.
        low: A quarter of them are below it.
        high: A quarter of them are above it.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Budget:
    """What something may cost, and what it did cost."""

    what: str
    limit: float
    value: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        return f"{verdict:6}  {self.what}: {self.value:.3g}{self.unit}, budget {self.limit:g}{self.unit}"


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Each sample over the baseline's of the same round: what disturbs a round disturbs both."""
    return [sample / base for sample, base in zip(samples, baseline, strict=True)]


def differences(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Each sample less the baseline's of the same round."""
    return [sample - base for sample, base in zip(samples, baseline, strict=True)]


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; all but the first column are set flush right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join([title, "", *lines, ""])
