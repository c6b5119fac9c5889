"""From what was seen at a deadline to the report of it, on a thread where reading files stalls nobody."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable
from types import CodeType, FrameType
from typing import Any, Literal, NamedTuple

from starlette.responses import Response

from asyncguard._frames import suspended_frames
from asyncguard._request import RequestRecord
from asyncguard._source import endpoint_line, is_user_code, source_line
from asyncguard.events import TimeoutClock, TimeoutReport
from asyncguard.timeouts._lookups import is_in_thread, worker_frame

__all__ = ["Outcome", "Sight", "Timeout", "compose", "look_at"]

Outcome = Literal["stopped", "thread", "shielded", "running"]

_numbers = itertools.count(1)


class Sight(NamedTuple):
    """What a request was awaiting.

    Attributes:
        places: The code and line of each frame, outermost first; those of its worker thread included.
        in_thread: Whether it awaited a worker thread.
    """

    places: tuple[tuple[CodeType, int], ...]
    in_thread: bool


class Timeout(NamedTuple):
    """All that is known of a request whose time was up.

    Attributes:
        record: The request.
        path: Its path.
        clock: Which clock ran out.
        limit: What that was set to, in seconds.
        noticed: When it ran out, in seconds since the epoch.
        elapsed: Seconds since the request began.
        loop_time: For how long it had held the loop; `None` if unknown.
        sight: What it was awaiting.
        outcome: What became of it.
    """

    record: RequestRecord
    path: str
    clock: TimeoutClock
    limit: float
    noticed: float
    elapsed: float
    loop_time: float | None
    sight: Sight
    outcome: Outcome


def look_at(*coroutines: Awaitable[None] | None) -> Sight:
    """See what suspended coroutines await, and what their worker thread does.

    Args:
        *coroutines: The outermost one, and those that others drive by hand, so that nothing leads to them.
    """
    frames: list[FrameType] = []
    for coroutine in coroutines:
        frames += [frame for frame in suspended_frames(coroutine) if frame not in frames]
    for frame in tuple(frames):
        # A response that also listens for its client's leaving has its content made in a task of its own.
        content = _content(frame.f_locals.get("self"))
        frames += [inner for inner in suspended_frames(content) if inner not in frames]
    waiting = next((frame for frame in reversed(frames) if is_in_thread(frame)), None)
    places = [(frame.f_code, frame.f_lineno) for frame in frames]
    running = worker_frame(waiting) if waiting is not None else None
    thread: list[tuple[CodeType, int]] = []
    while running is not None:
        thread.append((running.f_code, running.f_lineno))
        running = running.f_back
    return Sight((*places, *reversed(thread)), waiting is not None)


def _content(response: object) -> Any:
    # Read past the object, and only where it is known: another would answer by code of the user's.
    known = issubclass(type(response), Response)
    return object.__getattribute__(response, "__dict__").get("body_iterator") if known else None


def compose(timeout: Timeout, project_root: str | None) -> TimeoutReport:
    """Make the report."""
    stack = tuple(
        source_line(code, line)
        for code, line in timeout.sight.places
        if is_user_code(code.co_filename, project_root)
    )
    return TimeoutReport(
        id=next(_numbers),
        noticed=timeout.noticed,
        request=timeout.record.label,
        path=timeout.path,
        clock=timeout.clock,
        limit=timeout.limit,
        elapsed=timeout.elapsed,
        line=stack[-1] if stack else endpoint_line(timeout.record.endpoint),
        stack=stack,
        loop_time=timeout.loop_time,
        outcome=timeout.outcome,
    )
