"""A recipe of the documentation, with an endpoint that tells how its shared client is."""

from __future__ import annotations

import importlib
import os
from typing import Any

from asyncguard import Shared, check_shared, timeout

recipe: Any = importlib.import_module(f"shared_clients.{os.environ['ASYNCGUARD_TEST_RECIPE']}")
app = recipe.app
(client,) = (thing for thing in vars(recipe).values() if isinstance(thing, Shared))
checked = client.check is not None


@app.get("/state")
@timeout(None)
async def state() -> dict[str, Any]:
    (status,) = await check_shared(timeout=5)
    return {
        "pid": os.getpid(),
        "name": status.name,
        "ok": status.ok,
        "checked": checked,
        "in use": status.in_use,
        "waiting": status.waiting,
        "error": status.last_error,
    }
