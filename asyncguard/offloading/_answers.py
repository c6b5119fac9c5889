"""What a worker's answers are to whoever awaits a call, wherever the worker is."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from asyncguard.errors import NotOffloadable, OffloadError, PayloadError
from asyncguard.offloading._failure import unseal
from asyncguard.offloading._interrupt import Interrupted
from asyncguard.offloading._payload import UnpackError
from asyncguard.offloading._wire import INLINE, Frame, Kind

__all__ = ["error_of", "log_here", "result_of"]

_RESULT = Kind.RESULT
_THE_RESULT = ("the result",)

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


async def result_of(
    label: str, frame: Frame, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> Any:
    """What a call returned.

    Args:
        label: What messages call it.
        frame: The answer to it.
        in_thread: Has what is large unpacked off the loop.

    Raises:
        BaseException: What the call raised, or what `error_of` makes of it.
        PayloadError: If the result cannot be rebuilt.
    """
    if frame.kind is not _RESULT:
        raise error_of(label, frame)
    body = frame.body
    try:
        if body.size > INLINE:
            return (await in_thread(lambda: body.unpack(_THE_RESULT)))[0]
        return body.unpack(_THE_RESULT)[0]
    except UnpackError as error:
        raise PayloadError(f"{error} (of {label})") from error.__cause__


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
