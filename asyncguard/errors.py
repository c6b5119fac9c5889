"""Every exception that asyncguard raises of its own.

    AsyncguardError
    ├── AppNotLoaded            an import string that leads to no ASGI application
    ├── OffloadError            an offloaded call that gave no result, though its function did not raise
    │   ├── NotOffloadable      a function that a worker could not find again
    │   ├── OffloadQueueFull    too many calls wait already
    │   ├── OffloadTimeout      the call ran out of time; also a `TimeoutError`
    │   ├── PayloadError        an argument, a result or an exception that cannot be sent
    │   └── WorkerCrashed       the process died under the call
    └── SharedError             a shared resource that cannot be had
        ├── SharedNotOpen       asked for where it is not open
        └── SharedStartFailed   it could not be opened, or not in time

A bad option is no member of this tree: it raises `ValueError` or `TypeError` when the application is
built, as it does everywhere else in Python.
"""

from __future__ import annotations

__all__ = [
    "AppNotLoaded",
    "AsyncguardError",
    "NotOffloadable",
    "OffloadError",
    "OffloadQueueFull",
    "OffloadTimeout",
    "PayloadError",
    "SharedError",
    "SharedNotOpen",
    "SharedStartFailed",
    "WorkerCrashed",
]


class AsyncguardError(Exception):
    """The root of all errors that asyncguard raises of its own."""


class AppNotLoaded(AsyncguardError):
    """Raised when an import string such as ``main:app`` does not lead to an ASGI application."""


class OffloadError(AsyncguardError):
    """The root of what offloaded calls raise that gave no result, though their functions did not raise."""


class NotOffloadable(OffloadError):
    """Raised for a function that a worker could not find again, such as a lambda or a closure."""


class OffloadQueueFull(OffloadError):
    """Raised when as many calls wait for a worker as `max_queue` allows. The call has not been begun.

    Attributes:
        retry_after: In about how many seconds a worker will be free.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after)
        self.retry_after: float = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class OffloadTimeout(OffloadError, TimeoutError):
    """Raised when a call ran out of time, in the queue or in its worker.

    A worker process is being stopped by then, unless `on_cancel` is ``"abandon"``. In a thread, or in an
    executor, what has begun runs on.

    Attributes:
        stack: What the worker ran at that moment, innermost line first; empty if it did not tell.
    """

    def __init__(self, message: str, stack: str = "") -> None:
        super().__init__(message, stack)
        self.stack: str = stack

    def __str__(self) -> str:
        return _with_stack(str(self.args[0]), self.stack)


class PayloadError(OffloadError):
    """Raised when an argument, a result or an exception cannot be pickled, or cannot be rebuilt."""


class WorkerCrashed(OffloadError):
    """Raised when the worker died under the call, or could not be started. The call is not run again.

    Attributes:
        exit_code: What the process ended with: negative for the number of a signal, `None` if not known.
        stack: What it ran when it crashed, innermost line first; empty if it could not tell.
    """

    def __init__(self, message: str, exit_code: int | None = None, stack: str = "") -> None:
        super().__init__(message, exit_code, stack)
        self.exit_code: int | None = exit_code
        self.stack: str = stack

    def __str__(self) -> str:
        return _with_stack(str(self.args[0]), self.stack)


class SharedError(AsyncguardError):
    """The root of what is raised for shared resources; see `asyncguard.shared`.

    Attributes:
        name: The name of the resource.
    """

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message, name)
        self.name: str = name

    def __str__(self) -> str:
        return str(self.args[0])


class SharedNotOpen(SharedError):
    """Raised when a shared resource is asked for where none is open: no lifespan, or on another loop."""


class SharedStartFailed(SharedError):
    """Raised when a shared resource could not be opened, or not in time. What was open already is closed.

    Its cause is the exception that stopped it, if there was one.
    """


def _with_stack(message: str, stack: str) -> str:
    return f"{message}\n{stack}" if stack else message
