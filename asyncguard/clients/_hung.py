"""Where the code of a resource hangs that does not start, or does not close."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from asyncguard._frames import await_chain
from asyncguard._source import is_user_code, source_line

__all__ = ["awaiting"]


def awaiting(coroutine: Coroutine[Any, Any, Any] | None) -> str:
    """What to add to a sentence: the user's innermost line that is being awaited; empty if there is none."""
    lines = [(code, line) for code, line in await_chain(coroutine) if is_user_code(code.co_filename, None)]
    return f"; it was awaiting {source_line(*lines[-1])}" if lines else ""
