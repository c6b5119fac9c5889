"""A call between its beginning and its end, as the dispatcher sees it."""

from __future__ import annotations

from contextvars import copy_context

from asyncguard.errors import OffloadError
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._loops import Outcome, Revocable
from asyncguard.offloading._process import Piece, WorkerProcess, close_all

__all__ = ["Job"]


class Job:
    """A call that waits for a worker, or runs on one.

    Args:
        call: Its number.
        label: What its function is called.
        outcome: Where its frame is waited for.
        pieces: The frame that asks for it.
        descriptors: What goes with that.
        options: How it is to be run.
        seconds: After how many seconds it is too late; `None` for never.
        began: When those began.
    """

    __slots__ = (
        "began", "call", "context", "descriptors", "expired", "label", "options",
        "outcome", "pieces", "process", "seconds", "started", "timer",
    )  # fmt: skip

    def __init__(
        self,
        call: int,
        label: str,
        outcome: Outcome,
        pieces: list[Piece],
        descriptors: list[int],
        options: CallOptions,
        seconds: float | None,
        began: float,
    ) -> None:
        self.call = call
        self.label = label
        self.outcome = outcome
        self.pieces = pieces
        self.descriptors = descriptors
        self.options = options
        self.seconds = seconds
        self.began = began
        self.started = 0.0
        self.expired = False
        self.context = copy_context()
        self.process: WorkerProcess | None = None
        self.timer: Revocable | None = None

    def fail(self, error: OffloadError) -> None:
        """Raise it where the call is waited for."""
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def let_go(self) -> None:
        """It needs neither its time nor its descriptors any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        close_all(self.descriptors)
