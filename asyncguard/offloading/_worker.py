"""What a worker process does: one call after the other, in its main thread.

How it came to be is `_zygote`'s business. Whatever a function does, the worker answers and goes on, or it
ends; of what, the server will see.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import faulthandler
import importlib
import mmap
import os
import signal
import socket
import sys
import traceback
from array import array
from collections.abc import Callable
from threading import get_ident
from typing import Any, NoReturn

from asyncguard.offloading import _lifeline, _main_module, _progress
from asyncguard.offloading._address import Address, resolve
from asyncguard.offloading._control import RECEIVE_FLAGS, TRUNCATED, WorkerSettings, passed_descriptors
from asyncguard.offloading._descriptors import close_others
from asyncguard.offloading._failure import seal
from asyncguard.offloading._interrupt import Interrupts
from asyncguard.offloading._outlet import Outlet
from asyncguard.offloading._payload import (
    Body,
    Packed,
    PackError,
    UnpackError,
    are_plain,
    explain,
    pack,
    plain,
)
from asyncguard.offloading._relay import Relay
from asyncguard.offloading._summons import Summons, read
from asyncguard.offloading._wire import Decoder, Frame, Kind, WireError

__all__ = ["ignore_signals", "name_process", "serve"]

_CHUNK = 1 << 16
_ROOM = socket.CMSG_SPACE(8 * array("i").itemsize)
_PAGE_SIZE = 4096
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Outcome = tuple[Kind, Packed]


def serve(wire: socket.socket, lifeline: int, page: int, trace: int, settings: WorkerSettings) -> NoReturn:
    """Be a worker from now on.

    Args:
        wire: Where calls come from.
        lifeline: What ends this process when the server has ended.
        page: A file of one page in which the server writes what call is to stop.
        trace: A file for tracebacks: on SIGUSR2, and when the process crashes.
        settings: What is particular about this worker.
    """
    wire.setblocking(True)  # whatever `socket.setdefaulttimeout` says, in the server or here
    name_process("offload-worker")
    _lifeline.arm(lifeline)
    close_others({wire.fileno(), lifeline, page, trace})
    atexit._clear()  # what the zygote has imported would tidy up what is not ours alone
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ignore_signals()
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR2, trace, all_threads=False, chain=False)
    with contextlib.suppress(OSError):
        os.nice(settings.nice)
    _reseed()
    mapped = mmap.mmap(page, _PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(page)
    interrupts = Interrupts(mapped)
    interrupts.install()
    outlet = Outlet(wire, interrupts)
    relay = Relay(outlet, settings.log_level)
    relay.install()
    worker = Worker(wire, interrupts, outlet, relay)
    worker.watch_forks()
    _progress.report_to(worker.report)
    try:
        for module in settings.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        worker.run()
    except SystemExit as leaving:
        code = _exit_code(leaving.code)
    except (ConnectionError, WireError):  # the server is gone, or will be told by our end
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    _leave(code)


def name_process(name: str) -> None:
    """Tell whoever looks at the processes what this one is, where the system has a place for it.

    Args:
        name: No more than 15 characters.
    """
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(name)


def ignore_signals() -> None:
    """Leave it to the server what a Ctrl-C in the terminal means, or a SIGTERM for all its group.

    By a handler: what is ignored outright would be ignored in the programs that a function starts, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _do_nothing)


class Worker:
    """The loop over the calls.

    Args:
        wire: Where they come from.
        interrupts: What stops them.
        outlet: Where the answers go.
        relay: Where log records go.
    """

    def __init__(self, wire: socket.socket, interrupts: Interrupts, outlet: Outlet, relay: Relay) -> None:
        self._wire = wire
        self._interrupts = interrupts
        self._outlet = outlet
        self._relay = relay
        self._decoder = Decoder()
        self._functions: dict[Address, Callable[..., Any]] = {}
        self._masks: dict[int, set[signal.Signals | int]] = {}
        self._is_forked = False
        self._has_forked = False

    def run(self) -> None:
        """Answer calls until the server hangs up.

        Raises:
            SystemExit: If a function does.
            ConnectionError: If the server is gone.
            WireError: If what it sends makes no sense.
        """
        self._relay.install()
        self._outlet.send(Kind.READY, 0, pack(()))
        while self._answer_all(self._receive()):
            pass

    def report(self, fraction: float) -> None:
        """What `report_progress` does here."""
        with contextlib.suppress(ConnectionError):
            self._outlet.send(Kind.PROGRESS, self._interrupts.running, pack([("the progress", fraction)]))

    def watch_forks(self) -> None:
        """See to it that a child that a function forks takes nothing of this for its own."""
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._unblock_signals, after_in_child=self._disown
        )

    def _disown(self) -> None:
        self._is_forked = True
        self._outlet.disown()
        self._relay.remove()
        _progress.report_to(None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        self._unblock_signals()

    def _before_fork(self) -> None:
        self._has_forked = True
        # Whoever forks may send the child one at once, before that has its own handlers.
        self._masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def _unblock_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.pop(get_ident(), ()))

    def _receive(self) -> list[Frame] | None:
        """The calls that have come; `None` if the server has hung up."""
        data, ancillary, flags, _ = self._wire.recvmsg(_CHUNK, _ROOM, RECEIVE_FLAGS)
        frames = self._decoder.feed(data, passed_descriptors(ancillary) if ancillary else ())
        return frames if data and not flags & TRUNCATED else None

    def _answer_all(self, frames: list[Frame] | None) -> bool:
        if frames is None:
            return False
        frames.reverse()
        while frames:
            frame = frames.pop()
            if frame.kind is not Kind.CALL:
                raise WireError(f"a worker is sent no {frame.kind.name}")
            call, body = frame.call, frame.body
            del frame
            self._has_forked = False
            outcome = self._outcome(call, body)
            # A child that the function has forked may go on reading.
            self._send(call, outcome, is_free=not (body.is_held() or self._has_forked))
            del body, outcome
            _flush()
        return True

    def _send(self, call: int, outcome: Outcome, *, is_free: bool) -> None:
        if self._is_forked:
            raise SystemExit  # the child has done what the function forked it for
        try:
            self._outlet.send(outcome[0], call, outcome[1], is_free=is_free)
        except ConnectionError:
            raise
        except (OSError, MemoryError) as error:
            text = f"the result cannot be sent: {explain(error)}"
            self._outlet.send(*_fault_frame(call, "result", text))

    # Nothing of a call is kept beyond this: no argument, no result, no exception, no traceback.

    def _outcome(self, call: int, body: Body) -> Outcome:
        try:
            try:
                summons = read(body)
            except (UnpackError, LookupError) as error:
                return _fault("argument", str(error))
            return self._call(call, self._find(summons.address), summons)
        except _NotFound as error:
            return _fault("function", str(error))
        except PackError as error:
            return _fault("result", str(error))
        except SystemExit:
            raise
        except BaseException as error:
            if self._is_forked:
                raise
            sealed = seal(error)
            # Exceptions that hold on to themselves would hold on to all that their frames do, ours included.
            traceback.clear_frames(error.__traceback__)
            error.with_traceback(None)
            return Kind.ERROR, sealed

    def _find(self, address: Address) -> Callable[..., Any]:
        function = self._functions.get(address)
        if function is None:
            try:
                if address.module == "__main__":
                    _main_module.load()
                else:
                    importlib.import_module(address.module)
            except SystemExit as leaving:
                raise _NotFound(
                    f"{address.module} ends the process with sys.exit({leaving.code!r}) when it is "
                    "imported: put what starts the program under `if __name__ == '__main__':`"
                ) from None
            finally:
                self._relay.install()
            try:
                function = resolve(address)
            except LookupError as error:
                raise _NotFound(str(error)) from None
            self._functions[address] = function
        return function

    def _call(self, call: int, function: Callable[..., Any], summons: Summons) -> Outcome:
        context = contextvars.copy_context()
        for variable, value in summons.context:
            context.run(variable.set, value)
        # Nothing before this is interrupted, least of all an import, and nothing after it: see `Interrupts`.
        try:
            self._interrupts.begin(call)
            result = context.run(function, *summons.args, **summons.kwargs)
            packed = plain(result) if are_plain((result,)) else pack([("the result", result)])
            return Kind.RESULT, packed
        finally:
            self._interrupts.end()


class _NotFound(Exception):
    """There is no such function."""


def _fault(reason: str, text: str) -> Outcome:
    return Kind.FAULT, pack([("the reason", (reason, text))])


def _fault_frame(call: int, reason: str, text: str) -> tuple[Kind, int, Packed]:
    kind, packed = _fault(reason, text)
    return kind, call, packed


def _do_nothing(number: int, frame: object) -> None:
    pass


def _reseed() -> None:
    """Lest all workers draw the same numbers: Python sees to it for `random`, and NumPy does not."""
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        with contextlib.suppress(Exception):
            numpy_random.seed()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 (after each call: `suppress` costs more than all the rest)
            stream.flush()
        except Exception:  # noqa: S110
            pass


def _exit_code(code: object) -> int:
    """What Python makes of the argument of `sys.exit`."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{code}\n")
    return 1


def _leave(code: int) -> NoReturn:
    """End the process, but not as Python does: threads of a function may run on for ever."""
    try:
        _end_children()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    _flush()
    os._exit(code)


def _end_children() -> None:
    """Those of an executor, say, that nobody shut down: `multiprocessing` would wait for them, for ever."""
    processes: Any = sys.modules.get("multiprocessing.process")
    for child in processes.active_children() if processes is not None else ():
        if child._parent_pid == os.getpid():
            child.terminate()
