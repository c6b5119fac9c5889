"""Objects that get too old, or end by themselves, and the new ones that take their place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from asyncguard import SharedNotOpen, check_shared, open_shared, shared
from asyncguard._request import RequestRecord, current_request
from asyncguard.clients import _slot, _slots
from tests.asgi_driver import http_scope
from tests.clients.things import Journal, Thing
from tests.conftest import TurnedClock

pytestmark = pytest.mark.anyio

PATIENCE = 30.0


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Any:
    yield
    assert not _slots._homes


@pytest.fixture
def journal() -> Journal:
    return Journal()


class Request:
    """Code that runs for a request, from ``with`` to `end`."""

    def __enter__(self) -> Request:
        self.record = RequestRecord(http_scope(), 0.0)
        self._token = current_request.set(self.record)
        return self

    def __exit__(self, *error: object) -> None:
        current_request.reset(self._token)

    def end(self) -> None:
        self.record.finish()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.001)


async def pause() -> None:
    """Let everything happen that is about to."""
    for _ in range(20):
        await anyio.sleep(0)
    await anyio.sleep(0.01)


async def test_one_that_is_too_old_is_replaced_when_it_is_asked_for(
    journal: Journal, clock: TurnedClock
) -> None:
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        with Request() as request:
            old = a.get()
            clock.turn(59)
            assert a.get() is old
            await pause()
            assert journal == ["+a"]
            clock.turn(1)
            assert a.get() is old  # the new one is opened behind the back of who asks
            await until(lambda: len(journal.made) == 2)
            await pause()
            new = a.get()
            assert new is journal.made[1]
            assert (old.is_open, new.is_open) == (True, True)
            assert a.status.renewals == 1
            assert a.status.age == 0
        request.end()
        await until(lambda: not old.is_open)
        assert a.get() is new
        assert new.is_open
    assert journal == ["+a", "+a", "-a", "-a"]


async def test_requests_keep_the_one_that_they_got(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        with Request() as first:
            old = a.get()
            a.get()
        with Request() as second:
            await anyio.to_thread.run_sync(a.get)
        clock.turn(60)
        with Request() as third:
            a.get()
            await until(lambda: a.status.renewals == 1)
        with Request() as fourth:
            new = a.get()
        for request in (third, second, fourth):
            request.end()
            await pause()
            assert old.is_open
        first.end()
        await until(lambda: not old.is_open)
        assert new.is_open


async def test_a_block_keeps_it(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        with a.use() as old:
            clock.turn(60)
            with a.use() as same:
                assert same is old
            await until(lambda: a.status.renewals == 1)
            with a.use() as new:
                assert new is not old
            await pause()
            assert old.is_open
        await until(lambda: not old.is_open)


async def test_one_that_nobody_has_is_closed_at_once(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        clock.turn(60)
        with a.use():
            pass
        await until(lambda: journal == ["+a", "+a", "-a"])


async def test_one_that_was_given_to_code_of_no_request_lingers(
    journal: Journal, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_slot, "LINGER", 0.2)
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        old = a.get()
        with Request() as ended:
            pass
        ended.end()
        with ended:  # what a request has left behind belongs to none
            pass
        clock.turn(60)
        a.get()
        await until(lambda: a.status.renewals == 1)
        await pause()
        assert old.is_open
        await until(lambda: not old.is_open)


async def test_closing_waits_for_nobody(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)
    with Request() as request:
        async with open_shared(a):
            old = a.get()
            clock.turn(60)
            a.get()
            await until(lambda: a.status.renewals == 1)
            assert old.is_open
        assert not any(thing.is_open for thing in journal.made)
    request.end()
    await pause()


async def test_a_new_one_that_cannot_be_opened_leaves_the_old(
    journal: Journal, clock: TurnedClock, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def start() -> None:
        nonlocal tries
        tries += 1
        if 1 < tries < 4:
            raise OSError(f"no. {tries}")

    a = journal.thing("a", start=start, max_age=60)
    async with open_shared(a):
        old = a.get()
        clock.turn(60)
        a.get()
        await until(lambda: caplog.records)
        await pause()
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert "'a' (declared at " in record.getMessage()
        assert "could not be opened: OSError: no. 2; it stays as it is for now" in record.getMessage()
        assert "OSError: no. 2" in str(a.status.last_error)
        assert a.status.state == "open"
        for _ in range(5):  # not each time that somebody asks
            assert a.get() is old
            await pause()
        assert tries == 2
        for expected in (3, 4):
            clock.turn(_slot.RETRY_AFTER)
            a.get()
            await until(lambda: tries == expected)  # noqa: B023
            await pause()
        assert a.get() is journal.made[-1] is not old
        assert a.status.last_error is None


async def test_closing_calls_off_a_renewal(journal: Journal, clock: TurnedClock) -> None:
    tries = 0
    begun = anyio.Event()

    async def start() -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            begun.set()
            await anyio.sleep_forever()

    a = journal.thing("a", start=start, max_age=60)
    with anyio.fail_after(PATIENCE):
        async with open_shared(a):
            clock.turn(60)
            a.get()
            await begun.wait()
    assert journal == ["+a", "+a", "-a"]


async def test_what_was_made_with_an_old_one_keeps_it(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)
    b = journal.thing("b", a, max_age=600)
    async with open_shared(b):
        with b.use() as thing:
            old = thing.inputs[0]
        clock.turn(60)
        with a.use():
            pass
        await until(lambda: a.status.renewals == 1)
        await pause()
        assert old.is_open
        clock.turn(540)
        with b.use():
            pass
        await until(lambda: b.status.renewals == 1)
        with b.use() as new:
            assert new.inputs[0] is journal.made[2]
        with Request() as request:
            assert b.get() is new
        request.end()
        await until(lambda: not old.is_open)


async def test_one_that_ends_by_itself_is_opened_anew(
    clock: TurnedClock, caplog: pytest.LogCaptureFixture
) -> None:
    crash = anyio.Event()
    made: list[Thing] = []

    async def fail() -> None:
        await crash.wait()
        raise ConnectionResetError("gone")

    async def live() -> AsyncIterator[Thing]:
        async with anyio.create_task_group() as tasks:
            if not made:
                tasks.start_soon(fail)
            made.append(Thing("it"))
            yield made[-1]
            tasks.cancel_scope.cancel()

    resource = shared(live)
    async with open_shared(resource):
        assert resource.get() is made[0]
        crash.set()
        await until(lambda: resource.status.state == "ended")
        assert not resource.status.ok
        assert "ConnectionResetError" in str(resource.status.last_error) or "ExceptionGroup" in str(
            resource.status.last_error
        )
        with pytest.raises(SharedNotOpen, match=r"'resource' .* has ended by itself"):
            resource.get()
        await until(lambda: len(made) == 2)
        await pause()
        assert resource.get() is made[1]
        assert resource.status.ok
    (record,) = caplog.records
    assert "ended by itself" in record.getMessage()
    assert record.exc_info is not None


async def test_its_end_is_told_once_however_often_it_is_checked() -> None:
    release = anyio.Event()
    made: list[Thing] = []

    async def live() -> AsyncIterator[Thing]:
        if made:
            await release.wait()
        made.append(Thing("it"))
        with anyio.CancelScope() as scope:
            if len(made) == 1:
                scope.cancel()
            yield made[-1]

    resource = shared(live)
    async with open_shared(resource):
        await until(lambda: resource.status.state == "ended")
        told = {(await check_shared())[0].last_error for _ in range(3)}
        assert len(told) == 1
        release.set()
        await until(lambda: resource.status.state == "open")


async def test_a_thread_that_takes_it_while_it_is_replaced_gets_the_new_one(
    journal: Journal, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        slot = _slots.find(a)
        old, usable = slot.usable(), slot.usable
        clock.turn(60)
        slot.usable()
        await until(lambda: journal == ["+a", "+a", "-a"])
        seen = [old, old]
        monkeypatch.setattr(slot, "usable", lambda: seen.pop() if seen else usable())
        with a.use() as used:
            assert used is journal.made[1]
        seen = [old]
        with Request() as request:
            assert a.get() is journal.made[1]
        request.end()


async def test_a_thread_that_takes_it_while_its_request_ends_keeps_it_no_longer(
    journal: Journal, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_slot, "LINGER", 0.01)
    a = journal.thing("a", max_age=60)

    class Ending(dict[object, Callable[[], object]]):
        def __contains__(self, key: object) -> bool:
            request.end()
            return super().__contains__(key)

    async with open_shared(a):
        with Request() as request:
            request.record.at_end = Ending()
            a.get()
        clock.turn(60)
        with a.use():
            pass
        await until(lambda: journal == ["+a", "+a", "-a"])


async def test_a_worker_thread_may_be_who_finds_it_too_old(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)

    def use() -> None:
        with a.use():
            pass

    async with open_shared(a):
        clock.turn(60)
        await anyio.to_thread.run_sync(use)
        await until(lambda: journal == ["+a", "+a", "-a"])


async def test_many_requests_at_once_are_one_renewal(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a", max_age=60)
    in_use: list[Thing] = []

    async def serve() -> None:
        record = RequestRecord(http_scope(), 0.0)
        current_request.set(record)
        for _ in range(5):
            thing = a.get()
            await anyio.sleep(0.001)
            assert thing.is_open
            in_use.append(thing)
        record.finish()

    async with open_shared(a):
        for _ in range(3):
            clock.turn(60)
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(serve)
        await until(lambda: sum(thing.is_open for thing in journal.made) == 1)
        assert len(journal.made) == 4
        assert set(in_use) <= set(journal.made)


async def test_one_without_a_limit_is_never_replaced(journal: Journal, clock: TurnedClock) -> None:
    a = journal.thing("a")
    async with open_shared(a):
        with Request() as request:
            clock.turn(1e9)
            a.get()
            assert request.record.at_end is None
        await pause()
        assert journal == ["+a"]


async def test_what_was_made_with_one_that_ended_is_opened_anew_too(
    journal: Journal, clock: TurnedClock, caplog: pytest.LogCaptureFixture
) -> None:
    crash = anyio.Event()
    tries = 0

    async def fail() -> None:
        await crash.wait()
        raise ConnectionResetError("gone")

    async def live() -> AsyncIterator[int]:
        nonlocal tries
        tries += 1
        if tries == 2:
            raise OSError("not yet")
        async with anyio.create_task_group() as tasks:
            if tries == 1:
                tasks.start_soon(fail)
            yield tries
            tasks.cancel_scope.cancel()

    a = shared(live)
    b = journal.thing("b", a, max_age=60)
    async with open_shared(b):
        assert b.get().inputs == (1,)
        crash.set()
        await until(lambda: b.status.state == "ended")
        for _ in range(3):
            with pytest.raises(SharedNotOpen):
                b.get()
            await pause()
        assert tries == 2
        with pytest.raises(SharedNotOpen, match=r"'a' .* has ended by itself, .*: .*OSError: not yet"):
            a.get()
        clock.turn(_slot.RETRY_AFTER)
        with pytest.raises(SharedNotOpen):
            b.get()
        await until(lambda: tries == 3)

        def is_back() -> bool:
            try:
                return b.get().inputs == (3,)
            except SharedNotOpen:
                return False

        await until(is_back)
        assert a.get() == 3


async def test_one_that_has_nothing_to_do_costs_the_loop_nothing(
    journal: Journal, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for by every request does not wake the loop, unless there is something to be done."""
    a = journal.thing("a", max_age=60)
    async with open_shared(a):
        slot = _slots.find(a)
        calls: list[object] = []
        monkeypatch.setattr(slot, "_soon", calls.append)
        for _ in range(3):
            with Request() as request:
                a.get()
            request.end()
        assert calls == []
        clock.turn(60)
        with a.use():
            pass
        assert len(calls) == 1
