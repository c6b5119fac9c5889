"""What is gathered while the loop stalls, before anybody makes a report of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from asyncguard._frames import RawFrame
from asyncguard._request import RequestRecord
from asyncguard.blocking._lookups import arrival, is_answered
from asyncguard.blocking._vitals import Reading

__all__ = ["Aftermath", "LongTurn", "OtherThread", "Others", "Sample", "Stall", "Wait"]


class OtherThread(NamedTuple):
    """A thread that computed while the loop's thread did not get on.

    Attributes:
        name: Its name.
        frames: What it was doing, innermost frame first.
        cpu: Seconds of CPU that it had used since the last reading.
    """

    name: str
    frames: tuple[RawFrame, ...]
    cpu: float


Others = tuple[OtherThread, ...]
"""One look at the other threads, the busiest first."""


class Sample(NamedTuple):
    """One look at the loop's thread during a stall.

    Attributes:
        at: When, on the monotonic clock.
        frames: What the callback that was running did, innermost frame first.
        record: The request that the callback worked for.
        callback: A number that tells it from its neighbours; 0 if unknown.
        task: The name of the task whose step it was.
    """

    at: float
    frames: tuple[RawFrame, ...]
    record: RequestRecord | None
    callback: int
    task: str | None = None


class LongTurn(NamedTuple):
    """A turn of one request that alone was long enough to be a stall."""

    record: RequestRecord
    since: float
    until: float


class Wait(NamedTuple):
    """A request that got its next turn right after a stall.

    Attributes:
        record: The request.
        waiting_since: When it last gave the loop back; minus infinity if this is its first turn.
        resumed: When it got its turn.
        round: In which iteration of the aftermath.
    """

    record: RequestRecord
    waiting_since: float
    resumed: float
    round: int = 0


@dataclass(slots=True)
class Aftermath:
    """The first few iterations of the loop after a stall: who runs now was due during it.

    A request that merely waits for its upstream does not run in them, and so is not counted. Stalls that
    come soon after each other share one.

    Attributes:
        last: The last iteration to look at.
        round: How many iterations have passed.
        waits: Who has run so far, in order.
        due: Since when a timer of a request's had been due, where the loop tells.
    """

    ROUNDS: ClassVar[int] = 8
    """In so many iterations a request runs that was due during a stall. From a connection waiting in the
    backlog to the first turn of its request, uvicorn needs five and hypercorn eight."""

    last: int = ROUNDS
    round: int = 0
    waits: list[Wait] = field(default_factory=list)
    due: dict[RequestRecord, float] = field(default_factory=dict)

    def note_due(self, record: RequestRecord, due: float) -> None:
        """Take down that a timer of `record`'s should have fired at `due`; the earliest counts."""
        self.due[record] = min(due, self.due.get(record, due))

    def note_turn(self, record: RequestRecord, now: float) -> None:
        """Take down that `record` has a turn on the loop now."""
        # Whoever has its answer waits for nothing, though tasks of its own may still unwind.
        if len(self.waits) < 10_000 and not is_answered(record.receive):
            if record.released == -math.inf and record.arrived is None:
                record.arrived = arrival(record.receive)
            self.waits.append(Wait(record, record.released, now, self.round))


@dataclass(slots=True)
class Stall:
    """One stall: all that was seen of it, in raw form.

    Attributes:
        start: When the loop came back from its last poll, on the monotonic clock; or when the turn began
            that alone was long enough.
        end: When it went to its next poll, or when that turn ended.
        wall_end: The end on the wall clock.
        samples: The looks at the loop's thread during the stall, in order.
        others: The looks at other threads that computed while the loop's did not.
        turn: The turn of a request that ended it and was long enough by itself, if one was.
        aftermath: Who ran right after it.
        spent: What the threads did meanwhile. The window that it covers ends with the stall; it may
            begin a little before the stall, or after its beginning.
        loop: The kind of the loop.
        thread: The name of the loop's thread.
        starting: Whether the application was starting up.
        round: The iteration of the aftermath in which it ended.
    """

    start: float
    end: float
    wall_end: float
    samples: Sequence[Sample]
    others: Sequence[Others]
    turn: LongTurn | None
    aftermath: Aftermath
    spent: Reading
    loop: str
    thread: str
    starting: bool
    round: int = 0

    @property
    def duration(self) -> float:
        """Its length in seconds."""
        return self.end - self.start
