"""Which line builds something: found on the stack, without a look into a file."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from asyncguard import _source
from asyncguard.clients._places import Key, find


class Thing:
    """Finds out where it is built."""

    def __init__(self, endpoint: object = None, project_root: str | None = None) -> None:
        frame: FrameType = sys._getframe(1)
        self.place = find(self, frame, endpoint, project_root)


class Own(Thing):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)


class Around:
    def __init__(self) -> None:
        self.thing = Thing()  # around


def by_a_library(build: Callable[[], Thing]) -> Thing:
    """A library calls it, and nobody of the user's calls that."""
    found: list[Thing] = []
    json.loads("{}", object_hook=lambda _: found.append(build()))
    return found[0]


def test_the_line_that_calls(marked: Callable[[str], int]) -> None:
    place = Thing().place  # directly
    assert place.key == Key(__file__, marked("directly"))
    assert place.frame is sys._getframe()


def test_the_line_that_calls_a_subclass(marked: Callable[[str], int]) -> None:
    assert Own().place.key.line == marked("subclass")  # subclass


def test_the_line_within_another_class(marked: Callable[[str], int]) -> None:
    assert Around().thing.place.key.line == marked("around")


def test_the_innermost_line_of_the_users(marked: Callable[[str], int]) -> None:
    built = by_a_library(lambda: Thing())  # innermost
    assert built.place.key.line == marked("innermost")


def test_what_a_library_builds_for_the_user(marked: Callable[[str], int]) -> None:
    built = functools.reduce(lambda thing, _: thing, [1], by_a_library(functools.partial(Thing)))
    assert built.place.key.file == __file__


async def endpoint() -> None: ...


@pytest.mark.parametrize(
    "wrapped", [endpoint, functools.wraps(endpoint)(lambda: None)], ids=["plain", "wrapped"]
)
def test_without_a_line_of_the_users_the_endpoint_stands_for_it(wrapped: object, tmp_path: Any) -> None:
    place = Thing(wrapped, str(tmp_path)).place
    assert place.key == Key(__file__, endpoint.__code__.co_firstlineno)
    assert place.frame is None


@pytest.mark.parametrize("unknown", [None, object(), PlainTextResponse, len, type("Endpoint", (), {})])
def test_without_either_the_library_that_calls_stands_for_it(unknown: object, tmp_path: Any) -> None:
    place = Thing(unknown, str(tmp_path)).place
    assert place.frame is None
    assert place.key.line > 0


def test_a_library_that_goes_through_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Our own frames are nobody's business."""
    monkeypatch.setattr(_source, "_OWN", __file__)
    frame: Any = sys._getframe()
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    assert Thing(None, str(tmp_path)).place.key == Key(frame.f_code.co_filename, frame.f_lineno)
