"""What is run in a worker process of anyio's: one call after the other, which comes and goes as bytes.

Anyio's worker loads what it is sent, and dumps what it sends, outside of anything that could be caught; and
its standard input and output are its wire. So it sees nothing but bytes and numbers here, and a function sees
other files. `_to_process` is the server's side.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
import select
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any

from asyncguard.offloading import _main_module
from asyncguard.offloading._address import resolve
from asyncguard.offloading._failure import seal
from asyncguard.offloading._main_module import MainModule
from asyncguard.offloading._payload import Body, Packed, PackError, UnpackError, pack
from asyncguard.offloading._relay import Relay
from asyncguard.offloading._summons import Summons, read
from asyncguard.offloading._wire import Kind

__all__ = ["LEFT", "Answer", "Portable", "Settings", "call", "portable", "prepare", "rss"]

Portable = tuple[bytes, int, list[int]]
"""A `Packed` in one piece: all of its bytes, the size of the pickle, and those of its buffers."""

Settings = tuple[int, int, list[str], MainModule | None]
"""How much nicer it is to be, the level of its root logger, `sys.argv`, and the server's main module."""

Answer = tuple[int, Portable, list[Portable]]
"""A `Kind`, its body, and what was logged."""

LEFT = "exit"
"""The reason that is given if the function called `sys.exit`; the text is the exit code."""

_MOST_RECORDS = 10_000

_calls = 0
_relay: Relay | None = None


class _Outbox:
    """Stands for the wire of a worker of our own: keeps what is logged, the latest records of them."""

    def __init__(self) -> None:
        self._records: deque[Portable] = deque(maxlen=_MOST_RECORDS)

    def send(self, kind: Kind, call: int, packed: Packed) -> None:
        self._records.append(portable(packed))

    def empty(self) -> list[Portable]:
        """What was logged since the last time."""
        records = []
        with contextlib.suppress(IndexError):  # threads of a function may log meanwhile
            while True:
                records.append(self._records.popleft())
        return records


_outbox = _Outbox()


def portable(packed: Packed) -> Portable:
    """What a `Body` is made of again."""
    return b"".join(packed.pieces()), packed.pickled, [buffer.nbytes for buffer in packed.buffers]


def prepare(settings: Settings, modules: list[str]) -> tuple[int, int, int]:
    """Make ready for a call.

    Args:
        settings: What this worker is to be like.
        modules: What it imports now. One that cannot be imported does no harm.

    Returns:
        The id of this process, how many calls it has had, and how many bytes of memory it has; 0 where that
        is not known.
    """
    global _relay
    if _relay is None:
        nice, log_level, argv, main = settings
        sys.argv[:] = argv
        if "__mp_main__" not in sys.modules:  # anyio has found no file of it
            _main_module.install(main)
        # What it means that somebody presses Ctrl-C is left to the server.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _do_nothing)
        with open(os.devnull, "r+b", buffering=0) as null:
            os.dup2(null.fileno(), 2)  # it is a pipe that nobody reads
        if hasattr(os, "nice"):
            with contextlib.suppress(OSError):
                os.nice(nice)
        _die_with_server()
        outlet: Any = _outbox
        _relay = Relay(outlet, log_level)
        _relay.install()
        with _other_files():
            for module in modules:
                with contextlib.suppress(BaseException):
                    importlib.import_module(module)
    return os.getpid(), _calls, rss()


def call(data: bytes, pickled: int, sizes: list[int]) -> Answer:
    """Make a call.

    Args:
        data: What `_summons.pack_call` has made of it.
        pickled: How many bytes of that are the pickle.
        sizes: Those of the buffers.
    """
    global _calls
    assert _relay is not None
    _calls += 1
    _relay.install()
    with _other_files():
        kind, packed = _outcome(Body(data, pickled, sizes))
        answer = portable(packed)
    return int(kind), answer, _outbox.empty()


def _outcome(body: Body) -> tuple[Kind, Packed]:
    try:
        try:
            summons = read(body)
        except (UnpackError, LookupError) as error:
            return _fault("argument", str(error))
        return Kind.RESULT, pack([("the result", _result(summons))])
    except _NotFound as error:
        return _fault("function", str(error))
    except PackError as error:
        return _fault("result", str(error))
    except SystemExit as leaving:
        return _fault(LEFT, str(_exit_code(leaving.code)))
    except BaseException as error:
        sealed = seal(error)
        # As in `_worker`: lest it is kept by what holds on to itself.
        traceback.clear_frames(error.__traceback__)
        error.with_traceback(None)
        return Kind.ERROR, sealed


class _NotFound(Exception):
    """There is no such function."""


def _result(summons: Summons) -> object:
    assert _relay is not None
    try:
        if summons.address.module == "__main__":
            _main_module.load()
        else:
            importlib.import_module(summons.address.module)
    except SystemExit as leaving:
        raise _NotFound(
            f"{summons.address.module} ends the process with sys.exit({leaving.code!r}) when it is imported: "
            "put what starts the program under `if __name__ == '__main__':`"
        ) from None
    finally:
        _relay.install()  # a module may have configured logging
    try:
        function = resolve(summons.address)
    except LookupError as error:
        raise _NotFound(str(error)) from None
    context = contextvars.copy_context()
    for variable, value in summons.context:
        context.run(variable.set, value)
    return context.run(function, *summons.args, **summons.kwargs)


def _fault(reason: str, text: str) -> tuple[Kind, Packed]:
    return Kind.FAULT, pack([("the reason", (reason, text))])


def _exit_code(code: object) -> int:
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


@contextlib.contextmanager
def _other_files() -> Iterator[None]:
    """Standard input and output that are not the wire, for programs that the function starts as well."""
    kept = os.dup(0), os.dup(1)
    with open(os.devnull, "r+b", buffering=0) as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    try:
        yield
    finally:
        try:
            for descriptor, wire in enumerate(kept):
                os.dup2(wire, descriptor, inheritable=False)
                os.close(wire)
        except OSError:  # the function has closed what was not its own: nothing can be answered any more
            os._exit(1)


def _die_with_server() -> None:
    """End this process when the server has ended, even in the middle of a call that lets other threads run.

    Where there is no `poll`, the process ends after its call.
    """
    if not hasattr(select, "poll"):
        return

    def wait(answers: int) -> None:
        poll = select.poll()
        poll.register(answers, 0)  # nobody reads them any more: that is an error, which is always told
        while not poll.poll():
            pass
        os._exit(1)

    threading.Thread(target=wait, args=(os.dup(1),), name="asyncguard-lifeline", daemon=True).start()


def _do_nothing(number: int, frame: object) -> None:
    pass


def rss() -> int:
    """How many bytes of memory this process has; 0 where that is not known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError, IndexError):
        return 0
