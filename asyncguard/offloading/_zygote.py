"""The process that workers are forked from, or that becomes one itself.

It is started by exec, so that it has nothing of the server: no socket, no thread, no lock that another thread
held. It imports what workers will need, so that those are ready soon. It runs nothing else, unless it is told
to be a worker from then on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Iterable
from typing import NamedTuple

from asyncguard.offloading import _lifeline, _main_module
from asyncguard.offloading._control import Surroundings, WorkerSettings, receive_message, send_message
from asyncguard.offloading._descriptors import open_descriptors
from asyncguard.offloading._worker import ignore_signals, name_process, serve

__all__ = ["main"]

_DESCRIPTORS_OF_A_WORKER = 4
_NO_DESCRIPTORS = "it was not given its descriptors"


def main(control: int, lifeline: int) -> None:
    """Be the zygote. Returns, in a zygote only, when the server has hung up.

    Args:
        control: The descriptor of a socket of type `SOCK_SEQPACKET`: see `_control`.
        lifeline: What ends this process when the server has ended.
    """
    os.set_inheritable(control, False)
    os.set_inheritable(lifeline, False)
    name_process("offload-zygote")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started us may have blocked some
    # The end of the socket tells it the same, but not in the middle of an import.
    _lifeline.arm(lifeline, may_use_thread=False)
    birth = Zygote(socket.socket(fileno=control)).run()
    if birth is not None:
        serve(*birth)


class Birth(NamedTuple):
    """What a new worker begins with."""

    wire: socket.socket
    lifeline: int
    page: int
    trace: int
    settings: WorkerSettings


class Zygote:
    """The loop over what the server asks for.

    Args:
        control: Where it asks.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        control.setblocking(True)  # whatever `socket.setdefaulttimeout` says in the server
        self._children: set[int] = set()
        self._left_out: set[str] = set()
        self._spoiled_by: str | None = None
        self._wakeup, self._alarm = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._alarm, False)
        self._watch_signals()
        # What modules log when they are imported, they have logged in the server. A root logger that has a
        # handler is left alone by `logging.basicConfig`.
        logging.getLogger().addHandler(logging.NullHandler())
        logging.captureWarnings(True)

    def run(self) -> Birth | None:
        """Do what is asked. Returns, in what is to be a worker, what that begins with; else `None`."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                ready = {descriptor for descriptor, _ in poll.poll()}
                if self._wakeup in ready:
                    self._drain()
                    self._reap()
                if self._control.fileno() in ready:
                    birth = self._obey(*receive_message(self._control))
                    if birth is not None:
                        return birth
        if self._spoiled_by is not None:  # its threads may not end
            os._exit(0)
        return None

    def _watch_signals(self) -> None:
        ignore_signals()
        signal.signal(signal.SIGCHLD, _do_nothing)
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wakeup, 4096):
                pass

    def _reap(self) -> None:
        """Tell of children that have ended. Those that an imported module started are not ours."""
        for child in [*self._children]:
            try:
                pid, status = os.waitpid(child, os.WNOHANG)
            except ChildProcessError:  # a thread that a module has started was quicker
                pid, status = child, 0
            if pid:
                self._children.discard(child)
                send_message(self._control, ("exit", pid, os.waitstatus_to_exitcode(status)))

    def _obey(self, message: object, descriptors: list[int]) -> Birth | None:
        match message:
            case ("fork", int(token), WorkerSettings() as settings):
                return self._fork(token, settings, descriptors)
            case ("become", int(token), WorkerSettings() as settings):
                return self._become(token, settings, descriptors)
            case Surroundings():
                _move_to(message)
            case ("preload", [*modules]):
                for module in modules:
                    self._preload(str(module))
                self._watch_signals()  # a module may have its own idea of them
                self._reap()
        _close(descriptors)
        return None

    # -- workers -----------------------------------------------------------------------------------

    def _fork(self, token: int, settings: WorkerSettings, descriptors: list[int]) -> Birth | None:
        pid, reason = -1, ""
        if self._spoiled_by is not None:
            reason = f"the import of {self._spoiled_by} left threads or open descriptors behind"
        elif len(descriptors) != _DESCRIPTORS_OF_A_WORKER:
            reason = _NO_DESCRIPTORS
        else:
            _flush()  # what is in the buffers would be written twice
            gc.freeze()  # lest the collector of each child touches, and so copies, all pages
            try:
                with warnings.catch_warnings():
                    # From 3.12 on it warns of threads: here, those of C libraries, which know of forks.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
            except OSError as error:
                reason = str(error)
        if pid == 0:
            return self._be_born(settings, descriptors)
        _close(descriptors)
        if pid < 0:
            send_message(self._control, ("failed", token, reason))
        else:
            self._children.add(pid)
            self._tell_of(token, pid)
        return None

    def _become(self, token: int, settings: WorkerSettings, descriptors: list[int]) -> Birth | None:
        """Be a worker, since what this one will import does not bear being copied."""
        if len(descriptors) != _DESCRIPTORS_OF_A_WORKER:
            _close(descriptors)
            send_message(self._control, ("failed", token, _NO_DESCRIPTORS))
            return None
        self._tell_of(token, os.getpid())
        return self._be_born(settings, descriptors)

    def _tell_of(self, token: int, pid: int) -> None:
        # Before it is waited for: until then nobody else can have its number.
        try:
            named = [os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else []
        except OSError:
            named = []
        try:
            send_message(self._control, ("forked", token, pid), named)
        finally:
            _close(named)

    def _be_born(self, settings: WorkerSettings, descriptors: list[int]) -> Birth:
        signal.set_wakeup_fd(-1)
        self._control.close()
        _close([self._wakeup, self._alarm])
        wire, lifeline, page, trace = descriptors
        return Birth(socket.socket(fileno=wire), lifeline, page, trace, settings)

    # -- imports -----------------------------------------------------------------------------------

    def _preload(self, module: str) -> None:
        """Import a module, if nothing has been spoiled yet. Whatever it does wrong it will do in a worker."""
        if self._spoiled_by is not None or module in self._left_out:
            return
        before = open_descriptors()
        try:
            if module == "__main__":
                _main_module.load()
            else:
                importlib.import_module(module)
        except BaseException:
            self._left_out.add(module)
        # After a fork a thread would not be there, though its module believes so; and a connection would be
        # shared.
        if len(sys._current_frames()) > 1 or not open_descriptors() <= before:
            self._spoiled_by = module
            send_message(self._control, ("spoiled", module))


def _move_to(surroundings: Surroundings) -> None:
    sys.path[:] = surroundings.path
    sys.argv[:] = surroundings.argv
    if surroundings.cwd is not None:
        with contextlib.suppress(OSError):
            os.chdir(surroundings.cwd)
    _main_module.install(surroundings.main)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _do_nothing(number: int, frame: object) -> None:
    pass
