"""Many tasks that call a pool at random, and keep books of what comes back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from asyncguard import _clock
from asyncguard.errors import OffloadQueueFull, OffloadTimeout, PayloadError, WorkerCrashed
from asyncguard.offloading._address import address_of
from asyncguard.offloading._call import CallOptions, OnCancel
from asyncguard.offloading._pool import OffloadPool
from tests.offloading import mischief
from tests.offloading.mischief import Blob, Mischief

MEGABYTE = os.urandom(1 << 20)
ON_CANCEL: tuple[OnCancel, ...] = ("raise", "kill", "abandon")
ENDLESS = (
    mischief.sleep,
    mischief.spin,
    mischief.clean_up,
    mischief.swallow,
    mischief.count_in_c,
    mischief.translate,
)
DEADLY = (
    mischief.leave,
    mischief.leave_politely,
    mischief.kill_self,
    mischief.segfault,
    mischief.close_everything,
    mischief.close_and_return,
    mischief.ask_to_be_killed,
)


class Storm:
    """A pool under many calls.

    Args:
        pool: The pool.
        seed: What their dice begin with.

    Attributes:
        rounds: How often it has raged.
        begun: How many calls there were.
        outcomes: How many had which outcome.
        large_cancelled: How many of those that were cancelled had much to take along, which is pickled, and
            may be cancelled, before the pool knows of the call.
        by_kind: How many of which kind had which outcome.
        late_or_cancelled: How many were cancelled that may have been late as well.
        wrong: What came out otherwise than it should, in words.
    """

    def __init__(self, pool: OffloadPool, seed: object) -> None:
        self.pool = pool
        self.seed = seed
        self.rounds = 0
        self.begun = 0
        self.outcomes: Counter[str] = Counter()
        self.by_kind: Counter[tuple[str, str]] = Counter()
        self.large_cancelled = 0
        self.late_or_cancelled = 0
        self.wrong: list[str] = []

    async def rage(self, tasks: int, seconds: float) -> None:
        """Have so many tasks make calls for so long, and return when all have their outcomes."""
        until = _clock.monotonic() + seconds
        self.rounds += 1
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(self._task, random.Random(f"{self.seed} {self.rounds} {number}"), until)

    async def calm(self) -> None:
        """Wait until nothing runs, and have all workers there."""
        while self.pool.stats.running or self.pool.stats.queued or self.pool.stats.idle < self.pool.workers:
            if not self.pool.stats.running:
                async with anyio.create_task_group() as group:
                    for _ in range(self.pool.workers):
                        group.start_soon(self._call, mischief.nap, "", 0.1)
                        self.begun += 1
                        self.outcomes["result"] += 1
            await anyio.sleep(0.01)

    async def _task(self, dice: random.Random, until: float) -> None:
        kinds: list[Callable[[random.Random], Awaitable[str]]] = [
            self.innocent,
            self.failing,
            self.unsendable,
            self.late,
            self.cancelled,
            self.cancelled_by_chance,
            self.deadly,
        ]
        while _clock.monotonic() < until:
            (kind,) = dice.choices(kinds, (60, 8, 6, 4, 4, 8, 4))
            self.begun += 1
            try:
                outcome = await kind(dice)
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")
                outcome = "wrong"
            self.outcomes[outcome] += 1
            self.by_kind[kind.__name__, outcome] += 1
            if outcome == "refused" or dice.random() < 0.1:
                await anyio.sleep(dice.random() * 0.05)

    async def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await self.pool.run_call(address_of(function), function, args, {}, CallOptions(**options))

    # -- kinds of calls; each returns what came of it, or raises what should not ---------------------

    def _innocent_call(
        self, dice: random.Random, **options: Any
    ) -> tuple[Callable[[], Awaitable[Any]], Any, bool]:
        """A call, what it returns, and whether it is a large one."""
        token = f"{dice.getrandbits(64):x}"
        payload: Any
        match dice.choices(["small", "nap", "chat", "bytes", "bytearray", "blob"], (10, 4, 2, 1, 1, 1))[0]:
            case "small":
                payload = {"a": [dice.random(), None], "b": b"x" * dice.randrange(1000)}
            case "nap":
                seconds = dice.random() * 0.02
                return lambda: self._call(mischief.nap, token, seconds, **options), (token, seconds), False
            case "chat":
                return lambda: self._call(mischief.chat, token, 3, **options), (token, 3), False
            case "bytes":
                payload = MEGABYTE[dice.randrange(1000) :]
            case "bytearray":
                payload = bytearray(MEGABYTE[dice.randrange(1000) :])
            case _:
                payload = Blob(bytearray(MEGABYTE[dice.randrange(1000) :]))
        is_large = not isinstance(payload, dict)
        return lambda: self._call(mischief.echo, token, payload, **options), (token, payload), is_large

    async def innocent(self, dice: random.Random) -> str:
        """It gets its own result, whatever the others do; or it is refused."""
        call, expected, _ = self._innocent_call(
            dice,
            priority=dice.randrange(-1, 2),
            timeout=dice.choice([None, 300]),
            on_cancel=dice.choice(ON_CANCEL),
        )
        try:
            found = await call()
        except OffloadQueueFull:
            return "refused"
        if found != expected:
            raise AssertionError(f"{expected[0]} was given the result of {found[0]}")
        return "result"

    async def failing(self, dice: random.Random) -> str:
        token = f"{dice.getrandbits(64):x}"
        try:
            await self._call(mischief.fail, token)
        except OffloadQueueFull:
            return "refused"
        except Mischief as error:
            if error.args != (token,):
                raise AssertionError(f"{token} was given the exception of {error}") from None
            return "error"
        raise AssertionError("it did not raise")

    async def unsendable(self, dice: random.Random) -> str:
        kinds: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
            (mischief.unpicklable, ("token",), "no result"),
            (mischief.unbuildable, ("token",), "no result"),
            (mischief.echo, ("token", mischief.Unbuildable()), "no argument"),
            (mischief.echo, ("token", threading.Lock()), "not begun"),
        ]
        function, args, outcome = dice.choice(kinds)
        try:
            await self._call(function, *args)
        except OffloadQueueFull:
            return "refused"
        except PayloadError:
            return outcome
        raise AssertionError("it was sent")

    def _endless_call(self, dice: random.Random, **options: Any) -> Callable[[], Awaitable[Any]]:
        on_cancel = dice.choice(ON_CANCEL)
        if on_cancel == "abandon":  # that one had better end
            return lambda: self._call(mischief.nap, "", 1.0, on_cancel=on_cancel, **options)
        function = dice.choice(ENDLESS)
        return lambda: self._call(function, on_cancel=on_cancel, **options)

    async def late(self, dice: random.Random) -> str:
        try:
            await self._endless_call(dice, timeout=0.001 + dice.random() * 0.1)()
        except OffloadQueueFull:
            return "refused"
        except OffloadTimeout:
            return "late"
        raise AssertionError("it was in time")

    async def cancelled(self, dice: random.Random) -> str:
        """Some at the very moment at which they are late."""
        seconds = 0.001 + dice.random() * 0.1
        has_deadline = dice.random() < 0.5
        call = self._endless_call(dice, timeout=seconds if has_deadline else None)
        try:
            await self._give_up(call, seconds, dice)
        except OffloadQueueFull:
            return "refused"
        except OffloadTimeout:
            assert has_deadline
            return "late"
        except _GivenUp:
            self.late_or_cancelled += has_deadline
            return "cancelled"
        raise AssertionError("it ended")

    async def cancelled_by_chance(self, dice: random.Random) -> str:
        """Calls that may have their results at the moment at which they are cancelled."""
        call, expected, is_large = self._innocent_call(dice, on_cancel=dice.choice(ON_CANCEL))
        try:
            found = await self._give_up(
                call, dice.choice([0.001, 0.01, 0.1, 1]) * dice.random() + 0.001, dice
            )
        except OffloadQueueFull:
            return "refused"
        except _GivenUp:
            self.large_cancelled += is_large
            return "cancelled"
        assert found == expected
        return "result"

    async def deadly(self, dice: random.Random) -> str:
        function = dice.choice(DEADLY)
        is_asked = function is mischief.ask_to_be_killed
        try:
            await self._call(function, on_progress=_kill if is_asked else None)
        except OffloadQueueFull:
            return "refused"
        except WorkerCrashed:
            return "crashed"
        raise AssertionError("it lives")

    async def _give_up(self, call: Callable[[], Awaitable[Any]], seconds: float, dice: random.Random) -> Any:
        """Await a call for some time; raises `_GivenUp` after that."""
        if asyncio._get_running_loop() is not None and dice.random() < 0.5:
            task = asyncio.ensure_future(call())
            await asyncio.wait({task}, timeout=seconds)
            task.cancel()
            try:
                return await task
            except asyncio.CancelledError:
                raise _GivenUp from None
        with anyio.move_on_after(seconds):
            return await call()
        raise _GivenUp

    # -- the books -----------------------------------------------------------------------------------

    def audit(self) -> None:
        """What the tasks have seen is what the pool has counted."""
        stats, seen = self.pool.stats, self.outcomes
        assert not self.wrong, self.wrong[:10]
        assert seen.total() == self.begun
        assert (stats.running, stats.queued) == (0, 0)
        assert stats.idle <= stats.workers <= self.pool.workers
        assert stats.refused == seen["refused"]
        assert stats.crashes == seen["crashed"]
        assert seen["late"] <= stats.timeouts <= seen["late"] + self.late_or_cancelled
        assert seen["cancelled"] - self.large_cancelled <= stats.cancelled <= seen["cancelled"]
        answered = seen["result"] + seen["error"] + seen["no result"] + seen["no argument"]
        assert answered <= stats.calls <= answered + stats.timeouts + stats.cancelled + self.large_cancelled
        assert sum(stats.wait.counts) == sum(stats.run.counts) == stats.calls
        assert stats.kills <= stats.timeouts + stats.cancelled
        assert stats.recycled == 0


class _GivenUp(Exception):
    """Nobody waits for the call any more."""


def _kill(pid: float) -> None:
    os.kill(int(pid), signal.SIGKILL)
