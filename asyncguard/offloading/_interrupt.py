"""Stops the function that a worker runs, and no other one.

The server writes the number of the call that is to stop into a page of shared memory, and then sends a
signal. The signal carries nothing: whenever it arrives, the page says what is meant. So one that comes too
late does nothing to the next call, and one that comes too early is made up for when the call begins.
"""

from __future__ import annotations

import logging
import mmap
import signal
import sys
import time
from _thread import get_ident, start_new_thread
from types import CodeType, FrameType, TracebackType

__all__ = ["Interrupted", "Interrupts", "is_delicate"]

_AGAIN_AFTER = 0.01
_IMPORTS = "<frozen importlib._bootstrap>"
_LOGGING = logging.getLogger.__code__.co_filename
_COVERAGE = "coverage."
"""How its modules are called: what it traces by is written in C, and has no code to be told by."""


class Interrupted(BaseException):
    """Raised in a function that is to stop: nobody waits for it any more, or its time has run out.

    It is no `Exception`, so that code which carries on after any failure does not carry on after this one.
    """


class Interrupts:
    """Those of one worker. To be made, and used, in its main thread.

    Args:
        page: The page.
    """

    def __init__(self, page: mmap.mmap) -> None:
        self._asked = memoryview(page).cast("Q")
        self._main = get_ident()
        self._running = 0
        self._caller: CodeType | None = None
        self._raised = 0
        self._held = 0
        self._is_coming_again = False

    def install(self) -> None:
        """Take over the signal."""
        signal.signal(signal.SIGUSR1, self._on_signal)
        report = sys.unraisablehook

        def on_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
            if issubclass(unraisable.exc_type, Interrupted):
                self._lost()
            else:
                report(unraisable)

        sys.unraisablehook = on_unraisable

    # A call is interrupted once at most: `_raised` is set before anything is raised. Hence code around
    # `begin` and `end` needs two layers only: if an exception comes out of the `finally` that calls `end`,
    # before it could, there will not be another.

    def begin(self, call: int) -> None:
        """From now on this call may be interrupted; it may be at once.

        Args:
            call: Its number, which is not 0.

        Raises:
            Interrupted: If it is to stop.
        """
        self._caller = sys._getframe(1).f_code
        self._running = call
        if self._asked[0] == call:
            self._check(sys._getframe())

    def end(self) -> None:
        """No call may be interrupted any more."""
        self._running = 0

    @property
    def running(self) -> int:
        """The number of the call that runs; 0 for none."""
        return self._running

    def hold(self) -> _Hold:
        """A context in which nothing is raised. What should have been is raised at its end."""
        return _Hold(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._check(frame)

    def _check(self, frame: FrameType | None) -> None:
        call = self._running
        if not call or call == self._raised or self._held:
            return
        if self._asked[0] != call:
            return
        if is_delicate(frame, self._caller) and self._come_again():
            return
        self._raised = call
        raise Interrupted

    def _lost(self) -> None:
        """It was raised where exceptions come to nothing, as in a `__del__`."""
        self._raised = 0
        self._come_again()

    def _come_again(self) -> bool:
        """Have the signal sent once more, a moment later; returns whether that will be done."""
        if not self._is_coming_again:
            try:
                # Not by `threading`, whose locks may be held by the very code that was interrupted.
                start_new_thread(self._signal_later, ())
            except RuntimeError:
                return False
            self._is_coming_again = True
        return True

    def _signal_later(self) -> None:
        time.sleep(_AGAIN_AFTER)
        self._is_coming_again = False
        signal.pthread_kill(self._main, signal.SIGUSR1)


class _Hold:
    """See `Interrupts.hold`. Other threads are never interrupted, and hold nothing."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        if get_ident() == self._interrupts._main:
            self._interrupts._held += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupts = self._interrupts
        if get_ident() == interrupts._main:
            interrupts._held -= 1
            interrupts._check(sys._getframe())


def is_delicate(frame: FrameType | None, caller: CodeType | None) -> bool:
    """Whether an exception at this place, which `caller` has led to, would break more than the function.

    A module whose import is cut off may never be importable again (NumPy is such a one); the code of
    `logging` may be about to release a lock; and so may a tracer, as that of coverage, which would wait
    for it for ever at the next line.
    """
    if frame is not None and frame.f_code.co_filename == _LOGGING:
        return True
    tracer = getattr(sys.gettrace(), "__code__", None)
    while frame is not None and frame.f_code is not caller:
        if frame.f_code is tracer or frame.f_code.co_filename == _IMPORTS:
            return True
        if str(frame.f_globals.get("__name__")).startswith(_COVERAGE):
            return True
        frame = frame.f_back
    return False
