"""From what a request was awaiting at its deadline to the report of it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from asyncguard._request import RequestRecord
from asyncguard.events import TimeoutClock
from asyncguard.timeouts._loops import running_loop
from asyncguard.timeouts._report import Outcome, Sight, Timeout, compose, look_at

NOTHING_SEEN = Sight((), False)


async def seen_of(
    coroutine: Any,
    begun: Callable[[], Awaitable[None]] = anyio.wait_all_tasks_blocked,
    release: Callable[[], None] = lambda: None,
) -> Sight:
    """What is seen of `coroutine` after `begun`, while it waits in a task of its own."""
    seen: list[Sight] = []
    async with anyio.create_task_group() as group:

        async def run_it() -> None:
            await coroutine

        group.start_soon(run_it)
        try:
            await begun()
            seen.append(look_at(coroutine))
        finally:
            release()
            group.cancel_scope.cancel()
    return seen[0]


def places_here(sight: Sight) -> list[tuple[str, int]]:
    """The functions and lines of this file, outermost first."""
    return [(code.co_name, line) for code, line in sight.places if code.co_filename == __file__]


# -- what it was awaiting ----------------------------------------------------------------------------


async def inner() -> None:
    await anyio.sleep_forever()  # inner


async def outer() -> None:
    await inner()  # outer


@pytest.mark.anyio
async def test_the_whole_chain_outermost_first(marked: Callable[[str], int]) -> None:
    sight = await seen_of(outer())
    assert places_here(sight) == [("outer", marked("outer")), ("inner", marked("inner"))]
    assert not sight.in_thread


@pytest.mark.anyio
async def test_what_another_drives_by_hand_is_seen_too(marked: Callable[[str], int]) -> None:
    """Nothing leads from the one to the other: the outermost one comes first."""
    driven = outer()

    class Steps:
        def __await__(self) -> Generator[Any, Any, None]:
            steps, sent = driven.__await__(), None
            while True:
                try:
                    awaited = steps.send(sent)
                except StopIteration:
                    return
                sent = yield awaited

    async def driver() -> None:
        await Steps()

    coroutine = driver()
    seen: list[Sight] = []
    async with anyio.create_task_group() as group:

        async def run_it() -> None:
            await coroutine

        group.start_soon(run_it)
        await anyio.wait_all_tasks_blocked()
        seen += [look_at(coroutine), look_at(coroutine, driven), look_at(coroutine, None, coroutine, driven)]
        group.cancel_scope.cancel()
    alone, both, twice = (places_here(sight) for sight in seen)
    assert [name for name, _ in alone] == ["driver", "__await__"]
    assert both == [*alone, ("outer", marked("outer")), ("inner", marked("inner"))]
    assert twice == both
    driven.close()


def test_a_frame_that_several_lead_to_is_seen_once() -> None:
    coroutine = inner()
    assert look_at(coroutine, coroutine) == look_at(coroutine)
    coroutine.close()


def test_before_the_first_step_only_the_beginning_is_seen() -> None:
    coroutine = inner()
    assert [name for name, _ in places_here(look_at(coroutine))] == ["inner"]
    coroutine.close()
    assert look_at(coroutine) == NOTHING_SEEN
    assert look_at(None) == NOTHING_SEEN


class Pieces:
    """The content of a response, which comes to a stop in its own way."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self.release = threading.Event()
        self._tell: Callable[[], object] = partial(running_loop().call_threadsafe, self.begun.set)

    async def wait_for_begun(self) -> None:
        with anyio.fail_after(30):
            await self.begun.wait()

    async def from_the_loop(self) -> AsyncIterator[bytes]:
        yield b"first"
        await inner()  # content

    def from_a_thread(self) -> Iterator[bytes]:
        yield b"first"
        _ = (self._tell(), self.release.wait(30))  # content in a thread

    def in_a_thread(self) -> None:
        _ = (self._tell(), self.release.wait(30))  # in a thread


async def respond(content: Any, version: str) -> None:
    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None: ...

    response = StreamingResponse(content)
    await response({"type": "http", "asgi": {"spec_version": version}}, receive, send)  # response


@pytest.mark.anyio
@pytest.mark.parametrize("version", ["2.3", "2.4"])
async def test_the_content_of_a_streaming_response(version: str, marked: Callable[[str], int]) -> None:
    """Up to 2.3 it is made in a task of its own, at the side of what is awaited."""
    coroutine = respond(Pieces().from_the_loop(), version)
    sight = await seen_of(coroutine)
    places = places_here(sight)
    assert places[0] == ("respond", marked("response"))
    assert places[-2:] == [("from_the_loop", marked("content")), ("inner", marked("inner"))]
    assert len(places) == len(set(places))
    assert not sight.in_thread


@pytest.mark.anyio
@pytest.mark.parametrize("version", ["2.3", "2.4"])
async def test_the_content_of_a_streaming_response_from_a_thread(
    version: str, marked: Callable[[str], int], anyio_backend: tuple[str, object]
) -> None:
    pieces = Pieces()
    coroutine = respond(pieces.from_a_thread(), version)
    sight = await seen_of(coroutine, pieces.wait_for_begun, pieces.release.set)
    assert sight.in_thread
    if anyio_backend[0] == "asyncio":  # trio does not tell which thread it is
        assert places_here(sight)[-1] == ("from_a_thread", marked("content in a thread"))


# -- no code of the user's is run --------------------------------------------------------------------


class Explosive:
    """Nobody may ask it anything."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the user's code was run for {name}")

    async def work(self) -> None:
        await anyio.sleep_forever()


class Agreeable:
    """As mocks and proxies do, it has every attribute: itself."""

    def __getattr__(self, name: str) -> Any:
        asked.append(name)
        assert len(asked) < 100
        return self

    async def work(self) -> None:
        await anyio.sleep_forever()


asked: list[str] = []


class LikeAResponse:
    """Not one of Starlette's."""

    @property
    def body_iterator(self) -> Any:
        raise AssertionError("the user's code was run")

    async def work(self) -> None:
        await anyio.sleep_forever()


class OwnResponse(StreamingResponse):
    """One of the user's own, which is Starlette's as well."""

    def __getattribute__(self, name: str) -> Any:
        if hands_off:
            raise AssertionError(f"the user's code was run for {name}")
        return super().__getattribute__(name)

    async def work(self) -> None:
        await anyio.sleep_forever()


hands_off: list[bool] = []


@pytest.fixture(autouse=True)
def _nothing_asked() -> Iterator[None]:
    asked.clear()
    hands_off.clear()
    yield
    assert asked == []


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [Explosive, Agreeable, LikeAResponse])
async def test_whose_method_it_is_is_not_asked(kind: type[Any]) -> None:
    sight = await seen_of(kind.work(kind()))
    assert [name for name, _ in places_here(sight)] == ["work"]


@pytest.mark.anyio
async def test_a_response_of_the_users_own_class_is_read_past_its_code() -> None:
    response = OwnResponse(Pieces().from_the_loop())
    coroutine = OwnResponse.work(response)
    async with anyio.create_task_group() as group:

        async def run_it() -> None:
            await coroutine

        group.start_soon(run_it)
        await anyio.wait_all_tasks_blocked()
        hands_off.append(True)
        sight = look_at(coroutine)
        hands_off.clear()
        group.cancel_scope.cancel()
    assert [name for name, _ in places_here(sight)] == ["work", "from_the_loop"]


@pytest.mark.anyio
@pytest.mark.parametrize("content", [Explosive, Agreeable])
async def test_the_content_of_a_response_is_not_asked_either(content: type[Any]) -> None:
    response = PlainResponse()
    response.body_iterator = content()
    sight = await seen_of(response.work())
    assert [name for name, _ in places_here(sight)] == ["work"]


class PlainResponse(Response):
    body_iterator: Any

    async def work(self) -> None:
        await anyio.sleep_forever()


@pytest.mark.anyio
async def test_a_response_without_content_has_none_to_be_seen() -> None:
    sight = await seen_of(PlainResponse().work())
    assert [name for name, _ in places_here(sight)] == ["work"]


@pytest.mark.parametrize("kind", [Explosive, Agreeable])
def test_what_is_no_coroutine_is_not_asked(kind: type[Any]) -> None:
    assert look_at(kind()) == NOTHING_SEEN


# -- in a thread -------------------------------------------------------------------------------------


async def in_a_thread(pieces: Pieces) -> None:
    await anyio.to_thread.run_sync(pieces.in_a_thread)  # waiting for it


@pytest.mark.anyio
async def test_what_runs_in_a_worker_thread(
    marked: Callable[[str], int], anyio_backend: tuple[str, object]
) -> None:
    pieces = Pieces()
    sight = await seen_of(in_a_thread(pieces), pieces.wait_for_begun, pieces.release.set)
    assert sight.in_thread
    waiting, *running = places_here(sight)
    assert waiting == ("in_a_thread", marked("waiting for it"))
    if anyio_backend[0] == "asyncio":
        assert running == [("in_a_thread", marked("in a thread"))]


# -- the report --------------------------------------------------------------------------------------


async def endpoint() -> None:
    """The one of the request."""


def here(function: Callable[..., Any], after: int = 1) -> tuple[Any, int]:
    code = function.__code__
    return code, code.co_firstlineno + after


def library() -> Any:
    """Code that is no user's."""
    return pytest.raises.__code__, 1


def make_timeout(*places: Any, **changes: Any) -> Timeout:
    scope = {"type": "http", "method": "GET", "path": "/users/7", "endpoint": endpoint}
    values: dict[str, Any] = {
        "record": RequestRecord(scope, 0.0),
        "path": "/users/7",
        "clock": "response",
        "limit": 30.0,
        "noticed": 5000.0,
        "elapsed": 30.004,
        "loop_time": 0.25,
        "sight": Sight(places, False),
        "outcome": "stopped",
    }
    return Timeout(**(values | changes))


def test_a_report_says_all_that_is_known() -> None:
    report = compose(make_timeout(here(outer), here(inner)), None)
    assert (report.noticed, report.request, report.path) == (5000.0, "GET /users/7", "/users/7")
    assert (report.clock, report.limit, report.elapsed) == ("response", 30.0, 30.004)
    assert (report.loop_time, report.outcome) == (0.25, "stopped")
    assert [line.function for line in report.stack] == ["outer", "inner"]
    assert report.line == report.stack[-1]
    assert report.line.source == "await anyio.sleep_forever()  # inner"


def test_reports_are_numbered() -> None:
    first, second = (compose(make_timeout(), None) for _ in range(2))
    assert second.id == first.id + 1


def test_lines_of_libraries_are_left_out() -> None:
    report = compose(make_timeout(library(), here(outer), library(), here(inner), library()), None)
    assert [line.function for line in report.stack] == ["outer", "inner"]


def test_only_what_is_below_the_project_root_is_the_users(tmp_path: Path) -> None:
    timeout = make_timeout(here(outer))
    assert len(compose(timeout, str(Path(__file__).resolve().parent)).stack) == 1
    assert compose(timeout, str(tmp_path)).stack == ()


def test_without_a_line_of_the_users_the_endpoint_is_named() -> None:
    report = compose(make_timeout(library()), None)
    assert report.stack == ()
    assert report.line is not None
    assert (report.line.function, report.line.source) == ("endpoint", "async def endpoint() -> None:")
    assert "; in the endpoint " in str(report)


def test_before_routing_there_is_no_line_at_all() -> None:
    record = RequestRecord({"type": "http", "method": "GET", "path": "/users/7"}, 0.0)
    report = compose(make_timeout(record=record), None)
    assert report.line is None
    assert str(report) == "GET /users/7 got no answer in 30.0 s"


@pytest.mark.parametrize(
    ("clock", "said"),
    [
        ("response", "got no answer in 30.0 s"),
        ("idle", "was cut off: nothing of its response was sent for 30.0 s"),
        ("body", "was refused: its body did not come in 30.0 s"),
    ],
)
@pytest.mark.parametrize(
    ("outcome", "went_on"),
    [
        ("stopped", ""),
        ("thread", "; it runs on in its thread"),
        ("shielded", "; it is shielded from cancellation and runs on"),
        ("running", "; it was cancelled, and runs on"),
    ],
)
def test_the_sentence_of_each_clock_and_outcome(
    clock: TimeoutClock, said: str, outcome: Outcome, went_on: str
) -> None:
    report = compose(make_timeout(here(inner), clock=clock, outcome=outcome), None)
    assert str(report) == f"GET /users/7 {said}; awaiting {report.line}{went_on}"
