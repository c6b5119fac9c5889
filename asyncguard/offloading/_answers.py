"""What a worker's answers are to whoever awaits a call, wherever the worker is."""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import Any

from asyncguard.errors import NotOffloadable, OffloadError, PayloadError
from asyncguard.offloading._failure import unseal
from asyncguard.offloading._interrupt import Interrupted
from asyncguard.offloading._wire import Frame, Kind

__all__ = ["error_of", "log_here"]

_MISLEADING = (
    asyncio.CancelledError,
    GeneratorExit,
    KeyboardInterrupt,
    StopAsyncIteration,
    StopIteration,
    SystemExit,
)
"""What would say something else here than it did in the worker."""


def error_of(label: str, frame: Frame) -> BaseException:
    """What an answer is that is no result."""
    if frame.kind is Kind.FAULT:
        fault: Any = frame.body.unpack(("the reason",))[0]
        reason, text = fault
        return (NotOffloadable if reason == "function" else PayloadError)(f"{label}: {text}")
    raised = unseal(frame.body)
    if isinstance(raised, Interrupted):
        return OffloadError(f"{label} was stopped: its pool was closed")
    if isinstance(raised, _MISLEADING):
        error = OffloadError(f"{label} raised {type(raised).__name__}")
        error.__cause__ = raised
        return error
    return raised


def log_here(attributes: dict[str, Any]) -> None:
    """Log what was logged in a worker.

    Args:
        attributes: Those of the record.
    """
    record = logging.makeLogRecord(attributes)
    target = logging.getLogger(record.name)
    if target.isEnabledFor(record.levelno):
        try:
            target.handle(record)
        except Exception:  # a filter of the application's, which cannot know that it is called from here
            if logging.raiseExceptions:
                traceback.print_exc()
