"""Where a client is built: the user's line, found on the thread that builds it, and cheaply.

Nothing is read from files here, and no frame is kept.
"""

from __future__ import annotations

import inspect
from types import CodeType, FrameType
from typing import NamedTuple

from asyncguard._source import is_own_code, is_user_code

__all__ = ["Key", "Place", "find"]


class Key(NamedTuple):
    """What tells one line from another."""

    file: str
    line: int


class Place(NamedTuple):
    """Where something is built.

    Attributes:
        key: The line that it is known by.
        frame: The user's frame that stands there; `None` if none of the user's led to it.
    """

    key: Key
    frame: FrameType | None


def find(thing: object, frame: FrameType, endpoint: object, project_root: str | None) -> Place:
    """Find the line that `thing` is built by.

    Args:
        thing: What is built.
        frame: The frame that called its constructor.
        endpoint: What answers the request: where no line of the user's led there, it is known by that.
        project_root: The directory whose files are the user's.
    """
    around: FrameType | None = frame
    while around is not None:
        code = around.f_code
        if is_user_code(code.co_filename, project_root) and not _is_constructor_of(thing, around):
            return Place(Key(code.co_filename, around.f_lineno), around)
        around = around.f_back
    answering = _code_of(endpoint)
    if answering is not None:
        return Place(Key(answering.co_filename, answering.co_firstlineno), None)
    # A library's middleware, say: before there is an endpoint.
    while frame.f_back is not None and is_own_code(frame.f_code.co_filename):
        frame = frame.f_back
    return Place(Key(frame.f_code.co_filename, frame.f_lineno), None)


def _is_constructor_of(thing: object, frame: FrameType) -> bool:
    """Whether `frame` is the constructor of the user's own subclass: others call that."""
    code = frame.f_code
    return (
        code.co_name == "__init__"
        and code.co_argcount > 0
        and frame.f_locals.get(code.co_varnames[0]) is thing
    )


def _code_of(endpoint: object) -> CodeType | None:
    try:
        code = inspect.unwrap(endpoint).__code__  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError):
        return None
    return code if isinstance(code, CodeType) else None
