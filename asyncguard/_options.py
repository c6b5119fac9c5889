"""Checks of what users pass as options: refused early, with the option, the value and what is allowed."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from asyncguard._asgi import is_asgi_app

__all__ = [
    "checked_answer",
    "checked_choice",
    "checked_directory",
    "checked_error_status",
    "checked_flag",
    "checked_hook",
    "checked_seconds",
]


def checked_seconds(option: str, value: object, *, minimum: float = 0.0) -> float:
    """A duration in seconds, finite and greater than `minimum` (equal to it will do when above 0).

    Raises:
        TypeError: If `value` is no number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}")
    at_least = f"at least {minimum:g}" if minimum else "greater than 0"
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds < minimum or seconds <= 0:
        raise ValueError(f"{option} must be a finite number of seconds {at_least}, not {value!r}")
    return seconds


def checked_flag(option: str, value: object) -> bool:
    """A plain `True` or `False`.

    Raises:
        TypeError: If `value` is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{option} must be True or False, not {value!r}")
    return value


def checked_choice(option: str, value: object, choices: Sequence[str], *, other: str = "") -> object:
    """One of a few words; `other` says what else would have done, had it been that.

    Raises:
        ValueError: If `value` is none of them.
    """
    if value not in choices:
        allowed = " or ".join([*map(repr, choices), *([other] if other else [])])
        raise ValueError(f"{option} must be {allowed}, not {value!r}")
    return value


def checked_hook(option: str, value: Callable[..., Any] | None) -> None:
    """A plain function to be called with one event, or `None`.

    Raises:
        TypeError: If `value` cannot be called, or is a coroutine function: hooks run outside any loop.
    """
    if value is None:
        return
    if not callable(value):
        raise TypeError(f"{option} must be a function that takes one event, or None, not {value!r}")
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(
        getattr(value, "__call__", None)  # noqa: B004 - the method itself is wanted
    ):
        raise TypeError(
            f"{option} must be a plain function, not the coroutine function {value!r}: "
            "it is called on a thread of its own, outside any event loop"
        )


def checked_error_status(option: str, value: object) -> int:
    """The HTTP status code of an error.

    Raises:
        TypeError: If `value` is no integer.
        ValueError: If no error has that status.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an HTTP status code, not {value!r}")
    if value < 400 or value not in set(HTTPStatus):
        raise ValueError(f"{option} must be the HTTP status code of an error, such as 504, not {value!r}")
    return int(value)


def checked_answer(option: str, value: ASGIApp | None) -> ASGIApp | None:
    """An ASGI application that answers requests, or `None`.

    Raises:
        TypeError: If `value` is no ASGI application.
    """
    if value is not None and not is_asgi_app(value):
        raise TypeError(
            f"{option} must be an ASGI application, such as a Starlette Response, or None, not {value!r}"
        )
    return value


def checked_directory(option: str, value: str | os.PathLike[str] | None) -> str | None:
    """An existing directory as an absolute path, or `None`.

    Raises:
        TypeError: If `value` is no path.
        ValueError: If there is no such directory.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{option} must be the path of a directory, or None, not {value!r}")
    try:
        path = Path(value).resolve()
        exists = path.is_dir()
    except (OSError, ValueError):
        exists = False
    if not exists:
        raise ValueError(f"{option} must be an existing directory, not {os.fspath(value)!r}")
    return str(path)
