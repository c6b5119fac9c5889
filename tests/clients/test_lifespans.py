"""The order of opening and closing, and what becomes of the others when one fails, hangs or is cancelled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette

import asyncguard
from asyncguard import Shared, SharedNotOpen, SharedStartFailed, combine_lifespans, open_shared, shared
from asyncguard.clients import _instance, _slots
from tests.clients.things import Journal, stubborn

pytestmark = pytest.mark.anyio

PATIENCE = 30.0


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Any:
    yield
    assert not _slots._homes


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end when it is cancelled is given up soon."""
    monkeypatch.setattr(_instance, "GRACE", 0.05)


async def fail() -> None:
    raise ConnectionRefusedError("nobody listens")


async def test_they_are_closed_in_reverse(journal: Journal) -> None:
    async with open_shared(journal.thing("a"), journal.thing("b"), journal.thing("c")):
        assert journal == ["+a", "+b", "+c"]
    assert journal == ["+a", "+b", "+c", "-c", "-b", "-a"]


async def test_what_one_needs_is_opened_first_and_closed_last(journal: Journal) -> None:
    config = journal.thing("config")
    database = journal.thing("database", config)
    cache = journal.thing("cache")
    users = journal.thing("users", database, needs=[cache])
    async with open_shared(users, database):  # in any order, and without all of them
        assert journal == ["+cache", "+config", "+database", "+users"]
        assert users.get().inputs == (database.get(),)
        assert database.get().inputs == (config.get(),)
    assert journal[4:] == ["-users", "-database", "-config", "-cache"]


async def test_a_resource_by_name_is_replaced_by_its_object() -> None:
    number = shared(lambda: 7)
    made: Shared[dict[str, int]] = shared(dict, number=number, other=1)
    async with open_shared(made):
        assert made.get() == {"number": 7, "other": 1}


async def test_one_that_fails_closes_those_before_it(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    bad = journal.thing("bad", start=fail)
    opening = open_shared(journal.thing("a"), journal.thing("b"), bad, journal.thing("d"))
    with pytest.raises(SharedStartFailed) as caught:
        await opening.__aenter__()
    assert journal == ["+a", "+b", "+bad", "-b", "-a"]
    said = str(caught.value)
    assert said.startswith("the shared resource 'bad' (declared at ")
    assert f"{bad.declared.file}:{bad.declared.line}" in said
    assert said.endswith("could not be opened: ConnectionRefusedError: nobody listens")
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert caught.value.name == "bad"
    assert said in caplog.text
    with pytest.raises(SharedNotOpen):
        bad.get()


async def test_one_that_hangs_is_refused_in_time(journal: Journal) -> None:
    slow = journal.thing("slow", start=anyio.sleep_forever, start_timeout=0.05)
    with anyio.fail_after(PATIENCE):
        with pytest.raises(SharedStartFailed) as caught:
            await open_shared(journal.thing("a"), slow).__aenter__()
    said = str(caught.value)
    assert f"{slow.declared.line}) did not start within 0.05 s; it was awaiting " in said
    assert said.endswith(" in Journal.thing.live: await start()")
    assert journal == ["+a", "+slow", "-a"]


@pytest.mark.usefixtures("brief")
async def test_one_that_hangs_and_is_stubborn_is_left_alone(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    release = anyio.Event()
    slow = journal.thing("slow", start=lambda: stubborn(release), start_timeout=0.05)
    with anyio.fail_after(PATIENCE):
        with pytest.raises(SharedStartFailed):
            await open_shared(journal.thing("a"), slow).__aenter__()
        assert "was cancelled, and goes on" in caplog.text
        assert journal == ["+a", "+slow", "-a"]
        release.set()
        while "-slow" not in journal:  # it is closed as soon as it has come up
            await anyio.sleep(0.001)
    assert not any(thing.is_open for thing in journal.made)


async def test_a_close_that_raises_stops_nobody(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    bad = journal.thing("bad", stop=fail)
    async with open_shared(journal.thing("a"), bad, journal.thing("c")):
        pass
    assert journal[3:] == ["-c", "-bad", "-a"]
    (record,) = caplog.records
    assert record.name == "asyncguard.clients"
    assert record.levelname == "ERROR"
    assert "'bad'" in record.getMessage()
    assert f"{bad.declared.file}:{bad.declared.line}" in record.getMessage()
    assert "could not be closed: ConnectionRefusedError: nobody listens" in record.getMessage()


async def test_a_close_that_hangs_is_given_up(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    bad = journal.thing("bad", stop=anyio.sleep_forever, close_timeout=0.05)
    with anyio.fail_after(PATIENCE):
        async with open_shared(journal.thing("a"), bad, journal.thing("c")):
            pass
    assert journal[3:] == ["-c", "-bad", "-a"]
    (record,) = caplog.records
    assert "was not closed within 0.05 s; it was awaiting " in record.getMessage()
    assert record.getMessage().endswith(" in Journal.thing.live: await stop()")
    assert f"{bad.declared.file}:{bad.declared.line}" in record.getMessage()


@pytest.mark.usefixtures("brief")
async def test_a_close_that_hangs_and_is_stubborn_is_left_alone(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    release = anyio.Event()
    bad = journal.thing("bad", stop=lambda: stubborn(release), close_timeout=0.05)
    with anyio.fail_after(PATIENCE):
        async with open_shared(journal.thing("a"), bad):
            pass
    assert journal[2:] == ["-bad", "-a"]
    assert "was cancelled, and goes on" in caplog.text
    release.set()
    await anyio.sleep(0.01)


async def test_an_error_of_the_block_closes_all_and_comes_through(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_shared(journal.thing("a"), journal.thing("b")):
            1 / 0  # noqa: B018
    assert journal == ["+a", "+b", "-b", "-a"]


async def test_a_cancelled_start_closes_all(journal: Journal) -> None:
    reached = anyio.Event()

    async def hang() -> None:
        reached.set()
        await anyio.sleep_forever()

    async def run() -> None:
        async with open_shared(journal.thing("a"), journal.thing("slow", start=hang)):
            raise AssertionError("not reached")

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await reached.wait()
            tasks.cancel_scope.cancel()
    assert journal == ["+a", "+slow", "-a"]


async def test_a_cancelled_block_closes_all_with_time_to_do_so(journal: Journal) -> None:
    async def take_time() -> None:
        await anyio.sleep(0.01)
        journal.append("done")

    with anyio.move_on_after(0.01):
        async with open_shared(journal.thing("a", stop=take_time), journal.thing("b", stop=take_time)):
            await anyio.sleep_forever()
    assert journal == ["+a", "+b", "-b", "done", "-a", "done"]


async def test_a_cancelled_close_goes_on_to_the_end(journal: Journal) -> None:
    reached = anyio.Event()
    release = anyio.Event()

    async def wait() -> None:
        reached.set()
        await release.wait()

    async def run() -> None:
        async with open_shared(journal.thing("a"), journal.thing("b", stop=wait)):
            pass
        await anyio.lowlevel.checkpoint()
        raise AssertionError("the cancellation was lost")

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await reached.wait()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
                assert journal == ["+a", "+b", "-b"]
                release.set()
    assert journal == ["+a", "+b", "-b", "-a"]


async def steps(number: int) -> None:
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


async def test_a_cancellation_at_any_step_leaves_nothing_open(journal: Journal) -> None:
    async def few() -> None:
        await steps(2)

    resources = [journal.thing(name, start=few, stop=few) for name in "abc"]
    came_through = 0

    async def serve() -> None:
        nonlocal came_through
        async with open_shared(*resources):
            await steps(2)
        came_through += 1

    with anyio.fail_after(PATIENCE):
        for moment in range(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(serve)
                await steps(moment)
                tasks.cancel_scope.cancel()
            assert not _slots._homes
            assert not any(thing.is_open for thing in journal.made)
            assert journal.count("-a") == len([thing for thing in journal.made if thing.name == "a"])
    assert 0 < came_through < 60


async def test_a_scope_that_a_resource_leaves_open_may_be_left_by_anybody() -> None:
    """An asynchronous generator with a task group in it, opened in one task and closed in another."""
    seen: list[str] = []

    async def live() -> AsyncIterator[str]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            with anyio.CancelScope():
                yield "it"
            seen.append("left")
            tasks.cancel_scope.cancel()

    resource = shared(live)
    opening = open_shared(resource)

    async def open_it() -> None:
        await opening.__aenter__()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_it)
    assert resource.get() == "it"
    with anyio.CancelScope():
        await opening.__aexit__(None, None, None)
    assert seen == ["left"]


async def test_it_sees_no_variable_of_who_opens_it() -> None:
    from contextvars import ContextVar

    secret = ContextVar("secret", default="none")
    secret.set("mine")
    resource = shared(secret.get)
    async with open_shared(resource):
        assert resource.get() == "none"


async def test_two_lifespans_of_one_loop_share_it(journal: Journal) -> None:
    a, b = journal.thing("a"), journal.thing("b")
    async with open_shared(a):
        first = a.get()
        async with open_shared(a, b):
            assert a.get() is first
        assert journal == ["+a", "+b", "-b"]
        assert a.get() is first
    assert journal == ["+a", "+b", "-b", "-a"]


async def test_the_same_lifespan_twice_at_the_same_time(journal: Journal) -> None:
    a = journal.thing("a", start=lambda: anyio.sleep(0.01), stop=lambda: anyio.sleep(0.01))
    lifespan = open_shared(a)
    done = 0

    async def serve() -> None:
        nonlocal done
        async with lifespan(object()), lifespan:
            assert a.get() is a.get()
            assert a.get().is_open
            await anyio.sleep(0.005)
        done += 1

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for delay in range(20):
                tasks.start_soon(serve)
                await anyio.sleep(delay / 1000)
    assert done == 20
    assert journal.count("+a") == journal.count("-a")
    assert all(not thing.is_open for thing in journal.made)


async def test_who_waits_for_one_that_fails_tries_it_again(journal: Journal) -> None:
    begun = anyio.Event()
    release = anyio.Event()
    tries = 0

    async def start() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            begun.set()
            await release.wait()
            raise OSError("once")

    a = journal.thing("a", start=start)
    outcomes: list[object] = []

    async def serve() -> None:
        try:
            async with open_shared(a):
                outcomes.append("open")
        except SharedStartFailed:
            outcomes.append("failed")

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            await begun.wait()
            tasks.start_soon(serve)
            await anyio.sleep(0.01)
            release.set()
    assert outcomes == ["failed", "open"]


@pytest.mark.parametrize("make", [Starlette, FastAPI])
async def test_install_opens_them_around_the_applications_own_lifespan(
    make: Callable[..., Any], journal: Journal
) -> None:
    a = journal.thing("a")

    @asynccontextmanager
    async def own(app: Any) -> AsyncIterator[dict[str, object]]:
        journal.append("+own")
        yield {"thing": a.get()}
        assert a.get().is_open
        journal.append("-own")

    app = make(lifespan=own)
    asyncguard.install(app, shared=[a])
    for _ in range(2):  # as often as it is served
        async with app.router.lifespan_context(app) as state:
            assert state == {"thing": a.get()}
    assert journal == ["+a", "+own", "-own", "-a"] * 2


async def test_install_opens_them_around_the_lifespans_of_routers(journal: Journal) -> None:
    a = journal.thing("a")

    @asynccontextmanager
    async def own(router: Any) -> AsyncIterator[dict[str, object]]:
        yield {"thing": a.get()}

    app = FastAPI()
    asyncguard.install(app, shared=[a])
    app.include_router(APIRouter(lifespan=own))
    async with app.router.lifespan_context(app) as state:
        assert state == {"thing": a.get()}


async def test_lifespans_are_combined(journal: Journal) -> None:
    def lifespan(name: str, state: dict[str, object] | None) -> Any:
        @asynccontextmanager
        async def entered(app: Any) -> AsyncIterator[dict[str, object] | None]:
            assert app == "app"
            journal.append(f"+{name}")
            yield state
            journal.append(f"-{name}")

        return entered

    async with combine_lifespans(lifespan("a", None), open_shared(journal.thing("b")))("app") as state:
        assert state is None
    assert journal == ["+a", "+b", "-b", "-a"]
    several = combine_lifespans(lifespan("a", {"x": 1, "y": 1}), lifespan("b", {"y": 2}))
    async with several("app") as state:
        assert state == {"x": 1, "y": 2}


async def test_the_lifespan_of_a_mounted_application_is_run_with_that(journal: Journal) -> None:
    @asynccontextmanager
    async def own(app: Any) -> AsyncIterator[dict[str, object]]:
        yield {"app": app}

    inner = FastAPI(lifespan=own)
    asyncguard.install(inner, shared=[journal.thing("a")])
    outer = FastAPI(lifespan=combine_lifespans(open_shared(journal.thing("b")), inner))
    outer.mount("/inner", inner)
    async with outer.router.lifespan_context(outer) as state:
        assert state == {"app": inner}
        assert journal == ["+b", "+a"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(7, "7"), ("abc", "'abc'"), ([7], "7"), ([shared(dict, name="x"), None], "None")],
    ids=repr,
)
def test_only_resources_can_be_opened(value: Any, said: str) -> None:
    app = Starlette()
    with pytest.raises(
        TypeError, match=r"^shared must be a list of what asyncguard.shared\(\) returns, not "
    ):
        asyncguard.install(app, shared=value)
    if isinstance(value, list):
        with pytest.raises(TypeError) as caught:
            open_shared(*value)
        assert str(caught.value) == f"open_shared() takes what asyncguard.shared() returns, not {said}"


def test_only_lifespans_can_be_combined() -> None:
    with pytest.raises(TypeError, match=r"^combine_lifespans\(\) takes lifespans, not 7$"):
        combine_lifespans(7)  # type: ignore[arg-type]


def test_what_opens_them_is_imported_before_the_loop_runs() -> None:
    code = """
import sys
import asyncguard, starlette.applications
own = asyncguard.shared(dict)
assert "asyncguard.clients._slot" not in sys.modules
asyncguard.install(starlette.applications.Starlette(), shared=[own])
assert "asyncguard.clients._slot" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_one_resource_is_no_list_of_them() -> None:
    resource = shared(dict[str, int])
    with pytest.raises(TypeError, match="shared must be a list of"):
        asyncguard.install(Starlette(), shared=resource)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs must be a list of"):
        shared(list[int], needs=resource)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="needs must be a list of"):
        shared(list[int], needs=[7])  # type: ignore[arg-type, list-item]
