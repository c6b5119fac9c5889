"""`@timeout` says how long a request may take, and leaves the function as it is."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.types import Message, Scope

from asyncguard._request import SCOPE_KEY, RequestRecord, current_request
from asyncguard.timeouts import _limit
from asyncguard.timeouts._limit import declared_limit, timeout


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limit, "shortest", math.inf)
    monkeypatch.setattr(_limit, "_warned", set())


class FakeDeadline:
    """Takes down which limits a request was given, and on which thread."""

    header = None

    def __init__(self) -> None:
        self.limits: list[float | None] = []
        self.threads: list[int] = []

    def left(self) -> float:
        return math.inf

    def retune(self, seconds: float | None) -> None:
        self.limits.append(seconds)
        self.threads.append(threading.get_ident())


def new_record(path: str = "/", **scope: Any) -> RequestRecord:
    return RequestRecord({"type": "http", "method": "GET", "path": path} | scope, 0.0)


@pytest.fixture
def deadline() -> Iterator[FakeDeadline]:
    """That of the request that the test's code works for."""
    deadline, record = FakeDeadline(), new_record()
    record.deadline = deadline
    token = current_request.set(record)
    yield deadline
    current_request.reset(token)


# -- what is decorated stays what it is --------------------------------------------------------------


async def asynchronous(user: int, *, full: bool = False) -> str:
    """Says it all."""
    return f"{user} {full}"


def plain(user: int, *, full: bool = False) -> str:
    """Says it all."""
    return f"{user} {full}"


def generator(user: int, *, full: bool = False) -> Iterator[str]:
    """Says it all."""
    yield f"{user} {full}"


async def asynchronous_generator(user: int, *, full: bool = False) -> AsyncIterator[str]:
    """Says it all."""
    yield f"{user} {full}"


FUNCTIONS: list[Callable[..., Any]] = [asynchronous, plain, generator, asynchronous_generator]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_name_doc_and_signature_stay(function: Callable[..., Any]) -> None:
    decorated = timeout(5)(function)
    assert decorated is not function
    assert decorated.__name__ == function.__name__
    assert decorated.__qualname__ == function.__qualname__
    assert decorated.__module__ == function.__module__
    assert decorated.__doc__ == "Says it all."
    assert inspect.signature(decorated) == inspect.signature(function)
    assert inspect.unwrap(decorated) is function


@pytest.mark.parametrize("function", [*FUNCTIONS, *(functools.partial(found, 7) for found in FUNCTIONS)])
def test_a_function_stays_of_its_kind(function: Callable[..., Any]) -> None:
    """Frameworks look at it: whether to await it, to iterate over it or to put it into a thread."""
    for decorated in (timeout(5)(function), timeout(5)(timeout(7)(function))):
        for is_of_that_kind in (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        ):
            assert is_of_that_kind(decorated) == is_of_that_kind(function)


@pytest.mark.anyio
async def test_arguments_go_in_and_the_result_comes_out() -> None:
    assert await timeout(5)(asynchronous)(7, full=True) == "7 True"
    assert timeout(5)(plain)(7, full=True) == "7 True"
    assert list(timeout(5)(generator)(7, full=True)) == ["7 True"]
    assert [said async for said in timeout(5)(asynchronous_generator)(7, full=True)] == ["7 True"]


class Views:
    def method(self) -> Views:
        return self

    async def coroutine_method(self) -> Views:
        return self


@pytest.mark.anyio
async def test_methods_and_partials() -> None:
    views = Views()
    assert timeout(5)(views.method)() is views
    assert await timeout(5)(views.coroutine_method)() is views
    assert timeout(5)(functools.partial(functools.partial(plain, 7), full=True))() == "7 True"
    partial = timeout(5)(functools.partial(asynchronous, 7))
    assert inspect.iscoroutinefunction(partial)
    assert await partial() == "7 False"


class Callable_:  # noqa: N801
    def __call__(self) -> None: ...


@pytest.mark.parametrize("value", [7, None, "endpoint", print, len, Callable_(), staticmethod(plain)])
def test_what_is_no_python_function_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        timeout(5)(value)
    assert str(caught.value) == f"@timeout decorates an endpoint, which {value!r} is not"


def test_a_partial_of_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^@timeout decorates an endpoint, which functools\.partial\("):
        timeout(5)(functools.partial(print, "!"))


def test_of_a_class_the_methods_are_decorated() -> None:
    with pytest.raises(TypeError) as caught:
        timeout(5)(Views)
    assert (
        str(caught.value) == f"@timeout decorates an endpoint, which {Views!r} is not; decorate its methods"
    )


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_seconds_that_are_out_of_range(seconds: float) -> None:
    with pytest.raises(
        ValueError, match=r"^timeout must be a finite number of seconds greater than 0"
    ) as caught:
        timeout(seconds)
    assert str(caught.value).endswith(repr(seconds))


@pytest.mark.parametrize("seconds", ["5", True, [5], plain])
def test_seconds_that_are_no_number(seconds: Any) -> None:
    """``@timeout`` without its brackets, for one."""
    with pytest.raises(TypeError) as caught:
        timeout(seconds)
    assert str(caught.value) == f"timeout must be a number of seconds, not {seconds!r}"


def test_none_is_any_time() -> None:
    assert timeout(None).seconds is None
    assert timeout(5).seconds == 5.0


# -- generators go on as they would without it -------------------------------------------------------


class Dialogue:
    """What is said to a generator, and what it makes of it."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def speak(self) -> Generator[str, str, str]:
        try:
            for number in range(10):
                try:
                    self.heard.append((yield f"piece {number}"))
                except LookupError as error:
                    self.heard.append(error)
                    if not error.args:
                        return "enough"
        finally:
            self.heard.append("finally")
        return "the end"

    async def speak_asynchronously(self) -> AsyncGenerator[str, str]:
        try:
            for number in range(10):
                try:
                    self.heard.append((yield f"piece {number}"))
                except LookupError as error:
                    self.heard.append(error)
                    if not error.args:
                        return
        finally:
            await anyio.lowlevel.checkpoint()
            self.heard.append("finally")


def test_what_is_sent_to_a_generator_arrives() -> None:
    dialogue, error = Dialogue(), LookupError("no such thing")
    generator = timeout(5)(dialogue.speak)()
    assert next(generator) == "piece 0"
    assert generator.send("go on") == "piece 1"
    assert generator.throw(error) == "piece 2"
    with pytest.raises(StopIteration) as caught:
        generator.throw(LookupError())
    assert caught.value.value == "enough"
    assert dialogue.heard[:2] == ["go on", error]
    assert dialogue.heard[3:] == ["finally"]


def test_a_generator_that_is_closed_cleans_up() -> None:
    dialogue = Dialogue()
    generator = timeout(5)(dialogue.speak)()
    next(generator)
    generator.close()
    assert dialogue.heard == ["finally"]


@pytest.mark.anyio
async def test_what_is_sent_to_an_asynchronous_generator_arrives() -> None:
    dialogue, error = Dialogue(), LookupError("no such thing")
    generator = timeout(5)(dialogue.speak_asynchronously)()
    assert await anext(generator) == "piece 0"
    assert await generator.asend("go on") == "piece 1"
    assert await generator.athrow(error) == "piece 2"
    with pytest.raises(StopAsyncIteration):
        await generator.athrow(LookupError())
    assert dialogue.heard[:2] == ["go on", error]
    assert dialogue.heard[3:] == ["finally"]
    with pytest.raises(StopAsyncIteration):
        await anext(generator)


@pytest.mark.anyio
async def test_an_asynchronous_generator_that_is_closed_cleans_up_before_that_returns() -> None:
    dialogue = Dialogue()
    generator = timeout(5)(dialogue.speak_asynchronously)()
    await anext(generator)
    await generator.aclose()
    assert dialogue.heard == ["finally"]
    await generator.aclose()
    assert dialogue.heard == ["finally"]


@pytest.mark.anyio
async def test_an_asynchronous_generator_that_was_never_begun_is_closed() -> None:
    dialogue = Dialogue()
    await timeout(5)(dialogue.speak_asynchronously)().aclose()
    assert dialogue.heard == []


@pytest.mark.anyio
async def test_an_error_of_an_asynchronous_generator_comes_out() -> None:
    @timeout(5)
    async def broken() -> AsyncGenerator[int, None]:
        yield 1
        raise LookupError("no such thing")

    generator = broken()
    assert await anext(generator) == 1
    with pytest.raises(LookupError, match="no such thing"):
        await anext(generator)


@pytest.mark.anyio
async def test_an_error_that_is_thrown_in_and_not_caught_comes_out_as_it_is() -> None:
    @timeout(5)
    async def numbers() -> AsyncGenerator[int, None]:
        yield 1

    error = ValueError("thrown in")
    generator = numbers()
    await anext(generator)
    with pytest.raises(ValueError, match="thrown in") as caught:
        await generator.athrow(error)
    assert caught.value is error


@pytest.mark.anyio
async def test_an_asynchronous_generator_is_cancelled_where_it_waits() -> None:
    steps: list[str] = []

    @timeout(5)
    async def waiting() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            steps.append("finally")

    async with anyio.create_task_group() as group:

        async def work() -> None:
            async for number in waiting():
                assert number == 1
                steps.append("a piece")

        group.start_soon(work)
        await anyio.wait_all_tasks_blocked()
        assert steps == ["a piece"]
        group.cancel_scope.cancel()
    assert steps == ["a piece", "finally"]


@pytest.mark.anyio
async def test_a_context_manager_of_a_limited_generator() -> None:
    dialogue = Dialogue()
    async with asynccontextmanager(timeout(5)(dialogue.speak_asynchronously))() as piece:
        assert piece == "piece 0"
        raise LookupError
    assert dialogue.heard[-1] == "finally"


# -- what is known before the function is called -----------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_endpoint_tells_its_limit(function: Callable[..., Any]) -> None:
    limit = timeout(5)
    assert declared_limit(limit(function)) is limit
    assert declared_limit(function) is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_of_several_decorators_the_innermost_is_told(function: Callable[..., Any]) -> None:
    innermost = timeout(10)
    assert declared_limit(timeout(5)(timeout(None)(innermost(function)))) is innermost


def test_a_partial_of_a_limited_function_has_no_limit_before_it_is_called() -> None:
    assert declared_limit(functools.partial(timeout(5)(plain), 7)) is None


def test_a_decorator_further_out_passes_the_limit_on() -> None:
    limit = timeout(5)
    decorated = limit(plain)

    @functools.wraps(decorated)
    def further_out(*args: Any, **kwargs: Any) -> Any:
        return decorated(*args, **kwargs)

    assert declared_limit(further_out) is limit


def test_what_is_no_limit_of_ours() -> None:
    def impostor() -> None: ...

    setattr(impostor, _limit._MARK, 5)
    assert declared_limit(impostor) is None
    assert declared_limit(None) is None


@pytest.mark.parametrize("function", [*FUNCTIONS, functools.partial(plain, 7)])
def test_the_shortest_limit_of_any_function(function: Callable[..., Any]) -> None:
    assert _limit.shortest == math.inf
    timeout(None)(function)
    assert _limit.shortest == math.inf
    timeout(5)(function)
    timeout(7)(function)
    assert _limit.shortest == 5


# -- when it is called -------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", [5.0, None])
async def test_the_limit_takes_effect_when_the_function_is_called(
    deadline: FakeDeadline, seconds: float | None
) -> None:
    decorated = [timeout(seconds)(function) for function in FUNCTIONS]
    assert deadline.limits == []
    await decorated[0](7)
    decorated[1](7)
    assert deadline.limits == [seconds] * 2
    numbers, asynchronous_numbers = (function(7) for function in decorated[2:])
    assert deadline.limits == [seconds] * 2  # nothing of a generator runs before its first step
    assert next(numbers) == await anext(asynchronous_numbers) == "7 False"
    assert deadline.limits == [seconds] * 4
    assert [list(numbers), [said async for said in asynchronous_numbers]] == [[], []]
    assert deadline.limits == [seconds] * 4


def test_of_nested_decorators_the_innermost_holds(deadline: FakeDeadline) -> None:
    @timeout(5)
    @timeout(10)
    def endpoint() -> None: ...

    endpoint()
    assert deadline.limits == [5, 10]


@pytest.mark.anyio
async def test_without_an_endpoint_it_is_awaited_once_or_often(deadline: FakeDeadline) -> None:
    limit = timeout(5)
    for _ in range(2):
        await limit()
    assert deadline.limits == [5, 5]


@contextmanager
def request_to(endpoint: object) -> Iterator[tuple[RequestRecord, FakeDeadline]]:
    """The code inside works for a request whose route is known."""
    record, deadline = new_record(endpoint=endpoint), FakeDeadline()
    record.deadline = deadline
    token = current_request.set(record)
    try:
        yield record, deadline
    finally:
        current_request.reset(token)


@pytest.mark.anyio
async def test_the_limit_of_an_endpoint_holds_for_its_dependencies() -> None:
    with request_to(timeout(10)(plain)) as (record, deadline):
        await timeout(5)()
        timeout(7)(plain)(7)
    assert deadline.limits == [10, 10]
    assert not record.limited


@pytest.mark.anyio
async def test_once_the_endpoint_has_been_called_what_it_calls_may_set_another_limit() -> None:
    inner = timeout(60)(plain)

    @timeout(10)
    def endpoint() -> None:
        inner(7)

    with request_to(endpoint) as (record, deadline):
        endpoint()
        assert record.limited
    assert deadline.limits == [10, 60]


@pytest.mark.anyio
async def test_of_nested_decorators_of_an_endpoint_the_innermost_holds_from_the_beginning() -> None:
    endpoint = timeout(5)(timeout(10)(asynchronous))
    with request_to(endpoint) as (record, deadline):
        await endpoint(7)
        assert record.limited
    assert deadline.limits == [10, 10]


@pytest.mark.anyio
@pytest.mark.parametrize("endpoint", [plain, None], ids=["undecorated", "not yet known"])
async def test_where_the_endpoint_has_no_limit_the_last_one_called_holds(endpoint: object) -> None:
    with request_to(endpoint) as (record, deadline):
        await timeout(5)()
        timeout(7)(plain)(7)
        assert not record.limited
    assert deadline.limits == [5, 7]


@pytest.mark.anyio
async def test_the_same_limit_may_be_of_an_endpoint_and_of_its_router() -> None:
    limit = timeout(5)
    endpoint = limit(plain)
    with request_to(endpoint) as (_, deadline):
        await limit()
        endpoint(7)
    assert deadline.limits == [5, 5]


@pytest.mark.anyio
async def test_outside_a_request_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert timeout(5)(plain)(7) == "7 False"
    await timeout(5)()
    assert not caplog.records


def test_without_a_guard_there_is_a_warning_once_for_each_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    decorated = timeout(5)(plain)
    for path in ("/a", "/b", "/a"):
        token = current_request.set(new_record(path))
        decorated(7)
        current_request.reset(token)
    assert [record.getMessage() for record in caplog.records] == [
        f"@timeout has no effect on GET {path}: no TimeoutMiddleware guards the application; "
        "pass timeout= to asyncguard.install()"
        for path in ("/a", "/b")
    ]
    assert {(record.name, record.levelno) for record in caplog.records} == {
        ("asyncguard.timeouts", logging.WARNING)
    }


def test_warnings_end_where_every_path_is_another(caplog: pytest.LogCaptureFixture) -> None:
    decorated = timeout(5)(plain)
    for number in range(1010):
        token = current_request.set(new_record(f"/{number}"))
        decorated(7)
        current_request.reset(token)
    assert len(caplog.records) == 1000


def test_after_the_end_of_a_request_there_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    record = new_record()
    record.deadline = FakeDeadline()
    record.finish()
    token = current_request.set(record)
    timeout(5)(plain)(7)
    current_request.reset(token)
    assert not caplog.records


# -- in FastAPI --------------------------------------------------------------------------------------


async def call(app: FastAPI, path: str) -> tuple[FakeDeadline, bytes]:
    """Send one request; which limits it was given, and the body of the answer."""
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("localhost", 80),
        "root_path": "",
    }
    deadline = FakeDeadline()
    record = scope[SCOPE_KEY] = RequestRecord(scope, 0.0)
    record.deadline = deadline
    sent: list[Message] = []
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await anyio.sleep_forever()
        asked = True
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    token = current_request.set(record)
    try:
        await app(scope, receive, send)
    finally:
        current_request.reset(token)
    assert sent[0]["status"] == 200
    return deadline, b"".join(message.get("body", b"") for message in sent)


@pytest.mark.anyio
async def test_a_dependency_is_awaited_on_the_loop() -> None:
    app = FastAPI()
    router = APIRouter(dependencies=[Depends(timeout(5))])

    @router.get("/")
    async def endpoint() -> int:
        return 1

    app.include_router(router)
    deadline, body = await call(app, "/")
    assert (deadline.limits, body) == ([5], b"1")
    assert deadline.threads == [threading.get_ident()]


@pytest.mark.anyio
async def test_of_several_dependencies_the_innermost_holds() -> None:
    app = FastAPI(dependencies=[Depends(timeout(5))])
    router = APIRouter(dependencies=[Depends(timeout(6))])

    @router.get("/undecorated", dependencies=[Depends(timeout(7))])
    async def undecorated() -> None: ...

    @router.get("/decorated", dependencies=[Depends(timeout(7))])
    @timeout(8)
    async def decorated() -> None: ...

    app.include_router(router)
    assert (await call(app, "/undecorated"))[0].limits == [5, 6, 7]
    assert (await call(app, "/decorated"))[0].limits == [8, 8, 8, 8]


@pytest.mark.anyio
async def test_a_limit_adds_nothing_to_the_schema() -> None:
    def make(limited: bool) -> FastAPI:
        dependencies = [Depends(timeout(5))] if limited else []
        app = FastAPI(dependencies=dependencies)

        async def endpoint(user: int, full: bool = False) -> str:
            """Says it all."""
            return ""

        def plain_endpoint(user: int) -> str:
            return ""

        app.get("/a/{user}", dependencies=dependencies)(timeout(5)(endpoint) if limited else endpoint)
        app.get("/b/{user}")(timeout(5)(plain_endpoint) if limited else plain_endpoint)
        return app

    assert make(True).openapi() == make(False).openapi()


@pytest.mark.anyio
async def test_a_plain_endpoint_stays_in_its_thread() -> None:
    app = FastAPI()
    threads: list[int] = []

    @app.get("/")
    @timeout(5)
    def endpoint() -> None:
        threads.append(threading.get_ident())

    deadline, _ = await call(app, "/")
    assert deadline.limits == [5]
    assert deadline.threads == threads != [threading.get_ident()]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["generator", "asynchronous generator"])
async def test_a_dependency_that_yields_is_cleaned_up(kind: str) -> None:
    app = FastAPI()
    steps: list[str] = []

    @timeout(5)
    def connection() -> Iterator[str]:
        steps.append("opened")
        yield "connection"
        steps.append("closed")

    @timeout(5)
    async def asynchronous_connection() -> AsyncIterator[str]:
        steps.append("opened")
        yield "connection"
        steps.append("closed")

    used = Depends(connection if kind == "generator" else asynchronous_connection)

    @app.get("/")
    async def endpoint(value: str = used) -> str:
        steps.append("used")
        return value

    deadline, body = await call(app, "/")
    assert (deadline.limits, body) == ([5], b'"connection"')
    assert steps == ["opened", "used", "closed"]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["generator", "asynchronous generator"])
async def test_an_endpoint_that_yields_answers_as_without_a_limit(kind: str) -> None:
    def numbers() -> Iterator[int]:
        yield from (1, 2)

    async def asynchronous_numbers() -> AsyncIterator[int]:
        for number in (1, 2):
            yield number

    function: Callable[..., Any] = numbers if kind == "generator" else asynchronous_numbers
    app = FastAPI()
    app.get("/unlimited")(function)
    app.get("/limited")(timeout(5)(function))
    unlimited, expected = await call(app, "/unlimited")
    limited, body = await call(app, "/limited")
    assert body == expected
    assert (unlimited.limits, limited.limits) == ([], [5])
