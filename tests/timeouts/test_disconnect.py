"""One piece of the body is received ahead of the application, and what comes after the last one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar

import anyio
import anyio.lowlevel
import pytest
from starlette.types import Message

from asyncguard.timeouts._disconnect import Listener
from asyncguard.timeouts._loops import running_loop

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable", default="")

LAST: Message = {"type": "http.request", "body": b"last"}
DISCONNECT: Message = {"type": "http.disconnect"}


def piece(number: int) -> Message:
    return {"type": "http.request", "body": b"%d" % number, "more_body": True}


class Client:
    """What comes in, and how much of it was asked for."""

    def __init__(self, *messages: Message | Exception) -> None:
        self.asked = 0
        self.stopped = False
        self._messages = list(messages)

    async def receive(self) -> Message:
        self.asked += 1
        try:
            await anyio.lowlevel.checkpoint()
            if not self._messages:
                await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.stopped = True
            raise
        message = self._messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message


def listen(client: Client, on_leave: Callable[[], None] = lambda: None) -> Listener:
    return Listener(running_loop(), client.receive, on_leave)


async def test_one_piece_ahead_and_no_more() -> None:
    client = Client(*map(piece, range(5)))
    listener = listen(client)
    await anyio.wait_all_tasks_blocked()
    assert client.asked == 1
    for number in range(3):
        assert await listener.receive() == piece(number)
        await anyio.wait_all_tasks_blocked()
        assert client.asked == number + 2
    listener.cancel()


async def test_the_order_is_kept() -> None:
    messages = [*map(piece, range(20)), LAST, DISCONNECT]
    listener = listen(Client(*messages))
    assert [await listener.receive() for _ in messages] == messages


async def test_an_application_that_is_faster_than_its_client_waits() -> None:
    sent, received = anyio.create_memory_object_stream[Message](0)
    listener = Listener(running_loop(), received.receive, lambda: None)
    seen: list[Message] = []

    async def application() -> None:
        while True:
            seen.append(await listener.receive())

    async with anyio.create_task_group() as group, sent, received:
        group.start_soon(application)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            assert len(seen) == number
            await sent.send(piece(number))
        await anyio.wait_all_tasks_blocked()
        assert seen == [piece(0), piece(1), piece(2)]
        listener.cancel()
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()


async def test_two_who_receive_at_once_both_get_on() -> None:
    sent, received = anyio.create_memory_object_stream[Message](0)
    listener = Listener(running_loop(), received.receive, lambda: None)
    seen: list[tuple[str, Message]] = []

    async def application(name: str) -> None:
        for _ in range(2):
            message = await listener.receive()
            seen.append((name, message))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group, sent, received:
            for name in ("first", "second"):
                group.start_soon(application, name)
            for number in range(4):
                await anyio.wait_all_tasks_blocked()
                assert len(seen) == number
                await sent.send(piece(number))
            await anyio.wait_all_tasks_blocked()
            listener.cancel()
            await anyio.wait_all_tasks_blocked()
    assert [message for _, message in seen] == list(map(piece, range(4)))
    assert sorted(name for name, _ in seen) == ["first", "first", "second", "second"]


@pytest.mark.parametrize("end", [DISCONNECT, ConnectionResetError("gone")], ids=["left", "failed"])
async def test_all_who_receive_at_once_are_told_of_the_end(end: Message | Exception) -> None:
    release = anyio.Event()
    seen: list[object] = []

    async def receive() -> Message:
        await release.wait()
        if isinstance(end, Exception):
            raise end
        return end

    listener = Listener(running_loop(), receive, lambda: None)

    async def application() -> None:
        try:
            seen.append(await listener.receive())
        except ConnectionResetError as error:
            seen.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(application)
            await anyio.wait_all_tasks_blocked()
            release.set()
    assert seen == [end] * 3


async def test_one_who_gives_up_receiving_takes_nothing_from_another() -> None:
    sent, received = anyio.create_memory_object_stream[Message](0)
    listener = Listener(running_loop(), received.receive, lambda: None)
    seen: list[Message] = []

    async def application(scope: anyio.CancelScope) -> None:
        with scope:
            seen.append(await listener.receive())

    impatient = anyio.CancelScope()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group, sent, received:
            for scope in (impatient, anyio.CancelScope()):
                group.start_soon(application, scope)
            await anyio.wait_all_tasks_blocked()
            impatient.cancel()
            await anyio.wait_all_tasks_blocked()
            await sent.send(LAST)
            await anyio.wait_all_tasks_blocked()
            listener.cancel()
            await anyio.wait_all_tasks_blocked()
    assert seen == [LAST]


async def test_the_clients_leaving_is_noticed_while_the_application_does_something_else() -> None:
    steps: list[str] = []
    client = Client(DISCONNECT)
    listener = listen(client, lambda: steps.append("left"))
    await anyio.wait_all_tasks_blocked()
    assert steps == ["left"]
    for _ in range(3):
        assert await listener.receive() == DISCONNECT
    await anyio.wait_all_tasks_blocked()
    assert steps == ["left"]
    assert client.asked == 1


async def test_behind_a_message_that_waits_nobody_notices_it_leave() -> None:
    steps: list[str] = []
    listener = listen(Client(piece(0), DISCONNECT), lambda: steps.append("left"))
    await anyio.wait_all_tasks_blocked()
    assert steps == []
    assert await listener.receive() == piece(0)
    await anyio.wait_all_tasks_blocked()
    assert steps == ["left"]
    assert await listener.receive() == DISCONNECT


async def test_behind_the_last_piece_its_leaving_is_noticed() -> None:
    steps: list[str] = []
    client = Client(LAST, DISCONNECT)
    listener = listen(client, lambda: steps.append("left"))
    await anyio.wait_all_tasks_blocked()
    assert steps == ["left"]
    assert await listener.receive() == LAST
    for _ in range(2):
        assert await listener.receive() == DISCONNECT
    assert client.asked == 2
    assert steps == ["left"]


async def test_a_receive_that_never_waits_is_not_asked_for_ever() -> None:
    """Some servers and test clients say again and again that the body is complete."""
    asked = 0

    async def receive() -> Message:
        nonlocal asked
        asked += 1
        assert asked < 100
        return LAST

    listener = Listener(running_loop(), receive, lambda: None)
    await anyio.wait_all_tasks_blocked()
    assert asked == 2  # behind the last piece, one message more
    for number in range(1, 6):
        assert await listener.receive() == LAST
        await anyio.wait_all_tasks_blocked()
        assert asked <= number + 2
    listener.cancel()
    await anyio.wait_all_tasks_blocked()
    assert asked <= 7


@pytest.mark.parametrize("kind", ["http.request", "websocket.receive", "x.unknown"])
async def test_behind_a_message_that_follows_the_last_piece_it_waits(kind: str) -> None:
    steps: list[str] = []
    client = Client(LAST, {"type": kind}, piece(1), DISCONNECT)
    listener = listen(client, lambda: steps.append("left"))
    await anyio.wait_all_tasks_blocked()
    assert client.asked == 2
    seen = [await listener.receive() for _ in range(4)]
    assert seen == [LAST, {"type": kind}, piece(1), DISCONNECT]
    await anyio.wait_all_tasks_blocked()
    assert steps == ["left"]


@pytest.mark.parametrize("waiting", [True, False])
async def test_a_receive_that_fails_does_so_for_the_application(waiting: bool) -> None:
    client = Client(piece(0), ConnectionResetError("gone"))
    steps: list[str] = []
    listener = listen(client, lambda: steps.append("left"))
    assert await listener.receive() == piece(0)
    if not waiting:
        await anyio.wait_all_tasks_blocked()
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match="gone"):
            await listener.receive()
    assert client.asked == 2
    assert steps == []


async def test_what_came_before_a_failure_is_received_first() -> None:
    listener = listen(Client(piece(0), ConnectionResetError("gone")))
    await anyio.wait_all_tasks_blocked()
    assert await listener.receive() == piece(0)
    with pytest.raises(ConnectionResetError):
        await listener.receive()


@pytest.mark.parametrize("taken", [0, 1])
async def test_nobody_listens_after_the_end(taken: int) -> None:
    """Whether it waits for the client or for the application."""
    client = Client(piece(0))
    steps: list[str] = []
    listener = listen(client, lambda: steps.append("left"))
    for _ in range(taken):
        await listener.receive()
    await anyio.wait_all_tasks_blocked()
    listener.cancel()
    await anyio.wait_all_tasks_blocked()
    assert client.stopped == bool(taken)
    assert client.asked == taken + 1
    assert steps == []
    listener.cancel()


async def test_once_cancelled_it_leads_to_nobody() -> None:
    """On some loops its task lives on for a while."""

    class Owner:
        def leave(self) -> None: ...

    owner = Owner()
    gone = weakref.ref(owner)
    listener = listen(Client(), owner.leave)
    await anyio.wait_all_tasks_blocked()
    listener.cancel()
    del owner
    assert gone() is None
    await anyio.wait_all_tasks_blocked()


async def test_it_receives_in_the_context_of_the_request() -> None:
    seen: list[str] = []

    async def receive() -> Message:
        seen.append(variable.get())
        return DISCONNECT

    variable.set("of the request")
    listener = Listener(running_loop(), receive, lambda: None)
    variable.set("set after")
    await listener.receive()
    assert seen == ["of the request"]
