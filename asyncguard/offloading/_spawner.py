"""The parent's side of the zygote: the process that worker processes are forked from.

It is started by exec, so that nothing of the server is inherited, and it forks, so that a new worker has what
the zygote has imported already.
"""

from __future__ import annotations

import logging
import os
import subprocess

from asyncguard.offloading._child import Child, Nursery, wait_for
from asyncguard.offloading._control import Surroundings, WorkerSettings
from asyncguard.offloading._loops import Loop
from asyncguard.offloading._process import WorkerProcess

__all__ = ["Spawner"]


class Spawner:
    """Starts worker processes as copies of a zygote.

    Args:
        loop: The loop of the pool.
        nursery: Who hears of them.
        nice: The niceness of the workers.
    """

    def __init__(self, loop: Loop, nursery: Nursery, *, nice: int) -> None:
        self._loop = loop
        self._nursery = nursery
        self._nice = nice
        self._zygote: Child | None = None
        self._retired: list[Child] = []
        self._ended: list[subprocess.Popen[bytes]] = []
        self._modules: list[str] = []
        self._unfit: set[str] = set()
        self._asked: dict[int, WorkerProcess] = {}

    def preload(self, module: str) -> None:
        """Have it imported before the next worker is forked, if that is harmless."""
        if module != "__main__" and module not in self._modules and module not in self._unfit:
            self._modules.append(module)
            if self._zygote is not None:
                self._zygote.send(("preload", [module]))

    def start(self, process: WorkerProcess) -> None:
        """Start a worker; the nursery is told what has become of it."""
        if self._zygote is None:
            surroundings = Surroundings.of_this_process()
            try:
                self._zygote = Child(self._loop, self)
            except OSError as error:
                reason = str(error)
                self._loop.call_later(0, lambda: self._nursery.on_not_started(process.token, reason))
                return
            self._zygote.send(surroundings)
            if self._modules:
                self._zygote.send(("preload", self._modules))
        self._asked[process.token] = process
        settings = WorkerSettings(self._nice, logging.getLogger().getEffectiveLevel())
        self._zygote.send(("fork", process.token, settings), process.descriptors)

    def on_message(self, zygote: Child, message: object, descriptors: list[int]) -> None:
        """A zygote has said something."""
        match message:
            case ("forked", int(token), int(pid)):
                self._asked.pop(token, None)
                self._nursery.on_started(token, pid, descriptors.pop() if descriptors else None)
            case ("failed", int(token), str(reason)) if zygote is self._zygote:
                self._asked.pop(token, None)
                self._nursery.on_not_started(token, reason)
            case ("exit", int(pid), int(code)):
                self._nursery.on_exit(pid, code)
            case ("spoiled", str(module)):
                # It is left to its children's ends; another one forks from now on.
                self._unfit.add(module)
                self._retired.append(zygote)
                self._ask_again()
        for descriptor in descriptors:
            os.close(descriptor)

    def on_lost(self, zygote: Child) -> None:
        """The zygote has ended by itself."""
        zygote.close()
        self._ended.append(zygote.process)
        if zygote is not self._zygote:
            if zygote in self._retired:
                self._retired.remove(zygote)
        elif self._modules:  # it may have been an import: workers do that themselves from now on
            self._unfit.update(self._modules)
            self._ask_again()
        else:
            self._zygote = None
            asked, self._asked = self._asked, {}
            for token in asked:
                self._nursery.on_not_started(token, "the process that forks workers has ended")

    def _ask_again(self) -> None:
        self._zygote = None
        self._modules = [module for module in self._modules if module not in self._unfit]
        asked, self._asked = self._asked, {}
        for process in asked.values():
            if not process.has_hung_up:
                self.start(process)

    async def aclose(self) -> None:
        """End the zygote, and wait for it."""
        self.close()
        for process in self._ended:
            await wait_for(process)
        self._ended.clear()

    def close(self) -> None:
        """End the zygote, without waiting for it."""
        for zygote in self._all():
            zygote.close()
            self._ended.append(zygote.process)

    def _all(self) -> list[Child]:
        zygotes = [*self._retired] if self._zygote is None else [*self._retired, self._zygote]
        self._retired.clear()
        self._zygote = None
        return zygotes

    def abandon(self) -> None:
        """The loop is gone: end the zygote without it."""
        for zygote in self._all():
            zygote.abandon()

    def disown(self) -> None:
        """In a forked child: the zygote is the parent's."""
        for zygote in self._all():
            zygote.disown()
