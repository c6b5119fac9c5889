"""One request under its clocks: what of its response has gone out, and what is done when time is up.

Everything here happens on the loop's thread, one thing after the other: what has gone out is noted before
anything is awaited, so that there is never a second response. Nothing here knows how a loop cancels; that is
`_loops`'s business.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from contextvars import copy_context
from weakref import WeakSet

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncguard import _clock
from asyncguard._asgi import ProblemAnswer
from asyncguard._request import RequestRecord
from asyncguard.timeouts import _limit
from asyncguard.timeouts._clocks import Clocks, Due
from asyncguard.timeouts._debugger import is_debugged
from asyncguard.timeouts._delivery import Delivery
from asyncguard.timeouts._disconnect import Listener
from asyncguard.timeouts._limit import declared_limit
from asyncguard.timeouts._lookout import Lookout
from asyncguard.timeouts._lookups import transport_of
from asyncguard.timeouts._loops import Revocable, Section
from asyncguard.timeouts._options import TimeoutOptions
from asyncguard.timeouts._report import Outcome, Sight, Timeout, look_at

__all__ = ["Responder", "abandoned"]

logger = logging.getLogger("asyncguard.timeouts")

_ANSWERED_WITHIN = 0.5
"""Seconds that the application's middlewares have to pass an answer on. Then it goes out without them."""
_DELIVERED_WITHIN = 5.0
"""Seconds after which an answer that is still on its way is cut off."""
_EARLY = 0.002
"""Seconds by which a loop's timer may come early: uvloop's count whole milliseconds."""
_SHORTEST_WAIT = 0.01
_LEFT = ProblemAnswer(499, "The client has closed the connection.")
"""As nginx calls it."""
_REFUSAL = ProblemAnswer(408, "The body of the request did not come in.", headers=[(b"connection", b"close")])

_abandoned: WeakSet[Responder] = WeakSet()


def abandoned() -> int:
    """How many requests of this process run on though their time is up.

    Those in a worker thread or a shielded section cannot be stopped; they are counted until they end.
    """
    return len(_abandoned)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandoned.clear)


class Responder:
    """The state of one HTTP request; see the module.

    Most requests are answered in time, so what they never change is kept in the class.

    Args:
        options: The middleware that the request came to.
        lookout: What looks after it, on its loop, when it takes long.
        scope: Its scope.
        receive: What the server gave for receiving.
        send: What the server gave for sending.
        record: What is known of it.
    """

    _timer: Revocable | None = None
    _begun = False
    """Whether a response goes out to the server."""
    _closed = False
    """Whether what the application still sends is too late."""
    _body_received = False
    _headers: Iterable[tuple[bytes, bytes]] = ()
    _listener: Listener | None = None

    _outer: Section | None = None
    _inner: Section | None = None
    _has_entered = False
    _inner_send: Send | None = None
    _inner_begun = False
    _lost = False
    """Whether a response was stopped between the two layers."""
    _inner_closed = False
    _coroutine: Awaitable[None] | None = None

    _expired: Due | None = None
    _left = False
    """Whether the client has left, and that is to end the work for it."""
    _target: Section | None = None
    """What is being stopped."""
    _sight = Sight((), in_thread=False)
    _patience: Revocable | None = None
    _delivery: Delivery | None = None
    _told = False

    def __init__(
        self,
        options: TimeoutOptions,
        lookout: Lookout,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: RequestRecord,
    ) -> None:
        self._options = options
        self._lookout = lookout
        self._scope = scope
        self._receive = receive
        self._send = send
        self._record = record
        self._clocks = Clocks(options.timeout, options.idle_timeout, options.body_timeout, record.started)

    # -- the two layers ----------------------------------------------------------------------------

    async def run(self, app: ASGIApp, caller: float | None, now: float) -> None:
        """Run the application, outside everything.

        Args:
            app: The application.
            caller: How many seconds the caller waits for the answer, if it has said so.
            now: The time, on asyncguard's monotonic clock.
        """
        record, lookout = self._record, self._lookout
        self._context = copy_context()
        self._around = record.coroutine
        record.deadline = self
        self._outer = section = lookout.loop.section()
        self._armed = lookout.add(self, now)
        if caller is not None:
            self._clocks.caller = caller
            self._hasten()
        elif now - record.started > _EARLY:  # it has been under way for a while
            self._hasten()
        try:
            with section:
                if self._options.cancel_on_disconnect:
                    self._listener = Listener(lookout.loop, self._receive, self._leave)
                    self._receive = self._listener.receive
                if caller is None or self._options.has_inner_layer or not self._is_too_late():
                    self._coroutine = coroutine = app(self._scope, self.receive, self.send)
                    await coroutine
            if self._left and not self._begun and not self._has_entered:
                await _LEFT(self._scope, self._receive, self._send)
        except GeneratorExit:
            self._delivery = None  # nobody will run it: the loop is gone
            raise
        except Exception:
            if not self._lost:
                raise
            # A middleware missed the response that was on its way to it; the client has got an answer.
            logger.debug("after a response was stopped", exc_info=True)
        finally:
            self._clocks.complete = True
            record.deadline = None
            lookout.remove(self)
            if self._listener is not None:
                self._listener.cancel()
            # What the application's middlewares send by leads back to here.
            self._inner_send = self._coroutine = None
            if self._target is not None:
                await self._end(section)
            elif self._timer is not None:
                self._timer.cancel()

    async def run_inside(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run what the application's middlewares stand around: its router."""
        if self._has_entered:  # a router in a router, or a middleware that tries again
            await app(scope, receive, send)
            return
        self._has_entered = True
        self._inner_send = send
        self._context = copy_context()  # what its middlewares have put there belongs to the answer
        self._inner = section = self._lookout.loop.section()
        try:
            with section:
                if self._clocks.caller == math.inf or not self._is_too_late():
                    self._coroutine = coroutine = app(scope, receive, self._send_inside)
                    await coroutine
            self._lost = self._target is section and self._inner_begun and not self._begun
            if self._left and not self._inner_begun:
                await _LEFT(scope, receive, send)  # nobody sees it, but there are middlewares that need one
        except GeneratorExit:
            self._delivery = None
            raise
        finally:
            self._inner = None
            if self._target is not None:
                await self._settle(section)

    def _is_too_late(self) -> bool:
        """Whether nothing is left to begin with; the answer is on its way then."""
        if self._target is None and self._clocks.due().at <= _clock.monotonic():
            self._expire(self._clocks.due())
        return self._expired is not None

    # -- ASGI --------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """What the application receives by."""
        if self._body_received:
            return await self._receive()
        clocks, size = self._clocks, 0
        if clocks.await_body(_clock.monotonic()) < self._armed:
            self._hasten()
        try:
            message = await self._receive()
            size = len(message.get("body", b""))
            self._body_received = not message.get("more_body", False)
        finally:
            clocks.receive_body(size, _clock.monotonic())
            self._hasten()
        return message

    # Each of these two hands over the server's own coroutine where it can: one less for each message.

    def send(self, message: Message) -> Awaitable[None]:
        """What the application sends by, its middlewares included."""
        if self._closed:
            return _nothing()
        kind = message["type"]
        if kind == "http.response.start":
            self._begun = self._clocks.started = True
            self._headers = message.get("headers", ())
        elif kind in _LAST and not message.get("more_body", False):
            self._clocks.complete = True
            return self._send(message)
        elif not self._begun:  # what comes before a response is no part of it
            return self._send(message)
        return self._send_on(message)

    async def _send_on(self, message: Message) -> None:
        clocks = self._clocks
        clocks.hand_over()
        try:
            await self._send(message)
        finally:
            if clocks.handed_over(_clock.monotonic()) < self._armed:
                self._hasten()

    def _send_inside(self, message: Message) -> Awaitable[None]:
        send = self._inner_send
        if self._inner_closed or send is None:
            return _nothing()
        if message["type"] == "http.response.start":
            self._inner_begun = True
        return send(message)

    # -- the deadline, from anywhere ---------------------------------------------------------------

    @property
    def header(self) -> str | None:
        return self._options.deadline_header

    def left(self) -> float:
        return self._clocks.left(_clock.monotonic())

    def retune(self, seconds: float | None) -> None:
        limit = math.inf if seconds is None else seconds
        if limit == self._clocks.response:
            return
        if self._lookout.loop.is_here():
            self._retune(limit)
        else:
            self._lookout.loop.call_threadsafe(lambda: self._retune(limit))

    def _retune(self, limit: float) -> None:
        self._clocks.response = limit
        self._hasten()

    # -- looking at the clocks ---------------------------------------------------------------------

    def _arm(self, at: float, now: float) -> None:
        """Have the clocks looked at then; sooner does no harm."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed = at
        if at < math.inf:
            self._timer = self._lookout.loop.call_later(max(0.0, at - now), self.look)

    def _hasten(self) -> None:
        """Have the clocks looked at sooner, if one is due sooner than was thought."""
        if self._target is None and not self._clocks.complete:
            due = self._clocks.due().at
            if due < self._armed:
                self._arm(due, _clock.monotonic())

    def look(self) -> None:
        """See whether a clock has run out, and which one is next if not."""
        if self._target is not None or self._clocks.complete:
            return
        now = _clock.monotonic()
        late, self._armed = max(0.0, now - self._armed), math.inf
        declared = None if self._record.limited else declared_limit(self._record.endpoint)
        if declared is not None:
            self._clocks.response = math.inf if declared.seconds is None else declared.seconds
        due = self._clocks.due()
        if due.at - now > _EARLY:
            is_known = self._record.endpoint is not None
            look_again = now + max(_limit.shortest, _SHORTEST_WAIT)
            self._arm(due.at if is_known else min(due.at, look_again), now)
        elif is_debugged(late):
            # How much was left when it stopped is not known.
            self._clocks.postpone(now - due.at + max(due.limit, 1.0))
            self._arm(self._clocks.due().at, now)
        elif due.clock == "idle" and _is_event_stream(self._headers):
            self._clocks.idle = math.inf
        else:
            self._expire(due)
            self._stop()

    # -- time is up --------------------------------------------------------------------------------

    def _expire(self, due: Due) -> None:
        """Answer first; then `_stop` cleans up."""
        self._expired, inner = due, self._inner
        self._noticed, self._elapsed = _clock.wall(), _clock.monotonic() - self._record.started
        self._loop_time = None if self._record.coroutine is None else self._record.loop_time
        self._target = inner or self._outer
        if self._begun:
            # Nothing can be sent any more that the client would understand: it is to see the connection end.
            # Most servers end it when the application does.
            self._closed = True
            self._abort()
        else:
            answer = self._options.answer if due.clock == "response" else _REFUSAL
            if inner is not None and self._inner_send is not None and not self._inner_begun:
                self._inner_closed = True
                self._answer(answer, self._inner_send)
            else:
                self._closed = True
                self._answer(answer, self._send)
            self._timer = self._lookout.loop.call_later(_ANSWERED_WITHIN, self._insist)
        self._see()

    def _leave(self) -> None:
        """The client has left: end the work for it, unless that is only what comes after the response."""
        if self._clocks.complete or self._target is not None:
            return
        self._left = self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._target = self._inner or self._outer
        self._inner_closed = not self._inner_begun
        self._see()
        self._stop()

    def _see(self) -> None:
        # What is watched further in is driven by hand: nothing leads to it from here.
        watched = self._record.coroutine
        self._sight = look_at(self._coroutine, watched if watched is not self._around else None)
        _abandoned.add(self)

    def _answer(self, answer: ASGIApp, send: Send) -> None:
        loop, context = self._lookout.loop, self._context.copy()
        self._delivery = Delivery(answer, self._plain_answer, self._scope, send, loop=loop, context=context)

    @property
    def _plain_answer(self) -> ASGIApp:
        in_response = self._expired is not None and self._expired.clock == "response"
        return self._options.plain_answer if in_response else _REFUSAL

    def _insist(self) -> None:
        """If the answer has not come through: send a plain one without the middlewares, and stop them."""
        delivery = self._delivery
        if delivery is None:
            return
        if not (self._begun or (self._closed and delivery.begun)):
            self._closed = True
            delivery.cancel()
            self._answer(self._plain_answer, self._send)
            self._stop_outer()
        self._timer = self._lookout.loop.call_later(_DELIVERED_WITHIN, self._give_up)

    def _give_up(self) -> None:
        """An answer that has begun and does not end."""
        if self._delivery is not None and not self._delivery.over:
            self._closed = True
            self._delivery.cancel()
            self._abort()

    def _abort(self) -> None:
        transport = transport_of(self._send)
        if transport is not None:
            transport.abort()

    # -- ending what runs --------------------------------------------------------------------------

    def _stop(self) -> None:
        """Cancel the code that runs, once, as soon as that breaks no promise."""
        section = self._target
        if section is None or section.is_over():
            return
        if section.is_shielded():
            section.when_resumed(self._stop)
            self._tell("thread" if self._sight.in_thread else "shielded")
            return
        section.cancel()
        self._be_patient(self._stop_again)
        if self._sight.in_thread:
            self._tell("thread")

    def _stop_again(self) -> None:
        """It has had its time to clean up."""
        section = self._target
        if section is None or section.is_over():
            return
        if section.is_shielded():
            section.when_resumed(self._stop_again)
            self._tell("shielded")
            return
        section.cancel()
        self._tell("running")

    def _stop_outer(self) -> None:
        self._target = self._outer
        self._stop()

    def _be_patient(self, then: Callable[[], None]) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self._lookout.loop.call_later(self._options.grace, then)

    async def _settle(self, section: Section) -> None:
        """The code of a section has ended after a deadline; the answer may still be on its way."""
        if self._target is section:
            if self._patience is not None:
                self._patience.cancel()
            if self._closed and section is not self._outer:
                # What stands around it has nothing left to do that anybody would see.
                self._be_patient(self._stop_outer)
            else:
                _abandoned.discard(self)
            self._tell("stopped")
        # What goes out through the middlewares needs them, and this one, until it is through.
        if self._delivery is not None and (section is self._outer or not self._closed):
            await self._delivery.wait(_DELIVERED_WITHIN)

    async def _end(self, section: Section) -> None:
        """All code has ended after a deadline."""
        try:
            await self._settle(section)
        finally:
            for timer in (self._timer, self._patience):
                if timer is not None:
                    timer.cancel()
            _abandoned.discard(self)

    def _tell(self, outcome: Outcome) -> None:
        """Report what became of it, the first time only."""
        due = self._expired
        if due is None or self._told:
            return
        self._told = True
        self._options.tell(
            Timeout(
                record=self._record,
                path=str(self._scope.get("path")),
                clock=due.clock,
                limit=due.limit,
                noticed=self._noticed,
                elapsed=self._elapsed,
                loop_time=self._loop_time,
                sight=self._sight,
                outcome=outcome,
            )
        )


async def _nothing() -> None:
    """What too late a message comes to."""


_LAST = frozenset({"http.response.body", "http.response.zerocopysend", "http.response.pathsend"})
"""What ends a response, unless more of it is announced."""


def _is_event_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a response is one of server-sent events, which may be silent for as long as they like."""
    return any(
        bytes(name).lower() == b"content-type" and bytes(value).lower().startswith(b"text/event-stream")
        for name, value in headers
    )
