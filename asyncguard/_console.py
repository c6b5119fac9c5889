"""What a person at a terminal sees: each stall as it happens, and the closing table."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from asyncguard.events import (
    Advice,
    BlockedLine,
    BlockReport,
    BusyReport,
    HangReport,
    InFlight,
    SourceLine,
    Victim,
)

__all__ = ["busy", "closing", "hang", "stall"]

_WIDTH = 100
_MARGIN = " " * 10


def stall(report: BlockReport) -> str:
    """One stall, as a paragraph; one of the start-up, which blocked nobody, as a line."""
    if report.starting:
        place = report.line or "no line of yours"
        return f"start-up {report.duration * 1000:.0f} ms in one piece, which blocked nobody: {place}\n"
    lines = [f"BLOCKED  {report.headline}", *_line("line" if report.exact else "endpoint", report.line)]
    if report.call:
        lines.append(_field("call", report.call))
    lines.append(_field("waited", _suffering(report)))
    lines += _cure(report.advice)
    return "\n".join(lines) + "\n"


def busy(report: BusyReport) -> str:
    """A request that held the loop in small pieces, as a paragraph."""
    lines = [f"BUSY     {report.headline}", *_line("awaits", report.line), *_cure(report.advice)]
    return "\n".join(lines) + "\n"


def hang(report: HangReport) -> str:
    """A stall that goes on, with the stacks of all threads."""
    return f"HANGING  {report}\n"


def _line(name: str, line: SourceLine | None) -> list[str]:
    if line is None:
        return []
    return [_field(name, _place(line)), *([_MARGIN + line.source] if line.source else [])]


def _cure(advice: Advice | None) -> list[str]:
    return [] if advice is None else [_field("cure", f"{advice.text} ({advice.docs})")]


def closing(lines: Sequence[BlockedLine], in_flight: Sequence[InFlight]) -> str:
    """What was found in all, when the service stops."""
    parts = [_blocked(lines) if lines else "asyncguard: nothing blocked the event loop."]
    if in_flight:
        parts.append("Still waiting when the service was stopped:")
        parts += [
            f"{request.age:8.1f} s  {request.request}\n{_MARGIN}  {request.line or 'not in your code'}"
            for request in in_flight
        ]
    return "\n".join(parts) + "\n"


def _blocked(lines: Sequence[BlockedLine]) -> str:
    heading = ("total ms", "worst ms", "stalls", "waited", "call", "request", "line")
    rows = [
        (
            f"{entry.total * 1000:.0f}",
            f"{entry.worst * 1000:.0f}",
            str(entry.count),
            str(entry.victims),
            entry.call or "-",
            ", ".join(entry.requests) or "-",
            _place(entry.line) if entry.line else "no single line",
        )
        for entry in lines
    ]
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    table = [
        "  ".join(
            cell.rjust(width) if column < 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heading, tuple("-" * width for width in widths), *rows)
    ]
    stalls = sum(entry.count for entry in lines)
    title = f"asyncguard: {_number(len(lines), 'line')} blocked the event loop, in {_number(stalls, 'stall')}"
    return "\n".join([title, "", *table, ""])


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _place(line: SourceLine) -> str:
    return f"{line.file}:{line.line} in {line.function}"


def _field(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        width=_WIDTH,
        initial_indent=f"{name:>8}  ",
        subsequent_indent=_MARGIN,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _suffering(report: BlockReport) -> str:
    if not report.victims:
        return "nobody"
    return f"{report.suffering}: {_counted(report.victims)}"


def _counted(victims: Iterable[Victim]) -> str:
    counts = Counter(victim.request for victim in victims)
    return ", ".join(f"{label} x{n}" if n > 1 else label for label, n in counts.most_common(5))
