"""asyncguard keeps the event loop of an ASGI service responsive.

    asyncguard.install(app)     guard a FastAPI or Starlette application
    asyncguard.guard(app)       wrap any ASGI application

Or, without a change to the application: ``asyncguard run main:app``.
"""

from asyncguard._install import guard, install
from asyncguard._request import remaining
from asyncguard.blocking import BlockingMiddleware, LoopMonitor
from asyncguard.errors import AppNotLoaded, AsyncguardError
from asyncguard.events import (
    Advice,
    BlockedLine,
    BlockReport,
    BusyReport,
    HangReport,
    InFlight,
    SourceLine,
    StackSample,
    StallHistogram,
    ThreadStack,
    TimeoutReport,
    Victim,
    Windows,
)
from asyncguard.timeouts import TimeoutMiddleware, abandoned, timeout

__all__ = [
    "Advice",
    "AppNotLoaded",
    "AsyncguardError",
    "BlockReport",
    "BlockedLine",
    "BlockingMiddleware",
    "BusyReport",
    "HangReport",
    "InFlight",
    "LoopMonitor",
    "SourceLine",
    "StackSample",
    "StallHistogram",
    "ThreadStack",
    "TimeoutMiddleware",
    "TimeoutReport",
    "Victim",
    "Windows",
    "abandoned",
    "guard",
    "install",
    "remaining",
    "timeout",
]
