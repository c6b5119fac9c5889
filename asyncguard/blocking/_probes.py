"""How each kind of event loop tells when it runs callbacks and when it waits for I/O.

A probe calls `LoopWatch.stalled` on the loop's own thread when the loop was held for too long, and
`LoopWatch.settle` once an iteration while the aftermath of a stall is open. Between times it answers the
watchdog's question since when the loop has been held.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

from asyncguard import _clock
from asyncguard._request import RequestRecord
from asyncguard.blocking._lookups import keep_requests, moved_requests, ready_requests, waiting_tasks

if TYPE_CHECKING:
    from asyncguard.blocking._watch import LoopWatch

__all__ = ["HeartbeatProbe", "Probe", "SelectorProbe", "attach_probe", "kind_of", "running_loop"]

_NEVER = float("inf")
_LONGEST_INTERVAL = 60.0
_SHORTEST_INTERVAL = 0.001
"""uvloop's timers count whole milliseconds: anything shorter is none, and the loop would never sleep."""
_REST_AFTER = 1.0
_COARSENESS = 0.002
"""Seconds by which a timer may be late though nothing holds the loop: libuv counts milliseconds."""


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

    def hold_began(self, turn: float) -> float:
        """When the hold began, what was told of it left out, in which a turn began at `turn`."""

    def runner(self) -> Any:
        """What `running_request` can ask for the task that runs now."""

    def aftermath_began(self) -> None:
        """A stall was taken down: from now on `LoopWatch.settle` is to be called once an iteration."""

    def resumed(self) -> Iterable[RequestRecord]:
        """Requests that tasks have a step for, in an iteration after a stall; they may come twice.

        Asked once an iteration. Requests that have a turn of their own need not be among them.
        """

    def threshold_changed(self) -> None:
        """The watch's threshold is another one now. Called on the loop's thread."""

    def mark(self, now: float, cpu: float | None) -> None:
        """Take down how busy the loop has been until now. Called on the watchdog's thread.

        Args:
            now: The time.
            cpu: Seconds of CPU that the loop's thread has used, if the system tells.
        """

    def rest(self) -> bool:
        """Nothing has happened for a while: have the watchdog woken when something does.

        Called on the watchdog's thread.

        Returns:
            Whether that can be done, and nothing has happened since.
        """

    def end_rest(self) -> None:
        """A request begins. Called on the loop's thread, if `LoopWatch.resting`."""

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


def kind_of(loop: Any) -> str:
    """What a person calls this kind of loop: ``asyncio.UnixSelectorEventLoop``, ``uvloop.Loop``, ``trio``."""
    package = type(loop).__module__.partition(".")[0]
    if not isinstance(loop, asyncio.AbstractEventLoop):
        return package
    return f"{package}.{type(loop).__qualname__.lstrip('_')}"


def attach_probe(watch: LoopWatch, loop: Any) -> Probe:
    """Make the right probe for the running `loop`; it does nothing before it is attached."""
    if not isinstance(loop, asyncio.AbstractEventLoop):
        from asyncguard.blocking._trio import TrioProbe  # trio is optional

        return TrioProbe(watch)
    selector = getattr(loop, "_selector", None)
    if hasattr(selector, "select") and hasattr(selector, "__dict__"):  # else it cannot be wrapped
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
        self._resting = False
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

    def hold_began(self, turn: float) -> float:
        return max(self._held_since or turn, self._watch.stalled_until)

    def aftermath_began(self) -> None:
        """Nothing to do: it is asked for in each iteration."""

    def resumed(self) -> Iterable[RequestRecord]:
        return ready_requests(self.runner())

    def threshold_changed(self) -> None:
        """Nothing to do: it is asked for in each iteration."""

    def mark(self, now: float, cpu: float | None) -> None:
        self._watch.load.mark(now)

    def rest(self) -> bool:
        # In this order: an iteration that begins meanwhile sees one or is seen.
        self._resting = True
        self._resting = self._held_since is None
        return self._resting

    def end_rest(self) -> None:
        """Nothing to do: the iteration that it begins in has done so."""

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
        load = watch.load

        def select(timeout: float | None = None) -> Any:
            if not self._attached:
                return original(timeout)
            now = monotonic()
            since = self._held_since
            if since is not None:
                held = now - since
                load.busy += held
                load.delay += held * held / 2
                if held >= watch.threshold and now - max(since, watch.stalled_until) >= watch.threshold:
                    watch.stalled(max(since, watch.stalled_until), now)
                if watch.aftermath is not None:
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
                    self._held_since = after = monotonic()
                    if after - now >= watch.threshold:
                        watch.note_long_poll(now, after)
                    if self._resting:
                        self._resting = False
                        watch.wake(after)

        return select


class HeartbeatProbe:
    """uvloop and other loops without a selector to wrap: a timer that should fire on time.

    A late beat shows that the loop was held. When exactly it began is known to within one interval,
    but for turns of guarded requests, which are timed exactly wherever they run.

    While nothing happens the heart stands still. A request starts it again, and so does a look of the
    watchdog's that finds the loop in a callback: what began before that look is known less well.
    """

    BEATS_PER_THRESHOLD = 5

    def __init__(self, watch: LoopWatch, loop: asyncio.AbstractEventLoop) -> None:
        self.outside: int = 0
        # The watch outlives a loop that was closed without a shutdown; the loop must not live on by it.
        self.runner: Callable[[], Any] = weakref.ref(loop)
        self._watch = watch
        self._thread = threading.get_ident()
        # Not that of the request which may have the watch begin: it is not to be kept, nor blamed.
        self._context = Context()
        self._cpu_at_start: float | None = None
        self._interval = 0.0
        self._due = _NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._active_at = 0.0
        self._looked_at = 0.0
        self._resume = False
        self._settling = False
        self._waiting: dict[asyncio.Task[Any], Any] = {}
        self._attached = False
        self._forget_requests: Callable[[], None] | None = None

    def attach(self) -> None:
        loop: asyncio.AbstractEventLoop = self.runner()
        self._attached = True
        self._forget_requests = keep_requests(loop, self._watch.note_due)
        loop.call_soon(self._look_outside, context=self._context)
        self.end_rest()

    def end_rest(self) -> None:
        loop = self.runner()
        if loop is not None and self._attached and self._timer is None:
            self._watch.resting = False
            self._active_at = _clock.monotonic()
            self._schedule(loop)

    def held_since(self) -> float | None:
        record = self._watch.turn
        turn = None if record is None else record.turn_since
        now = _clock.monotonic()
        if turn is None and self._watch.resting and threading.get_ident() != self._thread:
            self._look_at_resting(now)
        if now <= self._due:
            return turn
        # What was told of already is over, though the beat is yet to come.
        late = max(self._due, self._watch.stalled_until)
        return late if turn is None else min(turn, late)

    def hold_began(self, turn: float) -> float:
        return turn

    def aftermath_began(self) -> None:
        loop = self.runner()
        if loop is None:
            return
        # There is no asking which tasks are about to run, but those that did wait for something else then.
        if self._watch.in_flight:
            self._waiting = waiting_tasks(loop)
        if not self._settling:
            self._settling = True
            loop.call_soon(self._settle, context=self._context)

    def resumed(self) -> Iterable[RequestRecord]:
        return moved_requests(self._waiting)

    def threshold_changed(self) -> None:
        """Beat at the new pace at once; a beat that is late already still has to tell of that."""
        if self._timer is not None and _clock.monotonic() <= self._due:
            self._timer.cancel()
            self._schedule(self.runner())

    def mark(self, now: float, cpu: float | None) -> None:
        load = self._watch.load
        if cpu is not None:
            if self._cpu_at_start is None:
                self._cpu_at_start = cpu
            load.busy = cpu - self._cpu_at_start + load.waited
        load.mark(now)
        loop = self.runner()
        if self._resume and loop is not None:
            self._resume = False
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self._end_rest, context=self._context)

    def rest(self) -> bool:
        """Never: nobody would wake the watchdog, which is the one to look while the heart stands still."""
        return False

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
        self._waiting = {}

    def _look_outside(self) -> None:
        # Called by the loop itself, which is no Python code: the next frame is its caller.
        self.outside = id(sys._getframe().f_back)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        interval = self._watch.threshold / self.BEATS_PER_THRESHOLD
        self._interval = min(max(interval, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        self._due = _clock.monotonic() + self._interval
        self._timer = loop.call_later(self._interval, self._beat, context=self._context)

    def _beat(self) -> None:
        loop = self.runner()
        if loop is None or not self._attached:
            return
        watch = self._watch
        self.outside = id(sys._getframe().f_back)
        now = _clock.monotonic()
        if (late := now - self._due) > _COARSENESS:
            watch.load.delay += late * (self._interval + late / 2)
        # A hold that began between two beats began half an interval before the missed one, on average.
        if self._note_hold(max(self._due - self._interval / 2, watch.stalled_until), now) or watch.in_flight:
            self._active_at = now
        if now - self._active_at < _REST_AFTER:
            self._schedule(loop)
        else:
            self._timer, self._due, self._looked_at = None, _NEVER, now
            watch.resting = True

    def _note_hold(self, since: float, now: float) -> bool:
        long = now - since >= self._watch.threshold
        if long:
            self._watch.stalled(since, now)
        return long

    def _look_at_resting(self, now: float) -> None:
        """See whether the loop is in a callback; if so, that began after the last look."""
        frame = sys._current_frames().get(self._thread)
        if frame is not None and id(frame) != self.outside:
            self._due = (self._looked_at + now) / 2
            self._watch.resting, self._resume = False, True
        self._looked_at = now

    def _end_rest(self) -> None:
        since, now = max(self._due, self._watch.stalled_until), _clock.monotonic()
        self._watch.load.delay += max(0.0, now - since) ** 2 / 2
        self.end_rest()
        self._note_hold(since, now)

    def _settle(self) -> None:
        loop = self.runner()
        self._settling = loop is not None and self._attached and self._watch.aftermath is not None
        if self._settling:
            self._watch.settle()
            loop.call_soon(self._settle, context=self._context)
        else:
            self._waiting = {}
