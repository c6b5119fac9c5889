"""Seeing what blocks the event loop: the line, the call, the request, and who had to wait.

`BlockingMiddleware` guards an ASGI application; `LoopMonitor` does the same for any asynchronous program.
"""

from asyncguard.blocking._middleware import BlockingMiddleware
from asyncguard.blocking._monitor import SHORTEST_THRESHOLD, LoopMonitor

__all__ = ["SHORTEST_THRESHOLD", "BlockingMiddleware", "LoopMonitor"]
