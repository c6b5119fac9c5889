"""What a worker of a Dask cluster does with a call, and how it is stopped there.

A call runs in a thread of the worker, as Dask has it. It cannot be killed, but an exception can be raised in
it: when the worker's state machine lets go of a task that runs, since nobody wants it any more.
"""

from __future__ import annotations

import contextvars
import ctypes
import importlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from distributed import Worker, WorkerPlugin, get_worker
from distributed.protocol.serialize import dask_deserialize, dask_serialize
from distributed.utils import sync

from asyncguard.offloading._address import resolve
from asyncguard.offloading._failure import seal
from asyncguard.offloading._interrupt import Interrupted, is_delicate
from asyncguard.offloading._payload import Packed, PackError, UnpackError, pack
from asyncguard.offloading._summons import Summons, read
from asyncguard.offloading._wire import Kind
from asyncguard.offloading.dask._once import CLAIM
from asyncguard.offloading.dask._parcel import Parcel

__all__ = ["Answer", "Calls", "Refused", "serve"]

_PLUGIN = "asyncguard-stop-1"
_AGAIN_AFTER = 0.01


class Answer(NamedTuple):
    """What became of a call.

    Attributes:
        kind: A `Kind`.
        parcel: What goes with that.
        seconds: For how long its function ran.
    """

    kind: int
    parcel: Parcel
    seconds: float


class Refused(NamedTuple):
    """It was not begun.

    Attributes:
        where: The worker that has begun it before; empty if nobody waits for it.
    """

    where: str


# Dask pickles results once more, and copies them, unless it is told how to take them apart. (It goes by the
# type of the whole; of arguments it has its own way, see `Parcel`.)


@dask_serialize.register(Answer)  # type: ignore[untyped-decorator, no-untyped-call]
def _apart(answer: Answer) -> tuple[dict[str, Any], list[Any]]:
    kind, parcel, seconds = answer
    return (
        {"kind": kind, "seconds": seconds, "pieces": len(parcel.pickled)},
        [*parcel.pickled, *parcel.buffers],
    )


@dask_deserialize.register(Answer)  # type: ignore[untyped-decorator, no-untyped-call]
def _together(header: dict[str, Any], frames: list[Any]) -> Answer:
    pieces: int = header["pieces"]
    return Answer(header["kind"], Parcel([*frames[:pieces]], [*frames[pieces:]]), header["seconds"])


def serve(key: str, parcel: Parcel, is_stoppable: bool) -> Answer | Refused:
    """Run a call, in a thread of a worker.

    Args:
        key: What Dask calls it.
        parcel: What it says.
        is_stoppable: Whether it is to be stopped when nobody waits for it any more.
    """
    worker = get_worker()
    call = _calls.enter(key, is_stoppable)
    try:
        refusal: list[str] = sync(worker.loop, _claim, worker, key)
        if refusal:
            return Refused(refusal[0])
        began = time.perf_counter()
        kind, packed = _outcome(call, parcel)
        return Answer(int(kind), Parcel.of(packed), time.perf_counter() - began)
    finally:
        _calls.leave(call)


async def _claim(worker: Worker, key: str) -> list[str]:
    """Ask the scheduler; on the worker's loop, from where it stops calls as well."""
    if _PLUGIN not in worker.plugins:
        await worker.plugin_add(_Stop(worker), name=_PLUGIN, catch_errors=False)
    answer: list[str] = await getattr(worker.scheduler, CLAIM)(key=key, worker=worker.address)
    return answer


class _Stop(WorkerPlugin):
    """Stops what runs and is not wanted any more."""

    def __init__(self, worker: Worker) -> None:
        self._worker: Any = worker
        report = sys.unraisablehook

        def on_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
            if not issubclass(unraisable.exc_type, Interrupted):
                report(unraisable)
            elif (call := _calls.lost()) is not None:
                self._worker.loop.add_callback(self._stop_again, call)

        sys.unraisablehook = on_unraisable

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """See `WorkerPlugin`."""
        if start in ("executing", "long-running") and finish in ("cancelled", "released", "forgotten"):
            self._stop(key)

    def _stop_again(self, call: Call) -> None:
        # Not before it is out of the hook, where it would come to nothing as well.
        def stop() -> None:
            call.forget()
            self._stop(call.key)

        self._worker.loop.call_later(_AGAIN_AFTER, stop)

    def _stop(self, key: str) -> None:
        if not _calls.stop(key):
            self._worker.loop.call_later(_AGAIN_AFTER, self._stop, key)


# -- the call ----------------------------------------------------------------------------------------

Outcome = tuple[Kind, Packed]


def _outcome(call: Call, parcel: Parcel) -> Outcome:
    try:
        try:
            summons = read(parcel.body())
        except (UnpackError, LookupError) as error:
            return _fault("argument", str(error))
        importlib.import_module(summons.address.module)
        try:
            function = resolve(summons.address)
        except LookupError as error:
            return _fault("function", str(error))
        return _run(call, function, summons)
    except PackError as error:
        return _fault("result", str(error))
    except BaseException as error:  # even SystemExit: Dask would end the worker, and the calls of others
        sealed = seal(error)
        # Exceptions that hold on to themselves would hold on to all that their frames do, ours included.
        traceback.clear_frames(error.__traceback__)
        error.with_traceback(None)
        return Kind.ERROR, sealed


def _run(call: Call, function: Callable[..., Any], summons: Summons) -> Outcome:
    context = contextvars.copy_context()
    for variable, value in summons.context:
        context.run(variable.set, value)
    try:
        try:
            call.begin()
            result = context.run(function, *summons.args, **summons.kwargs)
            return Kind.RESULT, pack([("the result", result)])
        finally:
            call.end()
    finally:
        # If it was interrupted in `end`, before that had its way: there will not be another.
        call.end()


def _fault(reason: str, text: str) -> Outcome:
    return Kind.FAULT, pack([("the reason", (reason, text))])


# -- how it is stopped -------------------------------------------------------------------------------


class Call:
    """A call in a thread.

    Args:
        key: What Dask calls it.
        is_stoppable: Whether it may be stopped.
    """

    def __init__(self, key: str, is_stoppable: bool) -> None:
        self.key = key
        self._is_stoppable = is_stoppable
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._caller: CodeType | None = None
        self._is_running = False
        self._is_stopped = False
        self._is_raised = False

    def begin(self) -> None:
        """From now on it may be interrupted.

        Raises:
            Interrupted: If it is to stop.
        """
        with self._lock:
            if self._is_stopped:
                raise Interrupted
            self._caller = sys._getframe(1).f_code
            self._is_running = True

    def end(self) -> None:
        """It may not be interrupted any more; what was about to be raised is not."""
        with self._lock:
            self._is_running = False
            if self._is_raised:
                self._is_raised = False
                _absorb_here(self._thread)

    def stop(self) -> bool:
        """Interrupt it, once; false if that has to be tried again in a moment."""
        with self._lock:
            if self._is_stopped or not self._is_stoppable:
                return True
            if self._is_running:
                # The thread does not move on: we have the GIL.
                if is_delicate(sys._current_frames().get(self._thread), self._caller):
                    return False
                self._is_raised = True
                _raise_in(self._thread, Interrupted)
            self._is_stopped = True
            return True

    def has_lost(self) -> bool:
        """Whether it has been interrupted, and it is the calling thread's."""
        return self._is_raised and self._thread == threading.get_ident()

    def forget(self) -> None:
        """Its interruption came to nothing; it may be interrupted again."""
        with self._lock:
            self._is_raised = self._is_stopped = False


class Calls:
    """Those of one process."""

    def __init__(self) -> None:
        self._calls: dict[str, Call] = {}

    def enter(self, key: str, is_stoppable: bool) -> Call:
        """A call has come to the calling thread."""
        call = self._calls[key] = Call(key, is_stoppable)
        return call

    def leave(self, call: Call) -> None:
        """It is over."""
        if self._calls.get(call.key) is call:
            del self._calls[call.key]

    def stop(self, key: str) -> bool:
        """See `Call.stop`; nothing happens if there is no such call."""
        call = self._calls.get(key)
        return call is None or call.stop()

    def lost(self) -> Call | None:
        """The calling thread's, if it was interrupted where exceptions come to nothing, as in a `__del__`."""
        return next((call for call in [*self._calls.values()] if call.has_lost()), None)


_calls = Calls()


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    """Have it raised in a thread before its next step, in place of what was to be raised there."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _absorb_here(thread: int) -> None:
    """Nothing is to be raised in the calling thread any more.

    It could be taken back, by raising nothing; but CPython 3.11 then looks for it before every step of every
    thread from then on, and where a debugger or a coverage tool traces them, it gets no further than that.
    """
    while True:
        try:
            _raise_in(thread, Interrupted)
            for _ in range(1000):
                pass
        except Interrupted:
            return
        # It came in some `__del__`, and to nothing.
