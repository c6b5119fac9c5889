"""A stall that does not end: what every thread is doing, told while it lasts, and the last resort."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from typing import NamedTuple

from asyncguard._frames import RawFrame, raw_frames
from asyncguard._request import RequestRecord
from asyncguard._source import frame_line
from asyncguard.blocking._lookups import living_threads
from asyncguard.events import HangReport, SourceLine, ThreadStack

__all__ = ["Hang", "abort", "is_debugged", "look_at_threads", "report_hang"]

_DEBUGGERS = {"pdb", "bdb", "ipdb", "pudb", "debugpy"}
_DEBUGGER_PREFIXES = ("pydevd", "_pydevd")  # each of its parts is a module of its own
_FLUSH_TIMEOUT = 2.0


class RawThread(NamedTuple):
    """A thread's name and its frames, innermost first."""

    name: str
    frames: tuple[RawFrame, ...]


class Hang(NamedTuple):
    """All that was seen of a stall that goes on.

    Attributes:
        seconds: How long it has lasted.
        record: The request whose code holds the loop.
        threads: What every thread is doing, the loop's first.
    """

    seconds: float
    record: RequestRecord | None
    threads: tuple[RawThread, ...]


def look_at_threads(loop_thread: int) -> tuple[RawThread, ...]:
    """Read the stacks of all threads but asyncguard's own, that of the thread `loop_thread` first."""
    names = {ident: thread.name for ident, thread in living_threads().items()}
    frames = sys._current_frames()
    return tuple(
        RawThread(names.get(ident, str(ident)), raw_frames(frames[ident]))
        for ident in sorted(frames, key=lambda ident: ident != loop_thread)
        if not names.get(ident, "").startswith("asyncguard-")
    )


def report_hang(hang: Hang) -> HangReport:
    """Make the report."""
    return HangReport(
        seconds=hang.seconds,
        request=hang.record.label if hang.record is not None else None,
        threads=tuple(ThreadStack(thread.name, _lines(thread.frames)) for thread in hang.threads),
    )


def _lines(frames: tuple[RawFrame, ...]) -> tuple[SourceLine, ...]:
    return tuple(
        frame_line(frame)
        for frame in reversed(frames)
        # How each thread begins says nothing about it.
        if frame.code.co_filename != threading.__file__ or not frame.code.co_name.startswith("_bootstrap")
    )


def is_debugged(hang: Hang) -> bool:
    """Whether the loop stands in a debugger: then somebody looks at it, and it must not be ended."""
    loop = hang.threads[0] if hang.threads else RawThread("", ())
    modules = (str(frame.namespace.get("__name__", "")).partition(".")[0] for frame in loop.frames)
    return any(module in _DEBUGGERS or module.startswith(_DEBUGGER_PREFIXES) for module in modules)


def abort(reported: threading.Event) -> None:
    """End this process at once, by SIGABRT, so that its supervisor starts another.

    Args:
        reported: What is set once the report is out. It is waited for 2 s at most: who hangs may hold a
            lock that logging needs. Then the stacks go straight to standard error.
    """
    if not reported.wait(_FLUSH_TIMEOUT) and sys.__stderr__ is not None:
        with contextlib.suppress(Exception):  # closed, perhaps
            faulthandler.dump_traceback(sys.__stderr__)
    os.abort()
