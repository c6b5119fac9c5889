"""asyncguard keeps the event loop of an ASGI service responsive.

    asyncguard.install(app)     guard a FastAPI or Starlette application
    asyncguard.guard(app)       wrap any ASGI application

Or, without a change to the application: ``asyncguard run main:app``.
"""

from typing import TYPE_CHECKING

from asyncguard._install import guard, install
from asyncguard._request import remaining
from asyncguard.blocking import BlockingMiddleware, LoopMonitor
from asyncguard.clients import Shared, WatchClients, check_shared, combine_lifespans, open_shared, shared
from asyncguard.errors import (
    AppNotLoaded,
    AsyncguardError,
    NotOffloadable,
    OffloadError,
    OffloadQueueFull,
    OffloadTimeout,
    PayloadError,
    SharedError,
    SharedNotOpen,
    SharedStartFailed,
    WorkerCrashed,
)
from asyncguard.events import (
    Advice,
    BlockedLine,
    BlockReport,
    BusyReport,
    ClientReport,
    DurationHistogram,
    HangReport,
    InFlight,
    OffloadStats,
    SharedStatus,
    SourceLine,
    StackSample,
    StallHistogram,
    ThreadStack,
    TimeoutReport,
    Victim,
    Windows,
)
from asyncguard.offloading import Offloaded, offload, report_progress
from asyncguard.timeouts import TimeoutMiddleware, abandoned, timeout

if TYPE_CHECKING:
    from asyncguard.offloading import OffloadPool

__all__ = [
    "Advice",
    "AppNotLoaded",
    "AsyncguardError",
    "BlockReport",
    "BlockedLine",
    "BlockingMiddleware",
    "BusyReport",
    "ClientReport",
    "DurationHistogram",
    "HangReport",
    "InFlight",
    "LoopMonitor",
    "NotOffloadable",
    "OffloadError",
    "OffloadPool",
    "OffloadQueueFull",
    "OffloadStats",
    "OffloadTimeout",
    "Offloaded",
    "PayloadError",
    "Shared",
    "SharedError",
    "SharedNotOpen",
    "SharedStartFailed",
    "SharedStatus",
    "SourceLine",
    "StackSample",
    "StallHistogram",
    "ThreadStack",
    "TimeoutMiddleware",
    "TimeoutReport",
    "Victim",
    "WatchClients",
    "Windows",
    "WorkerCrashed",
    "abandoned",
    "check_shared",
    "combine_lifespans",
    "guard",
    "install",
    "offload",
    "open_shared",
    "remaining",
    "report_progress",
    "shared",
    "timeout",
]


def __getattr__(name: str) -> object:
    if name == "OffloadPool":  # see `asyncguard.offloading`
        from asyncguard.offloading import OffloadPool

        return OffloadPool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
