"""Frames and suspended coroutines, read without keeping anything of theirs alive.

How they are built depends on CPython: each look-up has a test of its own that fails loudly.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Awaitable, Iterator
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any, NamedTuple

__all__ = ["RawFrame", "await_chain", "position", "raw_frames", "suspended_frames"]


class RawFrame(NamedTuple):
    """A frame without its locals, so that keeping it keeps no object of the request alive."""

    code: CodeType
    instruction: int
    namespace: dict[str, Any]


def raw_frames(frame: FrameType | None) -> tuple[RawFrame, ...]:
    """A thread's whole stack, from its innermost frame `frame`."""
    frames: list[RawFrame] = []
    while frame is not None:
        frames.append(RawFrame(frame.f_code, frame.f_lasti, frame.f_globals))
        frame = frame.f_back
    return tuple(frames)


class Position(NamedTuple):
    """Where an instruction is in the source; lines from 1, columns in bytes from 0."""

    line: int | None
    end_line: int | None
    column: int | None
    end_column: int | None


def position(code: CodeType, instruction: int) -> Position:
    """The place of an instruction; all `None` if it has none, columns `None` if they were left out."""
    # Two bytes an instruction: https://docs.python.org/3/reference/datamodel.html#codeobject.co_positions
    places = itertools.islice(code.co_positions(), max(0, instruction // 2), None)
    return Position(*next(places, (None, None, None, None)))


def suspended_frames(awaitable: Awaitable[Any] | None) -> Iterator[FrameType]:
    """The frames that are suspended, from `awaitable` inwards to what it waits for.

    Coroutines, generator-based coroutines and asynchronous generators are followed; a future, or
    anything else that is not Python code, ends the chain.
    """
    current: Any = awaitable
    while current is not None:
        while type(current).__name__ in _STEPS_OF_GENERATORS:
            # It does not tell whose step it is, but the garbage collector knows what it refers to.
            current = next((thing for thing in gc.get_referents(current) if _is_suspendable(thing)), None)
        # Anything else may be of the user's making, and answer to every name.
        kind = _SUSPENDABLE.get(type(current))
        frame = getattr(current, kind[0]) if kind is not None else None
        if kind is None or frame is None:
            return
        yield frame
        current = getattr(current, kind[1])


def await_chain(awaitable: Awaitable[Any] | None) -> Iterator[tuple[CodeType, int]]:
    """The code and line of each suspended frame, from `awaitable` inwards to what it waits for."""
    for frame in suspended_frames(awaitable):
        yield frame.f_code, frame.f_lineno


_STEPS_OF_GENERATORS = {
    "anext_awaitable",
    "async_generator_asend",
    "async_generator_athrow",
    "coroutine_wrapper",  # what a coroutine's own `__await__` returns
}


_SUSPENDABLE = {
    CoroutineType: ("cr_frame", "cr_await"),
    GeneratorType: ("gi_frame", "gi_yieldfrom"),
    AsyncGeneratorType: ("ag_frame", "ag_await"),
}
"""What can be suspended: where its frame is found, and what it waits for."""


def _is_suspendable(thing: object) -> bool:
    return type(thing) in (CoroutineType, AsyncGeneratorType) or type(thing).__name__ in _STEPS_OF_GENERATORS
