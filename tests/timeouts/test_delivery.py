"""An answer goes out at the side of the handler, or is given up in time."""

from __future__ import annotations

import logging
from contextvars import Context, ContextVar, copy_context

import anyio
import anyio.lowlevel
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard.timeouts._delivery import Delivery
from asyncguard.timeouts._loops import running_loop

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable", default="")

SCOPE: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
PLAIN = PlainTextResponse("plain", status_code=504)


class Server:
    """What takes the answer."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]

    @property
    def statuses(self) -> list[int]:
        return [message["status"] for message in self.sent if message["type"] == "http.response.start"]


def deliver(
    answer: ASGIApp, send: Send, fallback: ASGIApp = PLAIN, context: Context | None = None
) -> Delivery:
    made = copy_context() if context is None else context
    return Delivery(answer, fallback, SCOPE, send, running_loop(), made)


class Answer:
    """One that comes to a stop, before it has sent anything or afterwards."""

    def __init__(self, *messages: Message) -> None:
        self.release = anyio.Event()
        self.stopped = False
        self._began = anyio.Event()
        self._messages = messages

    async def has_begun(self) -> None:
        with anyio.fail_after(30):
            await self._began.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in self._messages:
            await send(message)
        self._began.set()
        try:
            await self.release.wait()
        except anyio.get_cancelled_exc_class():
            self.stopped = True
            raise


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"piece", "more_body": True}


async def ended(delivery: Delivery) -> None:
    with anyio.fail_after(30):
        while not delivery.over:
            await anyio.lowlevel.checkpoint()


# -- the answer --------------------------------------------------------------------------------------


async def test_an_answer_goes_out_while_the_one_who_asked_goes_on() -> None:
    server = Server()
    delivery = deliver(PlainTextResponse("sorry", status_code=503), server.send)
    assert not delivery.over
    assert not delivery.begun
    await ended(delivery)
    assert delivery.begun
    assert (server.statuses, server.bodies) == ([503], [b"sorry"])


async def test_it_is_begun_as_soon_as_something_is_to_be_sent() -> None:
    seen: list[bool] = []

    async def send(message: Message) -> None:
        seen.append(delivery.begun)

    delivery = deliver(PLAIN, send)
    await ended(delivery)
    assert seen == [True, True]


async def test_it_is_given_the_scope_of_the_request() -> None:
    seen: list[Scope] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    await ended(deliver(answer, Server().send, answer))
    assert seen[0] is seen[1] is SCOPE


async def test_it_runs_in_the_context_that_was_given() -> None:
    seen: list[str] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(variable.get())
        await anyio.lowlevel.checkpoint()
        variable.set("by the answer")
        await send(BODY)

    async def send(message: Message) -> None:
        seen.append(variable.get())

    context = copy_context()
    context.run(variable.set, "given")
    variable.set("of the one who asked")
    await ended(deliver(answer, send, context=context))
    assert seen == ["given", "by the answer"]
    assert variable.get() == "of the one who asked"


async def test_headers_are_a_fresh_list_each_time() -> None:
    """The answer may be the same object for every request, and a middleware adds to what it passes on."""
    answer = PlainTextResponse("sorry")
    own = list(answer.raw_headers)
    server = Server()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["headers"] == own
            message["headers"].append((b"x-request-id", b"7"))
            message["status"] = 500
        await server.send(message)

    for _ in range(2):
        await ended(deliver(answer, send))
    assert answer.raw_headers == own
    assert len(server.sent) == 4


async def test_headers_may_be_any_iterable_or_none_at_all() -> None:
    messages: list[Message] = [
        {"type": "http.response.start", "status": 200, "headers": ((b"a", b"1"),)},
        {"type": "http.response.start", "status": 200},
    ]

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    server = Server()
    await ended(deliver(answer, server.send))
    assert [message["headers"] for message in server.sent] == [[(b"a", b"1")], []]
    assert "headers" not in messages[1]


async def test_it_receives_one_empty_body_and_then_nothing() -> None:
    received: list[Message] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            received.append(await receive())
            assert len(received) < 100

    delivery = deliver(answer, Server().send)
    await anyio.wait_all_tasks_blocked()
    assert received == [{"type": "http.request", "body": b"", "more_body": False}]
    assert not delivery.over
    delivery.cancel()
    await ended(delivery)


# -- one that fails ----------------------------------------------------------------------------------


def failing(*messages: Message, error: Exception | None = None) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        raise error or LookupError("no such page")

    return answer


async def test_if_it_fails_before_it_has_sent_anything_the_fallback_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server()
    answer = failing()
    await ended(deliver(answer, server.send))
    assert (server.statuses, server.bodies) == ([504], [b"plain"])
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asyncguard.timeouts", logging.ERROR)
    assert record.getMessage() == f"the answer to a request that ran out of time failed: {answer!r}"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_if_it_ends_without_a_word_the_fallback_answers(caplog: pytest.LogCaptureFixture) -> None:
    async def mute(scope: Scope, receive: Receive, send: Send) -> None: ...

    server = Server()
    await ended(deliver(mute, server.send))
    assert (server.statuses, server.bodies) == ([504], [b"plain"])
    assert not caplog.records


@pytest.mark.parametrize("messages", [(START,), (START, BODY)])
async def test_if_it_fails_afterwards_nothing_more_is_sent(
    messages: tuple[Message, ...], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    await ended(deliver(failing(*messages), server.send))
    assert server.sent == list(messages)
    assert len(caplog.records) == 1


async def test_if_the_server_refuses_the_beginning_there_is_no_second_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may have taken some of it."""
    asked: list[Message] = []

    async def send(message: Message) -> None:
        asked.append(message)
        raise ConnectionResetError("gone")

    delivery = deliver(PLAIN, send)
    await ended(delivery)
    assert len(asked) == 1
    assert delivery.begun
    assert len(caplog.records) == 1


async def test_a_fallback_that_fails_too_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    await ended(deliver(failing(), server.send, failing(error=ValueError("nor that"))))
    assert server.sent == []
    assert [record.getMessage() for record in caplog.records][1] == (
        "a request that ran out of time could not be answered"
    )
    assert len(caplog.records) == 2


async def test_the_fallback_receives_an_empty_body_too() -> None:
    received: list[Message] = []

    async def fallback(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())

    await ended(deliver(failing(), Server().send, fallback))
    assert received == [{"type": "http.request", "body": b"", "more_body": False}]


# -- waiting for it ----------------------------------------------------------------------------------


async def test_who_waits_is_told_of_the_end() -> None:
    server = Server()
    answer = Answer(START)
    delivery = deliver(answer, server.send)
    steps: list[str] = []

    async def wait() -> None:
        await delivery.wait(3600)
        steps.append("over")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await answer.has_begun()
            await anyio.wait_all_tasks_blocked()
            assert steps == []
            answer.release.set()
    assert steps == ["over"]
    assert delivery.over
    assert not answer.stopped


@pytest.mark.parametrize("answer", [PLAIN, failing(), failing(START)], ids=["good", "bad", "begun"])
async def test_however_it_ends_nobody_waits_longer(answer: ASGIApp) -> None:
    delivery = deliver(answer, Server().send)
    with anyio.fail_after(30):
        await delivery.wait(3600)
    assert delivery.over


async def test_after_the_end_there_is_nothing_to_wait_for() -> None:
    delivery = deliver(PLAIN, Server().send)
    await ended(delivery)
    with anyio.fail_after(30):
        await delivery.wait(3600)
        await delivery.wait(0)
    delivery.cancel()


@pytest.mark.parametrize("messages", [(), (START,)])
async def test_after_its_seconds_it_is_given_up(messages: tuple[Message, ...]) -> None:
    server = Server()
    answer = Answer(*messages)
    delivery = deliver(answer, server.send)
    await answer.has_begun()
    await delivery.wait(0.001)
    await ended(delivery)
    assert answer.stopped
    assert server.sent == list(messages)  # being stopped is no failure to answer for


async def test_if_the_one_who_waits_is_cancelled_it_is_given_up() -> None:
    answer = Answer()
    delivery = deliver(answer, Server().send)
    await answer.has_begun()
    steps: list[str] = []

    async def wait() -> None:
        await delivery.wait(3600)
        steps.append("never")

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    await ended(delivery)
    assert answer.stopped
    assert not steps


async def test_it_can_be_stopped_by_anybody() -> None:
    answer = Answer()
    delivery = deliver(answer, Server().send)
    await answer.has_begun()
    steps: list[str] = []

    async def wait() -> None:
        await delivery.wait(3600)
        steps.append("over")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            delivery.cancel()
    assert steps == ["over"]
    assert answer.stopped
    delivery.cancel()


async def test_it_is_not_stopped_with_the_code_that_asked_for_it() -> None:
    answer = Answer(START)
    made: list[Delivery] = []
    server = Server()
    with anyio.CancelScope() as scope:
        made.append(deliver(answer, server.send))
        await answer.has_begun()
        scope.cancel()
        await anyio.sleep_forever()
    await anyio.wait_all_tasks_blocked()
    assert not made[0].over
    answer.release.set()
    await ended(made[0])
    assert not answer.stopped
