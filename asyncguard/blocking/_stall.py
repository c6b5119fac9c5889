"""What is gathered while the loop stalls, before anybody makes a report of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from asyncguard._request import RequestRecord
from asyncguard.blocking._lookups import RawFrame
from asyncguard.blocking._vitals import Reading

__all__ = ["Aftermath", "LongTurn", "Sample", "Stall", "Wait"]


class Sample(NamedTuple):
    """One look at the loop's thread during a stall."""

    at: float
    frames: tuple[RawFrame, ...]
    record: RequestRecord | None
    callback: int


class LongTurn(NamedTuple):
    """A turn of one request that alone was long enough to be a stall."""

    record: RequestRecord
    since: float
    until: float
    vitals: Reading


class Wait(NamedTuple):
    """A request that got its next turn right after a stall."""

    record: RequestRecord
    waiting_since: float
    resumed: float


@dataclass(slots=True)
class Aftermath:
    """The first few iterations of the loop after a stall: who runs now was due during it.

    A request that merely waits for its upstream does not run in them, and so is not counted.

    Attributes:
        rounds: For how many more iterations to look.
        waits: Who has run so far, in order.
    """

    rounds: int
    waits: list[Wait] = field(default_factory=list)

    def note_turn(self, record: RequestRecord, now: float) -> None:
        """Take down that `record` has a turn on the loop now."""
        if len(self.waits) < 10_000:
            self.waits.append(Wait(record, record.released, now))


@dataclass(slots=True)
class Stall:
    """One stall: all that was seen of it, in raw form.

    Attributes:
        start: When the loop came back from its last poll, on the monotonic clock.
        end: When it went to its next one.
        wall_end: The end on the wall clock.
        samples: The looks at the loop's thread during the stall, in order.
        long_turns: Turns of requests that were long by themselves.
        aftermath: Who ran right after it.
        spent: What the threads did meanwhile. The window that it covers ends with the stall; it may
            begin a little before the stall, or after its beginning.
        thread: The name of the loop's thread.
        starting: Whether the application was starting up.
    """

    start: float
    end: float
    wall_end: float
    samples: Sequence[Sample]
    long_turns: Sequence[LongTurn]
    aftermath: Aftermath
    spent: Reading
    thread: str
    starting: bool

    @property
    def duration(self) -> float:
        """Its length in seconds."""
        return self.end - self.start
