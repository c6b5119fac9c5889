"""Calling a user's hook without letting it break anything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Hook"]

Event = TypeVar("Event")


class Hook(Generic[Event]):
    """A user's function, called so that its exceptions reach the log once and nobody else.

    A hook that fails is called again for the next event: it may have failed for want of something
    that comes back. Only its first failure is logged, since a broken hook fails at every event.
    """

    __slots__ = ("_failed", "_function", "_logger", "_option")

    def __init__(self, option: str, function: Callable[[Event], object], logger: logging.Logger) -> None:
        self._option = option
        self._function = function
        self._logger = logger
        self._failed = False

    def __call__(self, event: Event) -> None:
        try:
            self._function(event)
        except BaseException:  # even one that would end its thread, as pytest.fail's
            if not self._failed:
                self._failed = True
                self._logger.exception(
                    "the %s hook %r raised; it is called again for the next event, "
                    "but further failures are not logged",
                    self._option,
                    self._function,
                )
