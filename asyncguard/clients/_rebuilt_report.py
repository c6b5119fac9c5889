"""From a line that builds clients again and again to the report of it, where reading files stalls nobody."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from asyncguard._frames import RawFrame
from asyncguard._request import RequestRecord
from asyncguard._source import call_text, endpoint_line, frame_line, is_own_code, is_user_code
from asyncguard.clients._kinds import Kind
from asyncguard.events import ClientReport, SourceLine

__all__ = ["Rebuilding", "compose"]

_numbers = itertools.count(1)


class Rebuilding(NamedTuple):
    """All that is known of a line that builds clients again and again.

    Attributes:
        record: The request that builds another one there.
        kind: Of which kind that is.
        times: How many have been thrown away that were built there.
        seconds: How long it took to build one, on average.
        noticed: When that was found, in seconds since the epoch.
        frames: The stack, from what called the constructor outwards.
        outside: Which of these frames is the user's line; `None` if none of them is the user's.
    """

    record: RequestRecord
    kind: Kind
    times: int
    seconds: float
    noticed: float
    frames: tuple[RawFrame, ...]
    outside: int | None


def compose(rebuilding: Rebuilding, project_root: str | None) -> ClientReport:
    """Make the report."""
    frames, outside = rebuilding.frames, rebuilding.outside
    user = frames[outside] if outside is not None else None
    line = endpoint_line(rebuilding.record.endpoint) if user is None else frame_line(user)
    return ClientReport(
        id=next(_numbers),
        noticed=rebuilding.noticed,
        request=rebuilding.record.label,
        client=str(rebuilding.kind),
        line=line,
        exact=user is not None,
        call="" if user is None else call_text(user),
        stack=_stack(frames, project_root),
        times=rebuilding.times,
        seconds=rebuilding.seconds,
        advice=rebuilding.kind.advice,
    )


def _stack(frames: tuple[RawFrame, ...], project_root: str | None) -> tuple[SourceLine, ...]:
    """From the user's outermost line inwards; all that built it, if no line of the user's led there."""
    outermost_first = frames[::-1]
    of_user = itertools.dropwhile(
        lambda frame: not is_user_code(frame.code.co_filename, project_root), outermost_first
    )
    shown = tuple(of_user) or outermost_first
    return tuple(
        frame_line(frame)
        for frame in shown
        if is_user_code(frame.code.co_filename, project_root) or not is_own_code(frame.code.co_filename)
    )
