"""An application that runs, as its clients see it."""

from __future__ import annotations

from typing import Any

import anyio
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncguard._tasks import current_loop
from asyncguard.testing._lifespan import Lifespan
from asyncguard.testing._loops import Loop

__all__ = ["ServedApp"]


class ServedApp:
    """A running application: an ASGI application itself, to be called by a test's clients.

    Each request runs in a task and with a state of its own, as under a server: what one request puts into
    ``request.state`` or into a context variable, the next one does not find there.
    """

    def __init__(self, app: ASGIApp, lifespan: Lifespan, home: Loop | None) -> None:
        self._app = app
        self._lifespan = lifespan
        self._home = home
        self._loop = current_loop()

    @property
    def state(self) -> dict[str, Any]:
        """A copy of what the lifespan has put into the state of the application."""
        return self._lifespan.state.copy()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            RuntimeError: If the application does not run any more, or runs on another event loop.
        """
        if scope["type"] == "lifespan":
            await _say_it_runs(receive, send)
            return
        if not self._lifespan.is_running:
            raise RuntimeError(f"{self._app!r} has ended: call it inside the block of `running`")
        scope = {**scope, "state": self.state}
        if self._loop is current_loop():
            await _in_own_task(self._app, scope, receive, send)
        elif self._home is not None:
            async with Loop.opened() as clients:
                await self._home.run(self._app, scope, clients.bound(receive), clients.bound(send))
        else:
            raise RuntimeError(
                f"{self._app!r} runs on another event loop: use `with running(app)`, without `async`, "
                "for tests that bring loops of their own"
            )


async def _in_own_task(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    failure: BaseException | None = None

    async def run() -> None:
        nonlocal failure
        try:
            await app(scope, receive, send)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # to be raised as it is, not in a group
            failure = error

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure


async def _say_it_runs(receive: Receive, send: Send) -> None:
    """To a client that would run the lifespan itself, as Starlette's TestClient does."""
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})
