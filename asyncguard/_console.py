"""What a person at a terminal sees: each stall as it happens, and the closing table."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from asyncguard.events import BlockedLine, BlockReport, InFlight, SourceLine, Victim

__all__ = ["closing", "stall"]

_WIDTH = 100
_MARGIN = " " * 10


def stall(report: BlockReport) -> str:
    """One stall, as a paragraph; one of the start-up, which blocked nobody, as a line."""
    if report.starting:
        place = report.line or "no line of yours"
        return f"start-up {report.duration * 1000:.0f} ms in one piece, which blocked nobody: {place}\n"
    lines = [f"BLOCKED  {report.headline}"]
    if report.line is not None:
        where = "line" if report.exact else "endpoint"
        lines.append(_field(where, _place(report.line)))
        if report.line.source:
            lines.append(_MARGIN + report.line.source)
    if report.call:
        lines.append(_field("call", report.call))
    lines.append(_field("waited", _suffering(report)))
    if report.advice is not None:
        lines.append(_field("cure", f"{report.advice.text} ({report.advice.docs})"))
    return "\n".join(lines) + "\n"


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
