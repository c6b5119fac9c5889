"""The constructors of clients, watched while somebody wants to know of what requests build.

Each known class of the libraries that are imported has its ``__init__`` wrapped: the class itself stays what
it is, so that it is imported, subclassed, pickled and looked into as ever. Nothing is wrapped while nobody
holds on to it, and outside requests a wrapper does nothing but call what it wraps. What is made of the builds
is not decided here: they are told to what the request's record has as `builds`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from asyncguard import _clock
from asyncguard._request import current_request
from asyncguard.clients._kinds import KINDS, Kind

__all__ = ["Hold", "look"]

logger = logging.getLogger("asyncguard.clients")

Init = Callable[..., None]


class Hold:
    """Keeps the constructors watched until it is released, or gone."""

    def __init__(self) -> None:
        with _lock:
            _holds.add(id(self))
            look()
        self._finalizer = weakref.finalize(self, _let_go, id(self))
        self._finalizer.atexit = False

    def release(self) -> None:
        """Hold no longer; whoever is the last has the constructors put back."""
        self._finalizer()


def look() -> None:
    """Watch the classes of what has been imported meanwhile, if they are to be watched."""
    global modules_seen
    with _lock:
        if not _holds:
            return
        # Counted first: what is imported meanwhile is looked at the next time.
        count, importing = len(sys.modules), False
        for kind in KINDS:
            if (module := sys.modules.get(kind.module)) is not None:
                contents = _contents(module)
                if kind.name in contents:
                    _watch(contents[kind.name], kind)
                importing = importing or getattr(contents.get("__spec__"), "_initializing", False)
        modules_seen = -1 if importing else count


modules_seen: int = 0
"""How many modules had been imported at the last look; others may have come if it is another number now."""

# Reentrant: a hold may be collected, and so let go, in the middle of any allocation.
_lock = threading.RLock()
_holds: set[int] = set()
_wrappers: dict[type, Init] = {}


class _Here(threading.local):
    """What this thread does."""

    constructing = False


_here = _Here()


def _let_go(hold: int) -> None:
    global modules_seen
    with _lock:
        _holds.discard(hold)
        if _holds:
            return
        modules_seen = 0
        for owner, wrapper in [*_wrappers.items()]:
            # Where another library has wrapped ours since, it stays, and does nothing: to put ours back
            # would take theirs away.
            if vars(owner).get("__init__") is wrapper:
                owner.__init__ = wrapper.__wrapped__  # type: ignore[misc]
                del _wrappers[owner]


def _contents(module: object) -> dict[str, Any]:
    """What is in a module, read past it: some import what they are asked for, or are no modules."""
    try:
        contents: dict[str, Any] = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return contents


def _watch(found: object, kind: Kind) -> None:
    owner = _owner(found, kind.module.partition(".")[0])
    if owner is None:
        return
    original = vars(owner)["__init__"]
    if (wrapper := _wrappers.get(owner)) is not None and wrapper in _unwrapped(original):
        return
    wrapper = _wrapper(original, kind)
    try:
        owner.__init__ = wrapper  # type: ignore[misc]
    except (AttributeError, TypeError):  # not written in Python
        return
    _wrappers[owner] = wrapper


def _owner(found: object, library: str) -> type | None:
    """The library's own class that has the constructor: others put subclasses of theirs in its place."""
    for owner in found.__mro__ if isinstance(found, type) else ():
        if owner.__module__.partition(".")[0] == library and "__init__" in vars(owner):
            return owner
    return None


def _unwrapped(function: Any) -> Iterator[object]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _wrapper(original: Init, kind: Kind) -> Init:
    position = _position(original, kind.part)

    @functools.wraps(original)
    def __init__(self: object, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - as tracebacks have it
        record = current_request.get()
        # What a constructor builds for itself is part of what it makes.
        if record is None or record.builds is None or _here.constructing:
            return original(self, *args, **kwargs)
        part = args[position] if position < len(args) else kwargs.get(kind.part)
        build = None
        try:
            build = record.builds.begin(record, kind, self, part, sys._getframe(1))
        except Exception:
            logger.debug("a client that is built could not be looked at", exc_info=True)
        if build is None:
            return original(self, *args, **kwargs)
        began = _clock.monotonic()
        _here.constructing = True
        try:
            original(self, *args, **kwargs)
        except BaseException:
            build.fail()
            raise
        finally:
            _here.constructing = False
        with contextlib.suppress(Exception):
            build.end(_clock.monotonic() - began)
        return None

    return __init__


def _position(original: Init, part: str) -> int:
    """Where among the positional arguments `part` is; far out, if it can be given by name only."""
    with contextlib.suppress(TypeError, ValueError):
        for position, parameter in enumerate(inspect.signature(original).parameters.values()):
            if parameter.name == part and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                return position - 1  # `self` comes first
    return sys.maxsize


def _renew_lock() -> None:
    """In a forked child, where another thread of the parent may have held it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
