"""Checks: when a resource is opened, and for a health endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import pytest

from asyncguard import SharedStartFailed, check_shared, open_shared, shared
from asyncguard.clients import _slots
from tests.clients.things import Journal, Thing, stubborn
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


async def fail(thing: Thing) -> None:
    raise ConnectionError("away")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (fail, "ConnectionError: away"),
        (lambda thing: False, "RuntimeError: its check returned False"),
        (lambda thing: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
async def test_one_that_is_not_well_is_not_opened(check: Any, said: str, journal: Journal) -> None:
    with pytest.raises(SharedStartFailed, match=f"could not be opened: {said}"):
        await open_shared(journal.thing("a", check=check)).__aenter__()
    assert journal == ["+a", "-a"]


async def test_what_a_check_says_is_told_even_if_the_object_keeps_it_to_itself(clock: TurnedClock) -> None:
    made = 0

    async def live() -> AsyncIterator[int]:
        nonlocal made
        made += 1
        with suppress(Exception):
            yield made

    def check(number: int) -> bool:
        return number == 1

    a = shared(live, check=check, max_age=60)
    async with open_shared(a):
        clock.turn(60)
        for _ in range(3):
            assert a.get() == 1
            with anyio.fail_after(PATIENCE):
                while made == 1 or a.status.last_error is None:
                    await anyio.sleep(0.001)
        assert made == 2  # not at each request
        assert "its check returned False" in str(a.status.last_error)
    with pytest.raises(SharedStartFailed, match=r"could not be opened: .*its check returned False"):
        await open_shared(a).__aenter__()


async def test_an_object_that_says_nothing_of_its_end_has_failed() -> None:
    class Silent:
        async def __aenter__(self) -> Silent:
            return self

        async def __aexit__(self, *error: object) -> bool:
            return True

    def leave(thing: Silent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SharedStartFailed, match="could not be opened: it has ended"):
        await open_shared(shared(Silent, check=leave)).__aenter__()


async def test_a_check_that_does_not_end_is_left_alone_in_the_end(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    release = anyio.Event()
    calls = 0

    async def check(thing: Thing) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            await stubborn(release)

    a = journal.thing("a", check=check, close_timeout=0.05)
    with anyio.fail_after(PATIENCE):
        async with open_shared(a):
            await check_shared(timeout=0.01)
        tasks = asyncio.all_tasks() if asyncio._get_running_loop() is not None else set()
        release.set()
        await anyio.sleep(0.01)
        assert journal == ["+a", "-a"]
        assert "was cancelled, and goes on" in caplog.text
        # `asyncio.run` would wait for it.
        assert not [task for task in tasks if task.get_name().startswith("asyncguard")]


async def test_a_check_that_hangs_counts_as_starting(journal: Journal) -> None:
    async def hang(thing: Thing) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(PATIENCE):
        with pytest.raises(SharedStartFailed, match=r"did not start within 0\.05 s"):
            await open_shared(journal.thing("a", check=hang, start_timeout=0.05)).__aenter__()
    assert journal == ["+a", "-a"]


async def test_how_they_are(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    well = True

    async def check(thing: Thing) -> None:
        assert thing.name == "a"
        if not well:
            raise ConnectionError("away")

    a = journal.thing("a", check=check)
    b = journal.thing("b")
    c = journal.thing("c")
    assert await check_shared() == ()
    async with open_shared(b, a):
        assert [(status.name, status.state) for status in await check_shared()] == [
            ("b", "open"),
            ("a", "open"),
        ]
        well = False
        b_status, a_status = await check_shared(b, a)
        assert b_status.ok
        assert (a_status.state, a_status.ok, a_status.last_error) == (
            "failing",
            False,
            "ConnectionError: away",
        )
        assert a.status.state == "failing"
        assert a.get() is journal.made[1]  # for its users to find out
        assert "'a' (declared at " in caplog.text
        assert "fails its check: ConnectionError: away" in caplog.text
        well = True
        (status,) = await check_shared(a)
        assert (status.state, status.last_error) == ("open", None)
        (status,) = await check_shared(c)
        assert (status.state, status.ok) == ("closed", False)
        with b.override(1):
            assert (await check_shared(b))[0].ok


async def test_a_check_that_hangs_is_not_waited_for(journal: Journal) -> None:
    calls = 0

    async def check(thing: Thing) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            await anyio.sleep_forever()

    a = journal.thing("a", check=check)
    b = journal.thing("b", check=check)
    with anyio.fail_after(PATIENCE):
        async with open_shared(a):
            (status,) = await check_shared(timeout=0.05)
            assert (status.state, status.last_error) == ("failing", "its check was not done within 0.05 s")
            while not (await check_shared(timeout=5))[0].ok:  # it has yet to end
                await anyio.sleep(0.001)
            assert calls == 3
            assert await check_shared(b) == (b.status,)


async def test_a_check_that_does_not_end_is_not_begun_twice(journal: Journal) -> None:
    release = anyio.Event()
    calls = 0

    async def check(thing: Thing) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            await stubborn(release)

    a = journal.thing("a", check=check)
    with anyio.fail_after(PATIENCE):
        async with open_shared(a):
            for _ in range(3):
                (status,) = await check_shared(timeout=0.02)
                assert not status.ok
            assert calls == 2
            release.set()
            while not (await check_shared(timeout=5))[0].ok:
                await anyio.sleep(0.001)
            assert calls == 3


async def test_they_are_checked_at_the_same_time(journal: Journal) -> None:
    met = anyio.Event()
    waiting = 0

    async def meet(thing: Thing) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 4:
            met.set()
        if waiting > 2:
            await met.wait()

    with anyio.fail_after(PATIENCE):
        async with open_shared(journal.thing("a", check=meet), journal.thing("b", check=meet)):
            assert all(status.ok for status in await check_shared())


async def test_a_cancelled_question_leaves_the_check_alone(journal: Journal) -> None:
    release = anyio.Event()
    calls = 0

    async def check(thing: Thing) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            await release.wait()

    async with open_shared(journal.thing("a", check=check)):
        with anyio.move_on_after(0.02):
            await check_shared(timeout=None)
        release.set()
        assert (await check_shared())[0].ok
        assert calls == 2


def test_where_no_loop_runs() -> None:
    with pytest.raises(RuntimeError, match="no event loop runs in this thread"):
        check_shared(shared(lambda: 1)).send(None)


@pytest.mark.parametrize(("timeout", "error"), [(0, ValueError), ("1", TypeError)])
async def test_bad_options(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^timeout must be "):
        await check_shared(timeout=timeout)
