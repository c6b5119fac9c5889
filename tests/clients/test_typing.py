# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers know of shared resources.

They read this file, mypy in ``scripts/lint``: what they have to refuse has a comment that they would
refuse themselves if it were needless.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated, Any, assert_type

import httpx
import httpx2
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.applications import Starlette

import asyncguard
from asyncguard import Shared, SharedStatus, check_shared, combine_lifespans, open_shared, shared


class Plain:
    """Has no way to be closed, or a closer of one kind or another."""

    def __init__(self, number: int = 0) -> None:
        self.number = number


class Entered:
    """What is entered is not what is shared."""

    async def __aenter__(self) -> Plain:
        return Plain()

    async def __aexit__(self, *error: object) -> None: ...


def plain() -> Plain:
    return Plain()


async def awaited() -> Plain:
    return Plain()


async def generated() -> AsyncGenerator[Plain, None]:
    yield Plain()


async def iterated() -> AsyncIterator[Plain]:
    yield Plain()


def generated_here() -> Generator[Plain, None, None]:
    yield Plain()


def iterated_here() -> Iterator[Plain]:
    yield Plain()


@asynccontextmanager
async def managed() -> AsyncGenerator[Plain]:
    yield Plain()


@contextmanager
def managed_here() -> Generator[Plain]:
    yield Plain()


FACTORIES = {
    "class": shared(Plain),
    "entered": shared(Entered),
    "function": shared(plain),
    "coroutine function": shared(awaited),
    "asynchronous generator function": shared(generated),
    "asynchronous iterator": shared(iterated),
    "generator function": shared(generated_here),
    "iterator": shared(iterated_here),
    "asynchronous context manager": shared(managed),
    "context manager": shared(managed_here),
    "lambda": shared(lambda: Plain()),
    "partial": shared(partial(Plain, 7)),
}

github = shared(httpx.AsyncClient, base_url="https://api.github.com", timeout=10)
second = shared(httpx2.AsyncClient)
synchronous = shared(httpx.Client)
engine = shared(create_async_engine, "sqlite+aiosqlite://")
text = shared(lambda: "text", name="text", start_timeout=None, close_timeout=1, max_age=60, needs=[github])
checked = shared(Plain, check=lambda plain: plain.number == 0)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", FACTORIES)
async def test_every_kind_of_factory_gives_what_its_type_says(kind: str) -> None:
    resource: Shared[Plain] = FACTORIES[kind]
    async with open_shared(resource):
        assert type(resource.get()) is Plain


def known() -> None:
    assert_type(FACTORIES, dict[str, Shared[Plain]])
    assert_type(github, Shared[httpx.AsyncClient])
    assert_type(github.get(), httpx.AsyncClient)
    assert_type(second.get(), httpx2.AsyncClient)
    assert_type(synchronous.get(), httpx.Client)
    assert_type(engine.get(), AsyncEngine)
    assert_type(text.get(), str)
    assert_type(checked.get(), Plain)
    assert_type(github.status, SharedStatus)
    with github.use() as client:
        assert_type(client, httpx.AsyncClient)
    with github.override(Plain()) as fake:
        assert_type(fake, Plain)


async def known_when_awaited() -> None:
    assert_type(await github(), httpx.AsyncClient)
    assert_type(await check_shared(github, engine, timeout=1), tuple[SharedStatus, ...])
    async with open_shared(github, text) as nothing:
        assert_type(nothing, None)


async def endpoint(client: Annotated[httpx.AsyncClient, Depends(github)]) -> None:
    assert_type(client, httpx.AsyncClient)


def lifespans() -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        yield {}

    @asynccontextmanager
    async def stateless(app: Starlette) -> AsyncGenerator[None]:
        yield

    app = FastAPI(lifespan=open_shared(github))
    Starlette(lifespan=open_shared(github))
    FastAPI(lifespan=combine_lifespans(own, open_shared(github), stateless, app))
    Starlette(lifespan=combine_lifespans(own))
    asyncguard.install(app, shared=[github, text])
    asyncguard.install(app, shared=(github,))
    everything: Shared[object] = github  # it gives what it has, and takes nothing
    del everything


def refused() -> None:
    shared(7)  # type: ignore[call-overload]
    shared(Plain, start_timeout="1")  # type: ignore[call-overload]
    shared(Plain, needs=[7])  # type: ignore[arg-type, list-item]
    shared(Plain, check=lambda: None)  # type: ignore[arg-type, misc]
    open_shared(7)  # type: ignore[arg-type]
    combine_lifespans(7)  # type: ignore[arg-type]
    asyncguard.install(FastAPI(), shared=github)  # type: ignore[arg-type]
