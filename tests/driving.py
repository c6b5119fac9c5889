"""Requests that are driven as the middleware drives them, without one."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._steps import DONE, drive
from asyncguard.blocking._watch import LoopWatch

__all__ = ["driven"]


async def driven(coroutine: Coroutine[Any, Any, Any], record: RequestRecord, watch: LoopWatch) -> Any:
    """Await `coroutine`, telling `watch` of each turn that `record` has on the loop.

    Returns:
        What it returns; `None` if it never gave the loop back, as the middleware does not ask.
    """
    steps = coroutine.__await__()
    record.turn_since = _clock.monotonic()
    outer, watch.turn = watch.turn, record
    watch.note_turn(record)
    try:
        awaited = next(steps, DONE)
    finally:
        watch.end_turn(record, outer)
    return None if awaited is DONE else await drive(steps, awaited, record, watch)
