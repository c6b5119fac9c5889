"""Starts each worker as a Python of its own, for libraries that do not bear being copied by a fork.

It costs the start of Python and all imports for each, so `_spawner` is what a pool uses unless it is told to
use this. What a worker is and does is the same.
"""

from __future__ import annotations

import logging
import os
import subprocess

from asyncguard.offloading._child import Child, Nursery, wait_for
from asyncguard.offloading._control import Surroundings, WorkerSettings
from asyncguard.offloading._loops import Channel, Loop
from asyncguard.offloading._process import WorkerProcess

__all__ = ["ExecSpawner"]

_LOOK_EVERY = 0.05
"""Seconds between two looks whether a process has ended, where the system does not tell."""


class ExecSpawner:
    """Starts worker processes by exec.

    Args:
        loop: The loop of the pool.
        nursery: Who hears of them.
        nice: The niceness of the workers.
    """

    def __init__(self, loop: Loop, nursery: Nursery, *, nice: int) -> None:
        self._loop = loop
        self._nursery = nursery
        self._nice = nice
        self._modules: list[str] = []
        self._unfit: set[str] = set()
        self._started: dict[Child, _Started] = {}
        self._ended: list[subprocess.Popen[bytes]] = []

    def preload(self, module: str) -> None:
        """Have it imported by each worker from now on before that is ready, unless it dies of it."""
        if module != "__main__" and module not in self._modules and module not in self._unfit:
            self._modules.append(module)

    def start(self, process: WorkerProcess) -> None:
        """Start a worker; the nursery is told what has become of it."""
        surroundings = Surroundings.of_this_process()
        try:
            child = Child(self._loop, self)
        except OSError as error:
            reason = str(error)
            self._loop.call_later(0, lambda: self._nursery.on_not_started(process.token, reason))
            return
        modules = tuple(self._modules)
        settings = WorkerSettings(self._nice, logging.getLogger().getEffectiveLevel(), modules)
        child.send(surroundings)
        child.send(("become", process.token, settings), process.descriptors)
        self._started[child] = started = _Started(process, modules)
        self._watch(child, started)

    # -- what becomes of them ----------------------------------------------------------------------

    def on_message(self, child: Child, message: object, descriptors: list[int]) -> None:
        """One has said something, before it became a worker."""
        started = self._started.get(child)
        match message:
            case ("forked", int(token), int(pid)) if started is not None:
                started.is_born = True
                self._nursery.on_started(token, pid, descriptors.pop() if descriptors else None)
        for descriptor in descriptors:
            os.close(descriptor)

    def on_lost(self, child: Child) -> None:
        """It has become a worker, or has ended; of that, its end will tell."""

    def _watch(self, child: Child, started: _Started) -> None:
        try:
            started.end = _PidFile(os.pidfd_open(child.process.pid))
        except (AttributeError, OSError):
            self._look_later(child)
        else:
            self._loop.add_reader(started.end, lambda: self._look(child))

    def _look_later(self, child: Child) -> None:
        def look() -> None:
            self._look(child)
            if child in self._started:
                self._look_later(child)

        self._loop.call_later(_LOOK_EVERY, look)

    def _look(self, child: Child) -> None:
        """Tell of its end, if it has ended."""
        if child not in self._started or (code := child.process.poll()) is None:
            return
        child.read()  # what it has said last
        started = self._started.pop(child)
        self._let_go(child, started)
        if not started.process.is_ready:  # it may have been an import: workers do that themselves from now on
            self._unfit.update(started.modules)
            self._modules = [module for module in self._modules if module not in self._unfit]
        if started.is_born:
            self._nursery.on_exit(child.process.pid, code)
        else:
            reason = f"its process ended with {code} before it was a worker"
            self._nursery.on_not_started(started.process.token, reason)

    def _let_go(self, child: Child, started: _Started) -> None:
        child.close()
        if started.end is not None:
            self._loop.close(started.end)

    # -- the end -----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End those that are no workers yet, and wait for all."""
        self.close()
        for process in self._ended:
            await wait_for(process)
        self._ended.clear()

    def close(self) -> None:
        """End those that are no workers yet, without waiting for any."""
        for child, started in self._started.items():
            self._let_go(child, started)
            self._ended.append(child.process)
        self._started.clear()

    def abandon(self) -> None:
        """The loop is gone: end all without it."""
        for child, started in self._started.items():
            child.abandon()
            started.disown()
        self._started.clear()

    def disown(self) -> None:
        """In a forked child: they are the parent's."""
        for child, started in self._started.items():
            child.disown()
            started.disown()
        self._started.clear()


class _Started:
    """What is known of one that was started."""

    def __init__(self, process: WorkerProcess, modules: tuple[str, ...]) -> None:
        self.process = process
        self.modules = modules
        self.is_born = False
        self.end: Channel | None = None

    def disown(self) -> None:
        if self.end is not None:
            self.end.close()


class _PidFile:
    """A descriptor of a process: what can be read of it is its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
