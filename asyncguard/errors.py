"""Every exception that asyncguard raises of its own.

    AsyncguardError
    └── AppNotLoaded    an import string that leads to no ASGI application

A bad option is no member of this tree: it raises `ValueError` or `TypeError` when the application is
built, as it does everywhere else in Python.
"""

from __future__ import annotations

__all__ = ["AppNotLoaded", "AsyncguardError"]


class AsyncguardError(Exception):
    """The root of all errors that asyncguard raises of its own."""


class AppNotLoaded(AsyncguardError):
    """Raised when an import string such as ``main:app`` does not lead to an ASGI application."""
