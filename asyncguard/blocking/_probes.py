"""How each kind of event loop tells when it runs callbacks and when it waits for I/O.

A probe calls `LoopWatch.stalled` on the loop's own thread when the loop was held for too long, and
`LoopWatch.settle` once an iteration while the aftermath of a stall is open. Between times it answers the
watchdog's question since when the loop has been held.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from asyncguard import _clock
from asyncguard.blocking._lookups import keep_requests

if TYPE_CHECKING:
    from asyncguard.blocking._watch import LoopWatch

__all__ = ["HeartbeatProbe", "Probe", "SelectorProbe", "attach_probe", "running_loop"]

_NEVER = float("inf")
_LONGEST_INTERVAL = 60.0


class Probe(Protocol):
    """What a `LoopWatch` needs of a loop.

    Attributes:
        outside: The `id` of the frame that runs the loop, where callbacks do not run below
            `asyncio.Handle._run`; 0 if unknown.
    """

    outside: int

    def attach(self) -> None:
        """Begin. Called on the loop's thread, in a callback of the loop."""

    def held_since(self) -> float | None:
        """Since when the loop has run callbacks without a poll; `None` while it waits for I/O."""

    def runner(self) -> Any:
        """What `running_request` can ask for the task that runs now."""

    def long_turn(self, since: float, until: float) -> None:
        """A request's turn of at least the threshold has just ended, timed exactly."""

    def threshold_changed(self) -> None:
        """The watch's threshold is another one now. Called on the loop's thread."""

    def pause(self) -> None:
        """The loop has stopped running, perhaps to run again later: nothing holds it meanwhile."""

    def detach(self) -> None:
        """Leave the loop as it was. Called on the loop's thread."""

    def forget(self) -> None:
        """Let go of a loop that was closed, from any thread."""


def running_loop() -> Any:
    """The object that stands for the event loop running in this thread.

    Returns:
        The asyncio loop, or trio's token.

    Raises:
        RuntimeError: If no event loop runs in this thread.
    """
    loop = asyncio._get_running_loop()
    if loop is not None:
        return loop
    if "trio" in sys.modules:
        import trio

        return trio.lowlevel.current_trio_token()
    raise RuntimeError("no event loop runs in this thread")


def attach_probe(watch: LoopWatch, loop: Any) -> Probe:
    """Make the right probe for the running `loop`; it does nothing before it is attached."""
    if not isinstance(loop, asyncio.AbstractEventLoop):
        from asyncguard.blocking._trio import TrioProbe  # trio is optional

        return TrioProbe(watch)
    selector = getattr(loop, "_selector", None)
    if hasattr(selector, "select"):
        return SelectorProbe(watch, loop, selector)
    return HeartbeatProbe(watch, loop)


class SelectorProbe:
    """asyncio's own loops: times each iteration by a wrap of the selector's `select`.

    Exact, and free of wake-ups while the loop is idle.
    """

    def __init__(self, watch: LoopWatch, loop: asyncio.AbstractEventLoop, selector: Any) -> None:
        self.outside: int = 0
        self.runner: Callable[[], Any] = weakref.ref(loop)
        self._watch = watch
        self._selector = selector
        self._held_since: float | None = None
        self._attached = False
        self._wrapper: Any = None
        self._before: Any = None

    def attach(self) -> None:
        self._attached = True
        self._held_since = _clock.monotonic()
        self._before = vars(self._selector).get("select")
        self._wrapper = self._wrap(self._watch, self._selector.select)
        self._selector.select = self._wrapper

    def held_since(self) -> float | None:
        return self._held_since

    def long_turn(self, since: float, until: float) -> None:
        """Nothing to do: the iteration that it belongs to is timed as a whole."""

    def threshold_changed(self) -> None:
        """Nothing to do: it is asked for anew in each iteration."""

    def pause(self) -> None:
        self._held_since = None

    def detach(self) -> None:
        self.forget()
        # Somebody may have wrapped our wrapper since: then it stays, and only passes calls on.
        if vars(self._selector).get("select") is not self._wrapper:
            return
        if self._before is None:
            del self._selector.select
        else:
            self._selector.select = self._before

    def forget(self) -> None:
        self._attached = False
        self._held_since = None

    def _wrap(self, watch: LoopWatch, original: Callable[..., Any]) -> Callable[..., Any]:
        monotonic = _clock.monotonic

        def select(timeout: float | None = None) -> Any:
            if not self._attached:
                return original(timeout)
            since = self._held_since
            if since is not None:
                now = monotonic()
                if now - since >= watch.threshold:
                    watch.stalled(since, now)
                elif watch.aftermath is not None:
                    watch.settle()
            # Not before: the watchdog forgets what it saw as soon as nothing holds the loop.
            self._held_since = None
            if watch.aftermath is not None and (timeout is None or timeout > 0):
                # Nothing is ready but what the poll brings. If it brings nothing at once, nobody
                # else was waiting, and the aftermath is over before the loop goes to sleep.
                if events := original(0):
                    self._held_since = monotonic()
                    return events
                watch.close_aftermath()
            try:
                return original(timeout)
            finally:
                if self._attached:
                    self._held_since = monotonic()

        return select


class HeartbeatProbe:
    """uvloop and other loops without a selector to wrap: a timer that should fire on time.

    A late beat shows that the loop was held. When exactly it began is known to within one interval,
    but for turns of guarded requests, which are timed exactly wherever they run.
    """

    BEATS_PER_THRESHOLD = 5

    def __init__(self, watch: LoopWatch, loop: asyncio.AbstractEventLoop) -> None:
        self.outside: int = 0
        # The watch outlives a loop that was closed without a shutdown; the loop must not live on by it.
        self.runner: Callable[[], Any] = weakref.ref(loop)
        self._watch = watch
        self._interval = 0.0
        self._due = _NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._settling = False
        self._attached = False
        self._forget_requests: Callable[[], None] | None = None

    def attach(self) -> None:
        loop: asyncio.AbstractEventLoop = self.runner()
        self._attached = True
        self._forget_requests = keep_requests(loop)
        loop.call_soon(self._look_outside)
        self._schedule(loop)

    def held_since(self) -> float | None:
        turn = self._watch.turn_since if self._watch.turn is not None else None
        if _clock.monotonic() <= self._due:
            return turn
        return self._due if turn is None else min(turn, self._due)

    def long_turn(self, since: float, until: float) -> None:
        """Exact, where the next beat could only estimate."""
        self._stalled(since, until)

    def threshold_changed(self) -> None:
        """Beat at the new pace at once."""
        if self._timer is not None:
            self._timer.cancel()
            self._schedule(self.runner())

    def pause(self) -> None:
        self._due = _NEVER

    def detach(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._forget_requests is not None:
            self._forget_requests()
        self.forget()

    def forget(self) -> None:
        self._attached = False
        self._due = _NEVER
        # Both lead to the loop.
        self._timer = None
        self._forget_requests = None

    def _look_outside(self) -> None:
        # Called by the loop itself, which is no Python code: the next frame is its caller.
        self.outside = id(sys._getframe().f_back)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._interval = min(self._watch.threshold / self.BEATS_PER_THRESHOLD, _LONGEST_INTERVAL)
        self._due = _clock.monotonic() + self._interval
        self._timer = loop.call_later(self._interval, self._beat)

    def _beat(self) -> None:
        loop = self.runner()
        if loop is None or not self._attached:
            return
        self.outside = id(sys._getframe().f_back)
        now = _clock.monotonic()
        # A hold that began between two beats began half an interval before the missed one, on average.
        since = max(self._due - self._interval / 2, self._watch.stalled_until)
        if now - since >= self._watch.threshold:
            self._stalled(since, now)
        self._schedule(loop)

    def _stalled(self, since: float, until: float) -> None:
        self._watch.stalled(since, until)
        loop = self.runner()
        if loop is not None and not self._settling:
            self._settling = True
            loop.call_soon(self._settle)

    def _settle(self) -> None:
        loop = self.runner()
        self._settling = loop is not None and self._attached and self._watch.aftermath is not None
        if self._settling:
            self._watch.settle()
            loop.call_soon(self._settle)
