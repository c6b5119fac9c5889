"""What a responder needs to know of the middleware that it works for."""

from __future__ import annotations

from typing import Protocol

from starlette.types import ASGIApp

from asyncguard.timeouts._report import Timeout

__all__ = ["TimeoutOptions"]


class TimeoutOptions(Protocol):
    """The options of a `TimeoutMiddleware`, checked.

    Attributes:
        timeout: The limit of the response clock in seconds; plus infinity for none. So with the next two.
        idle_timeout: That of the idle clock.
        body_timeout: That of the body clock.
        grace: How long what was cancelled may clean up, in seconds.
        answer: What answers when the response clock has run out.
        plain_answer: What does so if `answer` fails.
        has_inner_layer: Whether `Responder.run_inside` will be called at the router.
        cancel_on_disconnect: Whether to end the work for a client that has left.
        deadline_header: The name of the header in which callers say how long they wait; `None` for none.
    """

    timeout: float
    idle_timeout: float
    body_timeout: float
    grace: float
    answer: ASGIApp
    plain_answer: ASGIApp
    has_inner_layer: bool
    cancel_on_disconnect: bool
    deadline_header: str | None

    def tell(self, timeout: Timeout) -> None:
        """A request has run out of time, and it is known what became of it."""
