"""A dispatcher on a loop that a test turns by hand, with workers that are played by the test.

The sockets and files between the two are real; there is no process, no signal and no waiting.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest

from asyncguard import _clock
from asyncguard.offloading._backend import StartMethod
from asyncguard.offloading._call import CallOptions
from asyncguard.offloading._control import passed_descriptors
from asyncguard.offloading._dispatcher import Dispatcher
from asyncguard.offloading._job import Job
from asyncguard.offloading._loops import Channel
from asyncguard.offloading._payload import pack
from asyncguard.offloading._process import WorkerProcess
from asyncguard.offloading._tally import Tally
from asyncguard.offloading._wire import Decoder, Frame, Kind, encode
from tests.conftest import TurnedClock

NO_PROCESS = 1 << 22
"""Process ids begin below this on Linux."""


class Timer:
    """Something that is to be called."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.is_over = False

    def cancel(self) -> None:
        self.is_over = True


class FakeOutcome:
    """A result to come, which a test looks at."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.error: BaseException | None = None
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError

    def done(self) -> bool:
        return self.is_cancelled or self.frame is not None or self.error is not None

    def set_result(self, result: Any, /) -> None:
        assert not self.done()
        self.frame = result

    def set_exception(self, error: BaseException, /) -> None:
        assert not self.done()
        self.error = error


class FakeLoop:
    """A loop that does nothing but when it is told."""

    def __init__(self, clock: TurnedClock) -> None:
        self.clock = clock
        self._timers: list[Timer] = []
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}

    def is_here(self) -> bool:
        return True

    def outcome(self) -> FakeOutcome:
        return FakeOutcome()

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self.clock() + delay, call)
        self._timers.append(timer)
        return timer

    def add_reader(self, channel: Channel, call: Callable[[], None]) -> None:
        self._readers[channel.fileno()] = call

    def add_writer(self, channel: Channel, call: Callable[[], None]) -> None:
        self._writers[channel.fileno()] = call

    def remove_writer(self, channel: Channel) -> None:
        self._writers.pop(channel.fileno(), None)

    def close(self, channel: Channel) -> None:
        self._readers.pop(channel.fileno(), None)
        self._writers.pop(channel.fileno(), None)
        channel.close()

    # -- what a test tells it ----------------------------------------------------------------------

    @property
    def timers(self) -> list[Timer]:
        """Those that are still to come, the next one first."""
        return sorted((timer for timer in self._timers if not timer.is_over), key=lambda timer: timer.at)

    @property
    def watched(self) -> int:
        """How many sockets it watches."""
        return len(self._readers.keys() | self._writers.keys())

    def poll(self) -> None:
        """Call what has something to do, until nothing has."""
        while True:
            can_read, can_write, _ = select.select([*self._readers], [*self._writers], [], 0)
            if not can_read and not can_write:
                return
            for watched, ready in ((self._readers, can_read), (self._writers, can_write)):
                for number in ready:
                    if number in watched:  # the call before may have closed it
                        watched[number]()

    def turn(self, seconds: float) -> None:
        """Let time pass."""
        until = self.clock() + seconds
        while (timers := self.timers) and timers[0].at <= until:
            self.clock.now = max(self.clock.now, timers[0].at)
            timers[0].is_over = True
            timers[0].call()
            self.poll()
        self.clock.now = until
        self.poll()


class FakeWorker:
    """The other end of a worker's socket, and what has been done to the worker."""

    def __init__(self, stage: Stage, process: WorkerProcess) -> None:
        self.token = process.token
        self.pid = NO_PROCESS + process.token
        self.signals: list[int] = []  # one that asks again and again is there once
        self.repeats = 0
        self.has_ended = False
        self.asked: list[int] = []
        """The numbers of the calls that it was given."""
        self.doomed_at: int | None = None
        """How many these were when it was killed, or ended."""
        self._stage = stage
        wire, lifeline, page, trace = map(os.dup, process.descriptors)
        os.close(lifeline)
        self._wire = socket.socket(fileno=wire)
        self._wire.setblocking(False)
        self._page, self._trace = page, trace
        self._decoder = Decoder()

    # -- its start ---------------------------------------------------------------------------------

    def start(self) -> None:
        """The dispatcher is told that it runs."""
        self.pidfd = os.open(os.devnull, os.O_RDONLY)
        self._stage.pidfds[self.pidfd] = self
        self._stage.dispatcher.on_started(self.token, self.pid, self.pidfd)

    def get_ready(self) -> FakeWorker:
        self.start()
        self.send(Kind.READY)
        return self

    # -- what it does ------------------------------------------------------------------------------

    def send(self, kind: Kind, call: int = 0, *values: object) -> None:
        """Send a frame, if there is still somebody to send it to."""
        pieces, _ = encode(kind, call, pack([("it", value) for value in values]))
        try:
            self._wire.send(b"".join(pieces))
        except OSError:
            return
        self._stage.loop.poll()

    def answer(self, call: int | None = None, value: object = None) -> None:
        """Answer a call, by default the last one that came."""
        if call is None:
            call = self.calls[-1]
        self.send(Kind.RESULT, call, value)

    def garble(self) -> None:
        """Send what makes no sense."""
        self._wire.send(b"\0" * 100)
        self._stage.loop.poll()

    def hang_up(self) -> None:
        """Close its socket."""
        self.note()
        self._wire.close()
        self._stage.loop.poll()

    def exit(self, code: int) -> None:
        """The dispatcher is told that it has ended. What its socket says comes in its own time."""
        self.note()
        self.doom()
        self.has_ended = True
        self._stage.dispatcher.on_exit(self.pid, code)
        self._stage.loop.poll()

    def end(self, code: int = 0) -> None:
        """End as a process does."""
        self.hang_up()
        self.exit(code)

    def write_stack(self, function: str) -> None:
        """Write down what it is doing, as it is asked to by SIGUSR2."""
        stack = f'Stack (most recent call first):\n  File "app.py", line 1 in {function}\n'
        os.write(self._trace, stack.encode())

    def write_crash(self, function: str) -> None:
        """Write down what it was doing, as faulthandler does when a process dies."""
        os.write(self._trace, b"Fatal Python error: Segmentation fault\n\n")
        self.write_stack(function)

    # -- what was done to it -----------------------------------------------------------------------

    @property
    def calls(self) -> list[int]:
        """The numbers of the calls that it was given so far."""
        self.note()
        return self.asked

    @property
    def has_been_hung_up_on(self) -> bool:
        """Whether the dispatcher has closed the socket: a worker ends then."""
        self.note()
        if self._wire.fileno() < 0:
            return False
        try:
            return not self._wire.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def interrupted(self) -> int:
        """Which call is to stop, by the page."""
        return int.from_bytes(os.pread(self._page, 8, 0), sys.byteorder)

    def note(self) -> None:
        """Take in what has come."""
        while self._wire.fileno() >= 0:
            try:
                data, ancillary, _, _ = self._wire.recvmsg(1 << 16, 1024)
            except OSError:
                return
            if not data:
                return
            for kind, call, body in self._decoder.feed(data, passed_descriptors(ancillary)):
                assert kind is Kind.CALL
                body.close()
                self.asked.append(call)

    def doom(self) -> None:
        """From now on no call should be given to it."""
        if self.doomed_at is None:
            self.doomed_at = len(self.calls)

    def close(self) -> None:
        self.note()
        self._wire.close()
        self._decoder.close()
        os.close(self._page)
        os.close(self._trace)


@dataclass
class FakeLimits:
    """The options of a pool."""

    workers: int = 1
    max_queue: int = 10
    max_calls: int | None = None
    max_rss: int | None = None
    grace: float = 0.5
    nice: int = 0
    start_method: StartMethod = "forkserver"


class Stage:
    """A dispatcher, and all that it has to do with.

    Args:
        clock: What turns.
        monkeypatch: By which signals to workers go to a list.
        **limits: The options of the pool.
    """

    def __init__(self, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
        self.limits = FakeLimits(**limits)
        self.tally = Tally()
        self.loop = FakeLoop(clock)
        self.messages: list[tuple[Job | None, Frame]] = []
        self.workers: list[FakeWorker] = []
        self.pidfds: dict[int, FakeWorker] = {}
        self.strays: list[tuple[int, int]] = []
        """Signals that went to a process id, which may be anybody's by now."""
        self.dispatcher = Dispatcher(
            self.loop, self.limits, self.tally, lambda job, frame: self.messages.append((job, frame))
        )
        self.dispatcher.starter = self
        self._calls = 0
        monkeypatch.setattr(signal, "pidfd_send_signal", self._on_signal, raising=False)
        monkeypatch.setattr(os, "kill", self._on_kill)

    def start(self, process: WorkerProcess) -> None:
        """See `Starter`."""
        self.workers.append(FakeWorker(self, process))

    def _on_signal(self, pidfd: int, number: int) -> None:
        worker = self.pidfds[pidfd]
        if worker.has_ended:
            raise ProcessLookupError
        if number != signal.SIGKILL and worker.signals[-1:] == [number]:
            worker.repeats += 1
        else:
            worker.signals.append(number)
        if number == signal.SIGKILL:
            worker.doom()

    def _on_kill(self, pid: int, number: int) -> None:
        self.strays.append((pid, number))

    def ready(self) -> list[FakeWorker]:
        """Open the dispatcher, and have all its workers ready."""
        self.dispatcher.open()
        for worker in self.workers:
            worker.get_ready()
        return self.workers

    def job(self, seconds: float | None = None, descriptors: list[int] | None = None, **options: Any) -> Job:
        """A call that is not submitted yet."""
        self._calls += 1
        pieces, _ = encode(Kind.CALL, self._calls, pack([("it", None)]))
        return Job(
            self._calls,
            "app.function",
            self.loop.outcome(),
            [*pieces],
            descriptors or [],
            CallOptions(**options),
            seconds,
            _clock.monotonic(),
        )

    def submit(self, seconds: float | None = None, **options: Any) -> Job:
        job = self.job(seconds, **options)
        self.dispatcher.submit(job)
        return job

    def cancel(self, job: Job) -> None:
        """Whoever waits for it is cancelled."""
        outcome_of(job).is_cancelled = True
        self.dispatcher.withdraw(job)

    def counts(self) -> tuple[int, int, int, int]:
        """How many workers there are, how many are idle, how many run a call; and how many calls wait."""
        dispatcher = self.dispatcher
        return dispatcher.workers, dispatcher.idle, dispatcher.running, dispatcher.queued

    def close(self) -> None:
        self.dispatcher.close()
        for worker in self.workers:
            worker.close()


def outcome_of(job: Job) -> FakeOutcome:
    assert isinstance(job.outcome, FakeOutcome)
    return job.outcome


def value_of(job: Job) -> object:
    """What a call was answered."""
    frame = outcome_of(job).frame
    assert frame is not None
    return frame.body.unpack(("it",))[0]


def error_of(job: Job) -> str:
    """What has become of a call that failed."""
    error = outcome_of(job).error
    assert error is not None
    return f"{type(error).__name__}: {error}"
