"""The application that is measured, once for each way of guarding it.

    ASYNCGUARD_BENCHMARK=asyncguard python -m uvicorn benchmarks.apps:app

Every detector is set up as its own documentation says for a service, and reports stalls from 100 ms on;
what else it can do is left as it is by default. None is imported before it is asked for.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["LEFT_OUT", "VARIABLE", "VARIANTS", "PassThrough", "Variant", "bare_asgi", "hello"]

VARIABLE = "ASYNCGUARD_BENCHMARK"

LEFT_OUT = {"livekit-agents": "its loop monitor comes with a whole voice stack, codecs included"}
"""Detectors that are not measured, and why."""

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Variant:
    """One way of guarding the application.

    Attributes:
        name: Its row in the tables.
        make: Returns the application.
        distribution: What has to be installed for it; empty for what always is.
        loop: The event loop that uvicorn is told to use.
        env: Environment variables of its server.
    """

    name: str
    make: Callable[[], ASGIApp]
    distribution: str = ""
    loop: str = "asyncio"
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The name of the variant that this one is compared with."""
        return "bare" if self.loop == "asyncio" else f"bare on {self.loop}"


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def hello(lifespan: Lifespan | None = None) -> FastAPI:
    """The least that a FastAPI service can do."""
    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def greet() -> dict[str, str]:
        return {"hello": "world"}

    return app


async def bare_asgi(_: Scope, __: Receive, send: Send) -> None:
    """The least that any ASGI application can do."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


class PassThrough:
    """A middleware that does nothing: the least that any can cost."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def pass_through() -> ASGIApp:
    app = hello()
    app.add_middleware(PassThrough)
    return app


def guarded() -> ASGIApp:
    import asyncguard

    app = hello()
    asyncguard.install(app)
    return app


def loopguard() -> ASGIApp:
    from fastapi_loopguard import LoopGuardConfig, LoopGuardMiddleware

    # The mode for production. Its threshold is the smaller of a measured one, put out of reach here, and
    # the fallback.
    config = LoopGuardConfig(enforcement_mode="log", fallback_threshold_ms=100.0, threshold_multiplier=1e6)
    app = hello()
    app.add_middleware(LoopGuardMiddleware, config=config)
    return app


def cop() -> ASGIApp:
    import aiocop

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        aiocop.activate()
        yield
        aiocop.deactivate()

    def log(event: Any) -> None:
        if event.exceeded_threshold:
            logger.warning("%s", event)

    aiocop.patch_audit_functions()
    aiocop.start_blocking_io_detection(trace_depth=20)
    aiocop.detect_slow_tasks(threshold_ms=100, on_slow_task=log)
    return hello(lifespan)


def cop_with_context() -> ASGIApp:
    """aiocop with a context provider, without which it does not know the request."""
    import aiocop

    path: ContextVar[str] = ContextVar("path", default="")

    class Remember(PassThrough):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            path.set(scope.get("path", ""))
            await self.app(scope, receive, send)

    def context() -> dict[str, Any]:
        return {"path": path.get()}

    aiocop.register_context_provider(context)
    app = cop()
    assert isinstance(app, FastAPI)
    app.add_middleware(Remember)
    return app


def lens() -> ASGIApp:
    from asynclens import AsyncWatchdog

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncWatchdog(threshold_ms=100, logger=logger):
            yield

    return hello(lifespan)


def sentry() -> ASGIApp:
    from loopsentry import LoopSentry

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="asyncguard-bench-") as folder:
            watch = LoopSentry(base_dir=folder, threshold=0.1)
            watch.start()
            yield
            watch.stop()

    return hello(lifespan)


def leak() -> ASGIApp:
    from pyleak import no_event_loop_blocking

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with no_event_loop_blocking(action="log", threshold=0.1):
            yield

    return hello(lifespan)


def buster() -> ASGIApp:
    from blockbuster import BlockBuster

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = BlockBuster()
        watch.activate()
        yield
        watch.deactivate()

    return hello(lifespan)


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("bare", hello),
        Variant("bare again", hello),  # how far apart two processes are that do the same
        Variant("pass-through", pass_through),
        Variant("asyncguard", guarded),
        Variant("bare on uvloop", hello, loop="uvloop"),
        Variant("asyncguard on uvloop", guarded, loop="uvloop"),
        Variant("fastapi-loopguard", loopguard, "fastapi-loopguard"),
        Variant("aiocop", cop, "aiocop"),
        Variant("aiocop with context", cop_with_context, "aiocop"),
        Variant("asynclens", lens, "asynclens"),
        Variant("loopsentry", sentry, "loopsentry"),
        Variant("pyleak", leak, "pyleak"),
        Variant("asyncio debug mode", hello, env={"PYTHONASYNCIODEBUG": "1"}),
        Variant("blockbuster", buster, "blockbuster"),
    )
}


def __getattr__(name: str) -> Any:
    """`app`, made where a server asks for it and nowhere else."""
    if name != "app":
        raise AttributeError(name)
    return VARIANTS[os.environ[VARIABLE]].make()
