"""Whether shared resources are well: their checks, run when they are opened, and for a health endpoint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from asyncguard._options import checked_seconds
from asyncguard.events import SharedStatus

if TYPE_CHECKING:
    from asyncguard.clients._shared import Shared

__all__ = ["check_shared", "run_check"]


async def run_check(check: Callable[[Any], Any], thing: Any) -> None:
    """Call a check, and await what it returns if that can be awaited.

    Raises:
        Exception: What the check raised.
        RuntimeError: If it returned `False`.
    """
    answer = check(thing)
    if inspect.isawaitable(answer):
        answer = await answer
    if answer is False:
        raise RuntimeError("its check returned False")


async def check_shared(
    *resources: Shared[Any],
    timeout: float | None = 2.0,  # noqa: ASYNC109
) -> tuple[SharedStatus, ...]:
    """Check resources that are open on this loop, all at the same time.

        @app.get("/health")
        async def health(response: Response) -> dict[str, str]:
            statuses = await asyncguard.check_shared()
            response.status_code = 200 if all(status.ok for status in statuses) else 503
            return {status.name: status.state for status in statuses}

    A check that fails, or is not done in time, makes its resource `failing` until one succeeds. One that does
    not end is not begun a second time. A resource without a check is well as long as it is open.

    Args:
        *resources: Which ones; by default all that are open on this loop.
        timeout: For how many seconds to wait for their checks; `None` for any time.

    Returns:
        How they are, in the same order.

    Raises:
        RuntimeError: If no event loop runs in this thread.
    """
    from asyncguard.clients import _slots  # it needs this module

    seconds = math.inf if timeout is None else checked_seconds("timeout", timeout)
    home = _slots.home()
    chosen = resources or tuple(home.slots)
    checks = [slot.check() for resource in chosen if (slot := home.slots.get(resource)) is not None]
    give_up_at = anyio.current_time() + seconds
    for check in checks:
        with anyio.move_on_after(max(0.0, give_up_at - anyio.current_time())):
            await check.ended.wait()
        if not check.ended.is_set():
            check.stop(f"its check was not done within {seconds:g} s")
    return tuple(resource.status for resource in chosen)
