"""Clients that requests build for themselves and throw away, again and again: which lines do so.

A client counts as thrown away if it is closed, or gone, when its request ends (or when that builds its next
one). What lives on is somebody's cache, or shared: a line whose last one lives is not told of. A line is told
of when it builds another one `AGAIN` times after the last was thrown away: many that are built at the same
time, by requests that find nothing to share yet, count once.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from asyncguard import _clock
from asyncguard._frames import raw_frames
from asyncguard._request import RequestRecord
from asyncguard.clients._kinds import Kind
from asyncguard.clients._places import Key, find
from asyncguard.clients._rebuilt_report import Rebuilding

__all__ = ["Lines"]

AGAIN = 3
"""How many have been thrown away when a line is told of, the next time that it builds one."""
WITHIN = 3600.0
"""In how many seconds. What is built more rarely costs nothing worth a warning."""

_MOST_LINES = 1000
_MOST_BUILDS = 100
"""How many a request may have open: a websocket may live for days."""


class Line:
    """What one line has built.

    Attributes:
        thrown_away: How many of them were thrown away.
        lately: When the last of these were.
        seconds: How long it took to build those that have been built.
        built: How many these are.
        kind: Of which kind the last one was that was thrown away.
        kept: The last one that outlived its request.
        told: Whether it has been told of.
    """

    __slots__ = ("built", "kept", "kind", "lately", "seconds", "thrown_away", "told")

    def __init__(self) -> None:
        self.thrown_away = 0
        self.lately: deque[float] = deque(maxlen=AGAIN)
        self.seconds = 0.0
        self.built = 0
        self.kind: Kind | None = None
        self.kept: Build | None = None
        self.told = False

    def count_thrown_away(self, build: Build) -> None:
        """One was thrown away just now; it counts if it was begun after the one before was thrown away."""
        if not self.lately or build.began >= self.lately[-1]:
            self.thrown_away += 1
            self.lately.append(_clock.monotonic())
            self.kind = build.kind

    def is_due(self, now: float) -> bool:
        """Whether it is to be told of now, as it builds another one."""
        return (
            len(self.lately) == AGAIN
            and now - self.lately[0] <= WITHIN
            and not (self.kept is not None and self.kept.lives())
        )


class Build:
    """One client that a request has built."""

    __slots__ = ("_get", "_trait", "began", "kind", "line")

    def __init__(self, kind: Kind, thing: object, line: Line, began: float) -> None:
        self.line = line
        self.began = began
        self._trait: Any = None
        self.take(kind, thing)

    def take(self, kind: Kind, thing: object) -> None:
        """Tell by `thing` what becomes of it."""
        self.kind = kind
        self._get: Callable[[], Any]
        try:
            self._get = weakref.ref(thing)
        except TypeError:  # asyncpg's: it is held until its request ends, and no longer
            self._get = lambda: thing

    @property
    def is_weak(self) -> bool:
        """Whether it keeps nothing alive."""
        return type(self._get) is weakref.ref

    def is_of(self, thing: object) -> bool:
        """Whether it is `thing` that was built."""
        return self._get() is thing

    def lives(self) -> bool:
        """Whether it is there and open; as far as it can be told."""
        thing = self._get()
        try:
            return thing is not None and not self.kind.ended(thing, self._trait)
        except Exception:  # half built, or of a version that is told otherwise
            return True

    # -- what the watched constructor says -----------------------------------------------------------

    def end(self, seconds: float) -> None:
        """It has been built, in so many seconds."""
        self.line.seconds += seconds
        self.line.built += 1
        thing = self._get()
        self._trait = self.kind.trait(thing)

    def fail(self) -> None:
        """It could not be built: nothing becomes of it."""
        self._get = object


class Visit:
    """What one request has built and not thrown away yet. It may build in several threads."""

    __slots__ = ("_builds", "_lock")

    def __init__(self, lock: threading.RLock) -> None:
        self._builds: list[Build] = []
        self._lock = lock

    def __call__(self) -> None:
        """The request has ended: what lives now is kept."""
        with self._lock:
            self.sort_out()
            for build in self._builds:
                if build.is_weak:
                    build.line.kept = build
            self._builds.clear()

    def sort_out(self) -> None:
        """Count what has been thrown away meanwhile."""
        living = []
        thrown_away: dict[Line, Build] = {}
        for build in self._builds:
            if build.lives():
                living.append(build)
            else:
                thrown_away[build.line] = build  # the last one stands for all
        self._builds[:] = living
        for line, build in thrown_away.items():
            line.count_thrown_away(build)

    def add(self, build: Build) -> bool:
        """Keep an eye on one more, if that is not too many."""
        if len(self._builds) >= _MOST_BUILDS:
            return False
        self._builds.append(build)
        return True

    def stand_for(self, part: object, kind: Kind, thing: object) -> None:
        """`thing` is built upon a part, and stands for it, if this request has built that."""
        with self._lock:
            for build in self._builds:
                if build.is_of(part):
                    build.take(kind, thing)


_all: weakref.WeakSet[Lines] = weakref.WeakSet()


class Lines:
    """What is known of the lines of one application. Any thread may use it.

    Args:
        project_root: The directory whose files are the user's.
        tell: Called, on the thread that builds, with what a line does again and again; once for each.
    """

    def __init__(self, project_root: str | None, tell: Callable[[Rebuilding], object]) -> None:
        self._project_root = project_root
        self._tell = tell
        self._lines: OrderedDict[Key, Line] = OrderedDict()
        self.renew_lock()
        _all.add(self)

    def renew_lock(self) -> None:
        """Where another thread may have held it that is not there: in a forked child."""
        # Reentrant: whether a client is closed may be told by code of the user's.
        self._lock = threading.RLock()

    def begin(
        self, record: RequestRecord, kind: Kind, thing: object, part: object, frame: FrameType
    ) -> Build | None:
        """A request is about to build a client.

        Args:
            record: The request.
            kind: Of which kind the client is.
            thing: The client, so far without anything in it.
            part: What it is built upon, if it was given that.
            frame: The frame that called its constructor.

        Returns:
            What wants to know how it goes on; `None` if nobody does.
        """
        visit = self._visit(record)
        if visit is None:
            return None
        if part is not None:
            visit.stand_for(part, kind, thing)
            return None
        place = find(thing, frame, record.endpoint, self._project_root)
        with self._lock:
            line = self._at(place.key)
            if line.told:
                return None
            visit.sort_out()
            now = _clock.monotonic()
            if not line.is_due(now):
                build = Build(kind, thing, line, now)
                return build if visit.add(build) else None
            line.told = True
            rebuilding = Rebuilding(
                record=record,
                kind=line.kind or kind,
                times=line.thrown_away,
                seconds=line.seconds / max(1, line.built),
                noticed=_clock.wall(),
                frames=raw_frames(frame),
                outside=_steps(frame, place.frame),
            )
        self._tell(rebuilding)
        return None

    def _visit(self, record: RequestRecord) -> Visit | None:
        """What this request has built; `None` once it has ended."""
        calls: dict[object, Any] | None = record.endings
        return None if calls is None else calls.setdefault(self, Visit(self._lock))

    def _at(self, key: Key) -> Line:
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line()
            if len(self._lines) > _MOST_LINES:
                self._lines.popitem(last=False)
        self._lines.move_to_end(key)
        return line


def _steps(frame: FrameType, wanted: FrameType | None) -> int | None:
    """How many frames further out than `frame` the wanted one is."""
    if wanted is None:
        return None
    steps = 0
    while frame is not wanted:
        assert frame.f_back is not None
        frame, steps = frame.f_back, steps + 1
    return steps


def _renew_locks() -> None:
    """In a forked child, where another thread of the parent may have held them."""
    for lines in _all:
        lines.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
