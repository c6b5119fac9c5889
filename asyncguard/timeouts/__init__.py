"""Request timeouts: every request is answered by its deadline, whatever its handler does."""

from asyncguard.timeouts._limit import timeout
from asyncguard.timeouts._middleware import InnerLayer, TimeoutMiddleware
from asyncguard.timeouts._responder import abandoned

__all__ = ["InnerLayer", "TimeoutMiddleware", "abandoned", "timeout"]
