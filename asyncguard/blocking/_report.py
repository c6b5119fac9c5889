"""From a stall to the report of it: which line, which call, whose request, who suffered and why."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from asyncguard._frames import RawFrame, await_chain
from asyncguard._request import RequestRecord
from asyncguard._source import (
    call_text,
    endpoint_line,
    frame_line,
    function_name,
    is_own_code,
    is_user_code,
    line_number,
    resolved_name,
    source_line,
)
from asyncguard.blocking._advice import advice_for
from asyncguard.blocking._stall import Aftermath, Sample, Stall
from asyncguard.blocking._vitals import kept_waking
from asyncguard.events import BlockReport, Cause, SourceLine, StackSample, Victim

__all__ = ["Excuse", "awaited_line", "compose", "compose_gil", "excuse"]

Excuse = Literal["starved", "suspended", "gil", "unexplained"]
"""Why nobody is blamed for a stall: the cores were busy with other processes, this process was stopped,
other threads had the global interpreter lock, or there was nothing to be seen of it, neither a line nor
a request."""

_ARRIVED_AFTER = 0.005
"""Linux counts the time since a connection's last data in ticks, of 4 ms at most. What seems to have arrived
this shortly before the end of a stall may have arrived after it."""

_numbers = itertools.count(1)
Key = TypeVar("Key", bound=Hashable)


def excuse(stall: Stall, threshold: float, project_root: str | None) -> Excuse | None:
    """Whether there would have been no stall, had the system and other threads let this one run.

    Args:
        stall: The stall.
        threshold: The shortest stall of interest, in seconds.
        project_root: The directory whose files are the user's.

    Returns:
        `None` if there would have been one: the code is to blame.
    """
    duration, spent = stall.duration, stall.spent
    cpu = math.inf if spent.cpu is None else spent.cpu  # unknown: as if it had computed all the time
    # The window may have begun before the stall: only what cannot have been before it counts.
    before = max(0.0, spent.at - duration)
    if duration - max(0.0, spent.queued - before) < threshold:
        return "starved"
    # It was stopped for sure if the resting thread woke. For up to a nap of the watchdog's, that did not make
    # it late.
    stopped = spent.resting_turns > 0 and duration - spent.overslept < 2 * threshold
    if stopped and cpu - before < duration / 4:
        return "suspended"
    # A call in C that waits without giving the GIL up keeps the watchdog from its look as well, but not from
    # waking.
    kept = kept_waking(spent.watchdog_turns, spent.overslept)
    if cpu < duration / 4 and duration - spent.overslept < threshold and not kept:
        return "suspended"
    # Others computed for most of the window, or kept the watchdog from the GIL as well. The window may also
    # have begun after the stall: too little of it says nothing.
    window = spent.at if spent.at >= duration / 4 else duration
    if cpu < max(duration / 4, min(threshold, window / 4)):
        others = max(spent.process_cpu - cpu, spent.overslept if kept else 0.0)
        if others >= window / 2 and kept_waking(spent.turns, window):
            return "gil"
    seen = stall.turn is not None or any(_frames_seen(sample, project_root) for sample in stall.samples)
    return None if seen or _is_collection(stall, threshold) else "unexplained"


def _is_collection(stall: Stall, threshold: float) -> bool:
    """Whether there would have been no stall without the garbage collections on the loop's thread."""
    return stall.duration - stall.spent.collecting < threshold


def _cause(stall: Stall, threshold: float) -> Cause:
    spent = stall.spent
    if _is_collection(stall, threshold):
        return "gc"
    if spent.cpu is None:
        return "unknown"
    return "cpu" if spent.cpu >= (spent.at - spent.queued) / 2 else "waiting"


def compose(stall: Stall, threshold: float, project_root: str | None) -> BlockReport:
    """Make the report of a stall that is somebody's fault."""
    cause = _cause(stall, threshold)
    sights: list[_Sight] = []
    record: RequestRecord | None = None
    if cause != "gc":  # a collection falls on whichever line allocates next
        sights = [_Sight.of(sample, weight, project_root) for sample, weight in _weighed(stall)]
        record = _record(stall, sights)
    inside = _inside(sights)
    pieces = len({sight.sample.callback for sight in sights}) or 1
    task = _majority((sight.sample.task, sight.weight) for sight in sights)
    line = call = innermost = None
    stack: tuple[SourceLine, ...] = ()
    names: list[str] = []
    if inside:
        place = inside[0]
        names, call, innermost = _calls_at(place)
        # Another look at the same line may have caught it in a call that this one did not.
        names += [name for other in inside[1:] for name in _names_called(other)]
        line = source_line(place.frame.code, place.line)
        stack = _stack(place, project_root)
    elif record is not None:
        # No line of the user's was running: the framework worked for the endpoint.
        line = endpoint_line(record.endpoint)
        top = max(sights, key=lambda sight: sight.weight, default=None)
        if top is not None and top.sample.frames:
            names = [function_name(frame) for frame in reversed(top.sample.frames)]
            innermost = _short(_called_by(top.sample.frames[0]) or names[-1])
    return BlockReport(
        id=next(_numbers),
        started=stall.wall_end - stall.duration,
        duration=stall.duration,
        cause=cause,
        line=line,
        exact=bool(inside),
        call=call or "",
        innermost=innermost or "",
        request=record.label if record is not None else None,
        task=task,
        left_behind=record is not None and _had_ended(record, stall),
        starting=stall.starting,
        pieces=pieces,
        stack=stack,
        samples=_stack_samples(sights),
        victims=_victims(stall, record),
        advice=advice_for(names, cause, fan_out=_is_fan_out(pieces, sights))
        if (line is not None or cause == "gc") and not stall.starting
        else None,
        held_by=None,
        loop=stall.loop,
        thread=stall.thread,
    )


def compose_gil(stall: Stall, project_root: str | None) -> BlockReport | None:
    """Make the report of a stall in which another thread had the GIL; `None` if no line of it was seen."""
    if not stall.others:
        return None
    name = stall.others[-1][0].name
    looks = [other for others in stall.others for other in others if other.name == name and other.frames]
    sights = [
        _Sight.of(Sample(stall.end, look.frames, None, 0), stall.duration / len(looks), project_root)
        for look in looks
    ]
    # It may have been seen at rest as well, when it was done.
    inside = _inside([sight for sight in sights if sight.user is not None])
    if not inside:
        return None
    place = inside[0]
    names, call, innermost = _calls_at(place)
    return BlockReport(
        id=next(_numbers),
        started=stall.wall_end - stall.duration,
        duration=stall.duration,
        cause="gil",
        line=source_line(place.frame.code, place.line),
        exact=True,
        call=call,
        innermost=innermost,
        request=None,
        task=None,
        left_behind=False,
        starting=stall.starting,
        pieces=1,
        stack=_stack(place, project_root),
        samples=_stack_samples(sights),
        victims=_victims(stall, None),
        advice=None if stall.starting else advice_for(names, "gil", fan_out=False),
        held_by=name,
        loop=stall.loop,
        thread=stall.thread,
    )


def _is_fan_out(pieces: int, sights: Sequence[_Sight]) -> bool:
    """Whether many short callbacks of one request made up the stall.

    A long one would be seen again and again; and of two looks, one may have caught what came right before or
    after it. Those of many requests are just a crowd.
    """
    one = _majority((sight.sample.record, sight.weight) for sight in sights) is not None
    return one and pieces > 2 and pieces > len(sights) / 2


class _Weighed(NamedTuple):
    sample: Sample
    weight: float


def _weighed(stall: Stall) -> list[_Weighed]:
    """Each sample with the time it stands for: from the sample before it to itself, the last to the end."""
    weighed: list[_Weighed] = []
    before = stall.start
    for index, sample in enumerate(stall.samples):
        until = stall.end if index == len(stall.samples) - 1 else sample.at
        weighed.append(_Weighed(sample, until - before))
        before = until
    return weighed


@dataclass(frozen=True, slots=True)
class _Sight:
    """A weighed sample, read: where the user's code stood in it.

    Attributes:
        user: The index of the innermost frame of the user's; `None` if there is none.
        line: The line number there.
    """

    sample: Sample
    weight: float
    user: int | None
    line: int

    @classmethod
    def of(cls, sample: Sample, weight: float, project_root: str | None) -> _Sight:
        sample = sample._replace(frames=_frames_seen(sample, project_root))
        for index, frame in enumerate(sample.frames):
            if is_user_code(frame.code.co_filename, project_root):
                return cls(sample, weight, index, line_number(frame))
            if _is_routing(frame):
                # Further out are only middlewares, which merely await what the framework does here.
                break
        return cls(sample, weight, None, 0)

    @property
    def frame(self) -> RawFrame:
        assert self.user is not None
        return self.sample.frames[self.user]


def _frames_seen(sample: Sample, project_root: str | None) -> tuple[RawFrame, ...]:
    """The frames of a look, from the first that is not asyncguard's on.

    The look may fall into asyncguard's own callback at a garbage collection, or into its heartbeat.
    """
    return tuple(itertools.dropwhile(lambda frame: _is_ours(frame, project_root), sample.frames))


def _is_ours(frame: RawFrame, project_root: str | None) -> bool:
    """Whether the frame runs asyncguard, and not an example that is installed with it."""
    file = frame.code.co_filename
    return is_own_code(file) and not is_user_code(file, project_root)


def _is_routing(frame: RawFrame) -> bool:
    """Whether the frame leads a request to its endpoint."""
    module = frame.namespace.get("__name__")
    return module in ("starlette.routing", "fastapi.routing") and bool(
        frame.code.co_flags & inspect.CO_COROUTINE
    )


def _record(stall: Stall, sights: Sequence[_Sight]) -> RequestRecord | None:
    """The request that had more than half of the stall."""
    turn = stall.turn
    if turn is not None and turn.until - turn.since > stall.duration / 2:
        return turn.record
    weighed = [(sight.sample.record, sight.weight) for sight in sights]
    record = _majority(weighed)
    if record is not None:
        return record
    # Several requests of one route, one after the other: any of them stands for the route.
    route = _majority((record and record.label, weight) for record, weight in weighed)
    return next((record for record, _ in weighed if record is not None and record.label == route), None)


def _had_ended(record: RequestRecord, stall: Stall) -> bool:
    """Whether the request had ended before its code was seen; the start may be but an estimate."""
    if stall.turn is not None and stall.turn.record is record:
        return False
    seen = (sample.at for sample in stall.samples if sample.record is record)
    return record.finished_at < min(seen, default=stall.start)


def _inside(sights: Sequence[_Sight]) -> list[_Sight]:
    """The looks that show the user's line that had most of the stall, the heaviest first.

    A loop of a few lines spends its time on all of them; then the function decides, and its heaviest
    line stands for it.
    """
    function = _majority(
        (sight.frame.code if sight.user is not None else None, sight.weight) for sight in sights
    )
    if function is None:
        return []
    inside = [s for s in sights if s.user is not None and s.frame.code is function]
    line = _heaviest((sight.line, sight.weight) for sight in inside)
    return sorted((s for s in inside if s.line == line), key=lambda sight: sight.weight, reverse=True)


def _majority(weighed: Iterable[tuple[Key | None, float]]) -> Key | None:
    """The key with more than half of the weight, if there is one."""
    totals = _totals(weighed)
    top = max(totals, key=totals.__getitem__, default=None)
    return top if totals and totals[top] > sum(totals.values()) / 2 else None


def _heaviest(weighed: Iterable[tuple[Key, float]]) -> Key:
    totals = _totals(weighed)
    return max(totals, key=totals.__getitem__)


def _totals(weighed: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    totals: dict[Key, float] = {}
    for key, weight in weighed:
        totals[key] = totals.get(key, 0.0) + weight
    return totals


class _Calls(NamedTuple):
    """The full names of what a line called, and what is shown of them: the first, and the last's own name."""

    names: list[str]
    call: str
    innermost: str


def _calls_at(place: _Sight) -> _Calls:
    names = _names_called(place)
    call = call_text(place.frame) or (names[0] if names else "")
    return _Calls(names, call, _short(names[-1] if names else function_name(place.frame)))


def _names_called(place: _Sight) -> list[str]:
    """The full names of what the user's line called, from there inwards."""
    assert place.user is not None
    names = []
    if text := call_text(place.frame):
        names.append(resolved_name(place.frame, text))
    names += [function_name(frame) for frame in reversed(place.sample.frames[: place.user])]
    if place.user and (innermost := _called_by(place.sample.frames[0])):
        names.append(innermost)
    return names


def _called_by(frame: RawFrame) -> str:
    """The full name of the C function that the innermost frame was in, if it was in one."""
    text = call_text(frame)
    return resolved_name(frame, text) if text else ""


def _stack_samples(sights: Sequence[_Sight]) -> tuple[StackSample, ...]:
    """All that was seen, equal stacks together, the heaviest first."""
    totals = _totals(
        (tuple((frame.code, line_number(frame)) for frame in reversed(sight.sample.frames)), sight.weight)
        for sight in sights
        if sight.sample.frames
    )
    return tuple(
        StackSample(tuple(itertools.starmap(source_line, stack)), seconds)
        for stack, seconds in sorted(totals.items(), key=lambda item: -item[1])
    )


def _stack(place: _Sight, project_root: str | None) -> tuple[SourceLine, ...]:
    """From the user's outermost line to the innermost frame, outermost first."""
    frames = itertools.dropwhile(
        lambda frame: not is_user_code(frame.code.co_filename, project_root), reversed(place.sample.frames)
    )
    return tuple(map(frame_line, frames))


def awaited_line(record: RequestRecord, project_root: str | None) -> SourceLine | None:
    """The user's innermost line that a request is awaiting; where its endpoint is, if there is none."""
    innermost = None
    for code, line in await_chain(record.coroutine):
        if is_user_code(code.co_filename, project_root):
            innermost = source_line(code, line)
    return innermost or endpoint_line(record.endpoint)


def _victims(stall: Stall, culprit: RequestRecord | None) -> tuple[Victim, ...]:
    waits: dict[RequestRecord, float] = {}
    connections = {culprit.connection} if culprit is not None else set[object]()
    settled = {culprit}
    for record, since, resumed, round_ in stall.aftermath.waits:
        if record in settled or resumed < stall.end:
            continue
        if round_ > stall.round + Aftermath.ROUNDS:
            break
        settled.add(record)
        new = since == -math.inf
        if new and record.arrived is not None:
            since = record.arrived
            new = False
            if stall.end - since < _ARRIVED_AFTER:
                continue
        # Whose connection was busy until then has sent this request only now, and did not wait.
        if new and record.connection is not None and record.connection in connections:
            continue
        connections.add(record.connection)
        due = stall.aftermath.due.get(record, -math.inf)
        if max(since, due) < stall.end:
            waits[record] = resumed - max(since, stall.start, due)
    return tuple(
        Victim(record.label, wait)
        for record, wait in sorted(waits.items(), key=lambda item: -item[1])
        if wait > 0
    )


def _short(name: str) -> str:
    """The last part of a name: what a person recognises."""
    return name.rpartition(".")[2]
