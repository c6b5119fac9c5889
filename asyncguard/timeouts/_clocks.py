"""The three clocks of a request: which of them runs, and when it will have run out.

Plain arithmetic; what happens then is `_responder`'s business. All times are on `_clock.monotonic`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from asyncguard.events import TimeoutClock

__all__ = ["Clocks", "Due"]

_BYTES_A_SECOND = 500
"""What a client has to send of a body to be given another second: as Apache's ``RequestReadTimeout`` has it,
https://httpd.apache.org/docs/2.4/mod/mod_reqtimeout.html."""


class Due(NamedTuple):
    """The next clock to run out.

    Attributes:
        at: When; plus infinity for never.
        clock: Which one.
        limit: What it is set to, in seconds.
    """

    at: float
    clock: TimeoutClock
    limit: float


class Clocks:
    """The clocks of one request.

    The response clock runs until the response begins, but not while the application waits for the client's
    body: that is the body clock's time. The idle clock runs from the beginning of the response to its end,
    but not while the server takes what was sent: that is the client's time.

    Args:
        response: The limit of the response clock in seconds; plus infinity for none. So with the others.
        idle: That of the idle clock.
        body: That of the body clock.
        began: When the request reached the guard.

    Attributes:
        caller: For how many seconds the caller waits for the answer, whatever it waits for.
        started: Whether the response has begun.
        complete: Whether it has ended. No clock runs from then on.
    """

    caller: float = math.inf
    started: bool = False
    complete: bool = False
    _paused: float = 0.0
    _quiet_since: float | None = None
    _awaiting_body_since: float | None = None
    _awaiting: int = 0

    def __init__(self, response: float, idle: float, body: float, began: float) -> None:
        self.response = response
        self.idle = idle
        self.body = body
        self._began = began
        self._patience = body

    def due(self) -> Due:
        """Which clock will run out next, as things are."""
        if self.complete:
            return Due(math.inf, "response", self.response)
        awaiting = self._awaiting_body_since
        patient_until = math.inf if awaiting is None else awaiting + self._patience
        if self.started:
            quiet = self._quiet_since
            quiet_until = math.inf if quiet is None else quiet + self.idle
            # Who may be waiting for the body is not who makes the response.
            return Due(max(quiet_until, patient_until if awaiting is not None else 0.0), "idle", self.idle)
        if awaiting is not None:
            due = Due(patient_until, "body", self.body)
        else:
            due = Due(self._began + self._paused + self.response, "response", self.response)
        called_off = self._began + self.caller
        return Due(called_off, "response", self.caller) if called_off < due.at else due

    def left(self, now: float) -> float:
        """Seconds until the response has to begin."""
        if self.started or self.complete:
            return math.inf
        awaiting = self._awaiting_body_since
        paused = self._paused + (now - awaiting if awaiting is not None else 0.0)
        return max(0.0, self._began + min(self.response + paused, self.caller) - now)

    def hand_over(self) -> None:
        """The server is given a piece of the response."""
        self._quiet_since = None

    def handed_over(self, now: float) -> float:
        """The server has taken it; returns until when the application may be silent."""
        self._quiet_since = now
        return now + self.idle

    def await_body(self, now: float) -> float:
        """The application waits for the client's body; returns until when it may."""
        self._awaiting += 1
        if self._awaiting_body_since is None:
            self._awaiting_body_since = now
        return now + self._patience

    def receive_body(self, size: int, now: float) -> None:
        """So many bytes of it have come, or one of those who waited has given up."""
        self._awaiting -= 1
        since, self._awaiting_body_since = self._awaiting_body_since, now if self._awaiting else None
        waited = now - since if since is not None else 0.0
        self._paused += waited
        # Silence uses patience up and bytes restore it: who trickles runs out of it all the same.
        self._patience = min(self.body, self._patience - waited + size / _BYTES_A_SECOND)

    def postpone(self, seconds: float) -> None:
        """Take so many seconds for not passed: the process stood in a debugger."""
        self._began += seconds
        if self._quiet_since is not None:
            self._quiet_since += seconds
        if self._awaiting_body_since is not None:
            self._awaiting_body_since += seconds
