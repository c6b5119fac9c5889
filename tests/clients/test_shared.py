"""Who gets the live object: endpoints, sockets, background code, threads; and what all others are told."""

# No `from __future__ import annotations`: FastAPI could not find local resources by their names.

import asyncio
import threading
from typing import Annotated, Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

import asyncguard
from asyncguard import Shared, SharedNotOpen, open_shared, shared
from asyncguard.clients import _slots
from tests.clients.things import Journal, Thing

PATIENCE = 30.0


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Any:
    yield
    assert not _slots._homes


@pytest.fixture
def journal() -> Journal:
    return Journal()


def refused(resource: Shared[Any]) -> str:
    with pytest.raises(SharedNotOpen) as caught:
        resource.get()
    assert caught.value.name == resource.name
    said = str(caught.value)
    assert said.startswith(f"the shared resource {resource.name!r} (declared at ")
    assert f"{resource.declared.file}:{resource.declared.line})" in said
    # The two ways to mend it.
    assert f"pass shared=[{resource.name}] to asyncguard.install(app)" in said
    assert f"`async with asyncguard.open_shared({resource.name}):`" in said
    return said


def test_outside_a_lifespan_it_is_refused(journal: Journal) -> None:
    assert "is not open: pass" in refused(journal.thing("a"))


@pytest.mark.anyio
async def test_before_and_after_its_lifespan_it_is_refused(journal: Journal) -> None:
    a = journal.thing("a")
    assert "is not open: pass" in refused(a)
    async with open_shared(a):
        a.get()
    assert "is not open: pass" in refused(a)
    with pytest.raises(SharedNotOpen):
        with a.use():
            raise AssertionError
    with pytest.raises(SharedNotOpen):
        await a()


@pytest.mark.anyio
async def test_nothing_is_made_before_it_is_opened() -> None:
    made: list[object] = []
    resource = shared(made.append, 1)
    assert made == []
    async with open_shared(resource):
        assert made == [1]


@pytest.mark.anyio
async def test_while_it_is_being_opened_it_says_so(journal: Journal) -> None:
    said: list[str] = []

    async def ask() -> None:
        try:
            a.get()
        except SharedNotOpen as error:
            said.append(str(error))

    a = journal.thing("a", start=ask)
    async with open_shared(a):
        pass
    assert said[0].endswith("is being opened")


@pytest.mark.asyncio
async def test_another_loop_is_told_so(journal: Journal) -> None:
    a = journal.thing("a")

    async def elsewhere() -> str:
        return refused(a)

    async with open_shared(a):
        said = await asyncio.get_running_loop().run_in_executor(None, lambda: asyncio.run(elsewhere()))
    assert "is open on another event loop than this one" in said


@pytest.mark.anyio
async def test_a_foreign_thread_is_told_so(journal: Journal) -> None:
    a = journal.thing("a")
    said: list[str] = []
    async with open_shared(a):
        thread = threading.Thread(target=lambda: said.append(refused(a)), name="mine")
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
    assert "is open on an event loop that does not run in this thread ('mine')" in said[0]


@pytest.mark.anyio
async def test_a_worker_thread_gets_that_of_its_loop(journal: Journal) -> None:
    a = journal.thing("a")

    def use() -> tuple[Thing, Thing]:
        with a.use() as thing:
            return a.get(), thing

    async with open_shared(a):
        assert await anyio.to_thread.run_sync(use) == (a.get(), a.get())
        assert (await anyio.to_thread.run_sync(lambda: a.status)).state == "open"


def test_an_application_served_by_two_loops_at_once_has_two(journal: Journal) -> None:
    app = FastAPI()
    a = journal.thing("a")
    asyncguard.install(app, shared=[a])

    @app.get("/async")
    async def endpoint(thing: Annotated[Thing, Depends(a)]) -> int:
        assert thing is a.get()
        return id(thing)

    @app.get("/thread")
    def in_thread(thing: Annotated[Thing, Depends(a)]) -> int:
        return id(a.get())

    with TestClient(app) as one, TestClient(app, backend="trio") as two:
        first, second = one.get("/async").json(), two.get("/async").json()
        assert {first, second} == set(map(id, journal.made))
        assert len(journal.made) == 2
        assert "is open on an event loop that does not run in this thread" in refused(a)
    assert journal == ["+a", "+a", "-a", "-a"]


def test_an_application_served_by_two_loops_has_two_in_threads_too(journal: Journal) -> None:
    app = FastAPI()
    a = journal.thing("a")
    asyncguard.install(app, shared=[a])

    @app.get("/")
    def in_thread(thing: Annotated[Thing, Depends(a)]) -> bool:
        return a.get() is thing

    with TestClient(app) as one, TestClient(app) as two:
        for _ in range(3):
            assert one.get("/").json() is True
            assert two.get("/").json() is True


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "bare"])
def test_endpoints_of_fastapi(backend: Any, guarded: bool, journal: Journal) -> None:
    a = journal.thing("a")
    seen: list[object] = []
    main = threading.current_thread()

    def dependency(thing: Annotated[Thing, Depends(a)]) -> Thing:
        assert thing is a.get()
        return thing

    app = FastAPI(lifespan=None if guarded else open_shared(a))
    if guarded:
        asyncguard.install(app, shared=[a], timeout=30)

    @app.get("/async")
    async def endpoint(
        thing: Annotated[Thing, Depends(a)],
        other: Annotated[Thing, Depends(dependency)],
        tasks: BackgroundTasks,
    ) -> bool:
        tasks.add_task(lambda: seen.append(a.get()))

        async def later() -> None:
            seen.append(a.get())

        tasks.add_task(later)
        return thing is other is a.get()

    @app.get("/thread")
    def in_thread(thing: Annotated[Thing, Depends(a)]) -> bool:
        assert threading.current_thread() is not main
        return thing is a.get() is anyio.from_thread.run_sync(a.get)

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, thing: Annotated[Thing, Depends(a)]) -> None:
        await websocket.accept()
        await websocket.send_json(thing is a.get())
        await websocket.close()

    with TestClient(app, backend=backend) as client:
        assert client.get("/async").json() is True
        assert client.get("/thread").json() is True
        with client.websocket_connect("/socket") as connection:
            assert connection.receive_json() is True
        assert seen == journal.made * 2
    assert journal == ["+a", "-a"]


def test_it_is_no_matter_for_a_thread() -> None:
    """FastAPI calls plain functions that are dependencies in threads; not this."""
    threads: list[threading.Thread] = []

    class Noting(Shared[Any]):
        def get(self) -> Any:
            threads.append(threading.current_thread())
            return super().get()

    noting = shared(dict[str, int])
    noting.__class__ = Noting
    app = FastAPI(lifespan=open_shared(noting))
    loops: list[threading.Thread] = []

    @app.get("/")
    async def endpoint(thing: Annotated[Any, Depends(noting)]) -> None:
        loops.append(threading.current_thread())

    with TestClient(app) as client:
        client.get("/")
    assert threads == loops


def test_mounted_applications_and_starlette(journal: Journal) -> None:
    a = journal.thing("a")

    async def endpoint(request: Request) -> Response:
        return JSONResponse(a.get().is_open)

    inner = Starlette(routes=[Route("/", endpoint)])
    app = Starlette(routes=[Mount("/inner", inner), Route("/", endpoint)])
    asyncguard.install(app, shared=[a])
    with TestClient(app) as client:
        assert client.get("/").json() is True
        assert client.get("/inner/").json() is True


def test_a_test_that_runs_no_lifespan_is_told(journal: Journal) -> None:
    a = journal.thing("a")
    app = FastAPI()
    asyncguard.install(app, shared=[a])

    @app.get("/")
    async def endpoint(thing: Annotated[Thing, Depends(a)]) -> None: ...

    with pytest.raises(SharedNotOpen, match=r"a test has to run that, too: see asyncguard\.testing"):
        TestClient(app).get("/")


@pytest.mark.anyio
async def test_a_fake_takes_its_place(journal: Journal) -> None:
    a = journal.thing("a")
    b = journal.thing("b", a)
    with a.override("fake") as fake:
        assert fake == "fake"
        assert a.get() == "fake"  # type: ignore[comparison-overlap]
        assert await a() == "fake"  # type: ignore[comparison-overlap]
        with a.use() as thing:
            assert thing == "fake"  # type: ignore[comparison-overlap]
        assert a.status.state == "replaced"
        assert a.status.ok
        async with open_shared(a, b):
            assert journal == ["+b"]
            assert b.get().inputs == ("fake",)
            with a.override(None):
                assert a.get() is None
            assert a.get() == "fake"  # type: ignore[comparison-overlap]
    refused(a)


@pytest.mark.anyio
async def test_what_only_a_replaced_one_needs_is_not_opened(journal: Journal) -> None:
    a = journal.thing("a")
    b = journal.thing("b", a)
    with b.override(1):
        async with open_shared(b):
            assert journal == []
            refused(a)


@pytest.mark.anyio
async def test_a_fake_may_come_and_go_while_it_is_open(journal: Journal) -> None:
    a = journal.thing("a")
    async with open_shared(a):
        with a.override(1):
            assert a.get() == 1  # type: ignore[comparison-overlap]
            assert await anyio.to_thread.run_sync(a.get) == 1  # type: ignore[comparison-overlap]
        assert a.get() is journal.made[0]


@pytest.mark.anyio
async def test_after_a_fake_nothing_is_open(journal: Journal) -> None:
    a = journal.thing("a")
    with a.override(1):
        opening = open_shared(a)
        await opening.__aenter__()
    refused(a)
    await opening.__aexit__(None, None, None)
    assert journal == []


def test_fakes_overlap_in_any_order(journal: Journal) -> None:
    a = journal.thing("a")
    one, two = a.override(list[int]()), a.override(list[int]())
    first, second = one.__enter__(), two.__enter__()
    assert first is not second
    one.__exit__(None, None, None)
    assert a.get() is second  # type: ignore[comparison-overlap]
    two.__exit__(None, None, None)
    assert not a.is_replaced


def test_fastapis_own_overrides_serve_too(journal: Journal) -> None:
    a = journal.thing("a")
    app = FastAPI()

    @app.get("/")
    async def endpoint(thing: Annotated[Any, Depends(a)]) -> Any:
        return thing

    app.dependency_overrides[a] = lambda: "fake"
    assert TestClient(app).get("/").json() == "fake"


@pytest.mark.anyio
async def test_its_status(journal: Journal, clock: Any) -> None:
    a = journal.thing("a")
    assert a.status == asyncguard.SharedStatus("a", a.declared, "closed")
    async with open_shared(a):
        clock.turn(7)
        status = a.status
        assert (status.state, status.age, status.renewals, status.last_error) == ("open", 7, 0, None)
        assert status.opened is not None
        assert (status.in_use, status.waiting) == (None, None)
        assert status.ok
    assert not a.status.ok


BAD_OPTIONS = [
    ("start_timeout", 0, ValueError),
    ("start_timeout", "1", TypeError),
    ("close_timeout", -1, ValueError),
    ("close_timeout", True, TypeError),
    ("max_age", 0, ValueError),
    ("check", 7, TypeError),
    ("name", 7, TypeError),
]


@pytest.mark.parametrize(("option", "value", "error"), BAD_OPTIONS)
def test_bad_options(option: str, value: Any, error: type[Exception]) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(error, match=f"^{option} must be "):
        shared(dict, **options)


def test_no_factory() -> None:
    with pytest.raises(
        TypeError, match=r"^shared\(\) takes a class or a function that makes an object, not 7"
    ):
        shared(7)  # type: ignore[call-overload]


@pytest.mark.anyio
async def test_limits_may_be_off(journal: Journal) -> None:
    a = journal.thing("a", start_timeout=None, close_timeout=None)
    async with open_shared(a):
        assert a.get().is_open
