"""Driving a request's coroutine by hand, so that each of its turns on the loop is timed.

What asyncio, uvloop and trio do with a coroutine is the same: `send` it a value or `throw` an exception
into it, and pass on what it yields. Doing that here, one level further out, gives the exact time of
every turn on every loop for a fraction of what a task per request would cost.
"""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from typing import Any

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._watch import LoopWatch

__all__ = ["drive"]


@types.coroutine
def drive(
    coroutine: Coroutine[Any, Any, Any], record: RequestRecord, watch: LoopWatch
) -> Generator[Any, Any, Any]:
    """Await `coroutine`, telling `watch` of each turn that `record` has on the loop.

    Returns:
        What the coroutine returns; whatever it raises comes through as it is.
    """
    monotonic = _clock.monotonic
    send = coroutine.send
    value: Any = None
    error: BaseException | None = None
    while True:
        # An application may call another guarded one in the same turn: the turn is then its own
        # again when the inner one is done.
        outer = watch.turn
        record.turn_since = since = monotonic()
        aftermath = watch.aftermath  # asked for once: the watchdog may close it
        if aftermath is not None:
            aftermath.note_turn(record, since)
        watch.turn = record
        try:
            if error is None:
                awaited = send(value)
            else:
                thrown, error = error, None
                try:
                    awaited = coroutine.throw(thrown)
                finally:
                    del thrown
        except StopIteration as stop:
            return stop.value
        finally:
            record.released = now = monotonic()
            held = now - since
            record.loop_time += held
            if held >= watch.threshold:
                watch.note_long_turn(record, since, now)
            elif record.loop_time >= record.busy_at:
                watch.note_busy(record, held, now)
            # Not before: the watchdog forgets what it saw as soon as nothing holds the loop.
            watch.turn = outer
        try:
            value = yield awaited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as raised:
            # As if it had been thrown at the application itself.
            error = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)
