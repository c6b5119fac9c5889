"""An application with three shared resources, of which one may do as badly as a test wants."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from starlette.concurrency import run_in_threadpool

import asyncguard
from asyncguard import SharedNotOpen, shared

FAULT = os.environ.get("ASYNCGUARD_TEST_FAULT", "")
"""What is wrong with the second of them."""

LIMIT = 0.5 if FAULT else 10.0
STUBBORN = 60.0
"""Seconds: longer than any test waits, and not for ever, should one leave the process behind."""


def note(event: str) -> None:
    """Tell the test, in order; all processes write to one file."""
    line = f"{os.getpid()} {event}\n".encode()
    descriptor = os.open(os.environ["ASYNCGUARD_TEST_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


class Thing:
    """What is shared."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = True

    def ask(self) -> str:
        if not self.is_open:
            raise RuntimeError(f"{self.name} is closed")
        return f"{self.name} {id(self)} in {os.getpid()}"


@asynccontextmanager
async def live(name: str, needed: Thing | None = None, fault: str = "") -> AsyncIterator[Thing]:
    anyio.get_current_task()  # raises at import
    assert needed is None or needed.is_open
    if fault:
        await misbehave("start", fault)
    thing = Thing(name)
    note(f"+{name}")
    try:
        yield thing
    finally:
        if fault:
            await misbehave("close", fault)
        assert needed is None or needed.is_open
        thing.is_open = False
        note(f"-{name}")


async def misbehave(when: str, fault: str) -> None:
    if fault == f"{when} raises":
        raise ConnectionRefusedError("nobody listens")
    if fault == f"{when} hangs":
        await anyio.sleep_forever()  # hangs: here
    if fault == f"{when} is stubborn":
        with anyio.CancelScope(shield=True):
            give_up = anyio.current_time() + STUBBORN
            while anyio.current_time() < give_up:
                try:
                    await anyio.sleep(STUBBORN)
                except asyncio.CancelledError:
                    note("swallows a cancellation")


first = shared(live, "first")
second = shared(live, "second", first, FAULT, start_timeout=LIMIT, close_timeout=LIMIT)  # declared: second
third = shared(live, "third", needs=[second])

Second = Annotated[Thing, Depends(second)]

app = FastAPI()
asyncguard.install(app, shared=[first, second, third])


@app.get("/injected")
async def injected(thing: Second) -> str:
    assert thing is second.get()
    return thing.ask()


@app.get("/in-thread")
def in_thread(thing: Second) -> str:
    assert thing is second.get()
    with second.use() as used:
        assert used is thing
    return thing.ask()


@app.get("/from-thread")
async def from_thread() -> str:
    return (await run_in_threadpool(second.get)).ask()


@app.get("/child")
async def child() -> str:
    said: list[str] = []

    async def ask() -> None:
        said.append(second.get().ask())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
    return said[0]


@app.get("/background")
async def background(tasks: BackgroundTasks) -> str:
    async def later() -> None:
        note(f"background {second.get().ask()}")

    def later_in_thread() -> None:
        note(f"background thread {second.get().ask()}")

    tasks.add_task(later)
    tasks.add_task(later_in_thread)
    return "later"


@app.get("/states")
async def states() -> list[str]:
    return [resource.status.state for resource in (first, second, third)]


@app.get("/health")
async def health() -> dict[str, bool]:
    return {status.name: status.ok for status in await asyncguard.check_shared()}


@app.get("/missing")
async def missing() -> str:
    try:
        return second.get().ask()
    except SharedNotOpen as error:
        return str(error)


@app.get("/wait")
async def wait(thing: Second, pipe: str) -> str:
    """Until the test opens the pipe for writing, and closes it."""
    note("waiting")
    await anyio.to_thread.run_sync(Path(pipe).read_bytes)
    assert thing is second.get()
    note("waited")
    return thing.ask()


@app.websocket("/socket")
async def socket(websocket: WebSocket, thing: Second) -> None:
    await websocket.accept()
    try:
        async for _ in websocket.iter_text():
            assert thing is second.get()
            await websocket.send_text(thing.ask())
    finally:
        note(f"socket {thing.is_open}")
