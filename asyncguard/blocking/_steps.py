"""Driving a request's coroutine by hand, so that each of its turns on the loop is timed.

What asyncio, uvloop and trio do with a coroutine is the same: `send` it a value or `throw` an exception
into it, and pass on what it yields. Doing that here, one level further out, gives the exact time of
every turn on every loop for a fraction of what a task per request would cost.

The first turn is most often the only one. `next(steps, DONE)` takes it, since that costs no `StopIteration`,
and `drive` takes the others.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from typing import Any

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._watch import LoopWatch

__all__ = ["DONE", "begin", "drive"]

DONE: Any = object()
"""What the first turn comes to if it was the last one as well."""


async def begin(steps: Any, record: RequestRecord, watch: LoopWatch) -> None:
    """Await an application's coroutine from its first turn on; `steps` is what its `__await__` returns."""
    record.turn_since = _clock.monotonic()
    outer, watch.turn = watch.turn, record
    if watch.aftermath is not None:
        watch.note_turn(record)
    try:
        awaited = next(steps, DONE)
    finally:
        watch.end_turn(record, outer)
    if awaited is not DONE:
        await drive(steps, awaited, record, watch)


@types.coroutine
def drive(steps: Any, awaited: Any, record: RequestRecord, watch: LoopWatch) -> Generator[Any, Any, Any]:
    """Await what is left of an application's coroutine.

    Args:
        steps: What its `__await__` returns.
        awaited: What its first turn came to, which was taken already.
        record: The request.
        watch: The watch over the loop.

    Returns:
        What the coroutine returns; whatever it raises comes through as it is.
    """
    monotonic = _clock.monotonic
    send = steps.send
    error: BaseException | None = None
    value: Any = None
    while True:
        try:
            value = yield awaited
        except GeneratorExit:
            steps.close()
            raise
        except BaseException as raised:
            # As if it had been thrown at the application itself.
            error = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)
        record.turn_since = monotonic()
        outer, watch.turn = watch.turn, record
        if watch.aftermath is not None:
            watch.note_turn(record)
        try:
            if error is None:
                awaited = send(value)
            else:
                thrown, error = error, None
                try:
                    awaited = steps.throw(thrown)
                finally:
                    del thrown
        except StopIteration as stop:
            return stop.value
        finally:
            watch.end_turn(record, outer)
