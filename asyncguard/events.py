"""What hooks receive: frozen dataclasses without a reference to anything of the running request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "Advice",
    "BlockReport",
    "BlockedLine",
    "BusyReport",
    "Cause",
    "ClientReport",
    "DurationHistogram",
    "HangReport",
    "InFlight",
    "OffloadStats",
    "SharedState",
    "SharedStatus",
    "SourceLine",
    "StackSample",
    "StallHistogram",
    "ThreadStack",
    "TimeoutClock",
    "TimeoutReport",
    "Victim",
    "Windows",
]

Cause = Literal["cpu", "waiting", "gc", "gil", "unknown"]
"""Why the loop was blocked: a line computed (`cpu`), or it slept, waited for I/O or for a lock (`waiting`).
Or Python collected garbage (`gc`), which is no line's fault; or a line in another thread kept the global
interpreter lock (`gil`). `unknown` where the system does not tell."""

SharedState = Literal["closed", "opening", "open", "failing", "ended", "closing", "replaced"]
"""How a shared resource is: in use (`open`), in use though its last check failed (`failing`), gone by itself
and about to be opened anew (`ended`), or replaced by what a test has set in its place (`replaced`)."""

TimeoutClock = Literal["response", "idle", "body"]
"""Which clock of a request ran out: no response had begun (`response`), a response that had begun went silent
(`idle`), or the client sent nothing more of its body (`body`)."""


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A place in the source.

    Attributes:
        file: The path of the file; relative to the working directory where it is below it.
        line: The line number, from 1.
        function: The qualified name of the function.
        source: The text of the line, stripped; empty where the file cannot be read.
    """

    file: str
    line: int
    function: str
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line} in {self.function}"
        return f"{place}: {self.source}" if self.source else place


@dataclass(frozen=True, slots=True)
class Victim:
    """A request that had to wait because another one blocked the loop.

    Attributes:
        request: The label of the request, such as ``GET /users/{id}``.
        waited: For how many seconds: from when it was due, where that is known, to its next turn on the
            loop. Otherwise at most: from the start of the stall, or from its own last turn.
    """

    request: str
    waited: float


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about a blocking line.

    Attributes:
        text: One sentence that can be acted on.
        docs: The place in the documentation that says more, relative to its root.
    """

    text: str
    docs: str


@dataclass(frozen=True, slots=True)
class StackSample:
    """What was seen at one place of a stall.

    Attributes:
        stack: The calls that were running, outermost first.
        seconds: How much of the stall it stands for.
    """

    stack: tuple[SourceLine, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One stall of the event loop: the time in which it could run nothing else.

    `str(report)` is the sentence that the log shows.

    Attributes:
        id: A number that counts up within the process.
        started: When the stall began, in seconds since the epoch.
        duration: How long it lasted, in seconds; measured on the loop's own thread.
        cause: Why: `cpu`, `waiting`, `gc`, `gil` or `unknown`.
        line: The user's line in which most of the stall was spent. `None` if no single line was to
            blame, or if no line of the user's ran.
        exact: Whether `line` was seen running. If not, it is where the endpoint is defined: the time went
            in library code that worked for it, such as the serialisation of its result.
        call: What that line called, as it is written there (``requests.get``), or by its full name where
            the call is not written out (``csv.DictReader.__next__``, in a loop); empty if it called nothing.
        innermost: The innermost function in which the time went (``recv_into``); empty if unknown.
        request: The label of the request that did it (``GET /users/{id}``); `None` for code that
            belongs to no request, or if no single request was to blame.
        task: The name of the task that did it, as the loop knows it; `None` for plain callbacks, or if no
            single task was to blame.
        left_behind: Whether that request had ended before: a task that it started runs on.
        starting: Whether the application was starting up, so that no request can have waited for it.
        pieces: How many callbacks shared the stall, as far as seen: 1 for a single long hold.
        stack: The calls from the user's outermost line to the innermost one, outermost first.
        samples: All that was seen of the stall, the heaviest first: where the time went.
        victims: The requests that had to wait, the longest wait first.
        advice: What to do about it; `None` without a line, and for a start-up, which blocks nobody.
        held_by: The name of the thread that `line` ran in and that kept the global interpreter lock, if
            `cause` is `gil`; `None` otherwise.
        loop: The kind of the loop, such as ``uvloop.Loop`` or ``trio``.
        thread: The name of the loop's thread.
    """

    id: int
    started: float
    duration: float
    cause: Cause
    line: SourceLine | None
    exact: bool
    call: str
    innermost: str
    request: str | None
    task: str | None
    left_behind: bool
    starting: bool
    pieces: int
    stack: tuple[SourceLine, ...]
    samples: tuple[StackSample, ...]
    victims: tuple[Victim, ...]
    advice: Advice | None
    held_by: str | None
    loop: str
    thread: str

    def __str__(self) -> str:
        parts = [self.headline]
        if self.line:
            parts.append(f" at {self.line}" if self.exact else f" for the endpoint {self.line}")
        if self.victims:
            parts.append(f"; {self.suffering}")
        if self.advice:
            parts.append(f". {self.advice.text} ({self.advice.docs})")
        return "".join(parts)

    @property
    def headline(self) -> str:
        """Who blocked the loop, for how long and how, without the place."""
        milliseconds = f"{self.duration * 1000:.0f} ms"
        if self.cause == "gc":
            return f"garbage collection blocked the loop for {milliseconds}"
        if self.cause == "gil":
            doing = f" in {self.innermost}" if self.innermost else ""
            return f"thread {self.held_by} kept the loop from the GIL for {milliseconds}{doing}"
        doing = {"cpu": "computing", "waiting": "waiting", "unknown": "busy"}[self.cause]
        if self.innermost:
            doing += f" in {self.innermost}"
        return f"{self._culprit} blocked the loop for {milliseconds} ({doing})"

    @property
    def _culprit(self) -> str:
        if self.request is not None:
            return f"a task left behind by {self.request}" if self.left_behind else self.request
        if self.starting:
            return "start-up"
        return f"{self.pieces} or more callbacks in a row" if self.pieces > 1 else "code outside any request"

    @property
    def suffering(self) -> str:
        """How many requests had to wait, and for how long at most; empty if none had to."""
        if not self.victims:
            return ""
        longest = f"{self.victims[0].waited * 1000:.0f} ms"
        if len(self.victims) == 1:
            return f"1 request waited up to {longest}"
        return f"{len(self.victims)} requests waited, the longest up to {longest}"


@dataclass(frozen=True, slots=True)
class BusyReport:
    """A request that held the loop for long in pieces too small to be stalls.

    `str(report)` is the sentence that the log shows.

    Attributes:
        id: A number that counts up within the process.
        noticed: When that was found, in seconds since the epoch: at the end of the request, or of the
            window in which a longer one did so.
        request: The label of the request, such as ``GET /users/{id}``.
        loop_time: For how many seconds it held the loop in that window, stalls of its own left out.
        window: The length of the window in seconds.
        turns: In how many pieces, as far as counted: the first half of the threshold is not.
        longest: The longest of these pieces, in seconds.
        line: The user's line at which it gave the loop back after most of that time.
        advice: What to do about it.
    """

    id: int
    noticed: float
    request: str
    loop_time: float
    window: float
    turns: int
    longest: float
    line: SourceLine | None
    advice: Advice

    def __str__(self) -> str:
        place = f", giving it back at {self.line}" if self.line else ""
        return f"{self.headline}{place}. {self.advice.text} ({self.advice.docs})"

    @property
    def headline(self) -> str:
        """Which request held the loop, and for how long, without the place."""
        return (
            f"{self.request} held the loop for {self.loop_time:.2f} s of {self.window:.2f} s, "
            f"in pieces of up to {self.longest * 1000:.0f} ms"
        )


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """What one thread was doing.

    Attributes:
        name: The name of the thread.
        stack: Its calls, outermost first.
    """

    name: str
    stack: tuple[SourceLine, ...]


@dataclass(frozen=True, slots=True)
class HangReport:
    """A stall that has lasted too long and still does.

    `str(report)` is what the log shows: one sentence, and the stack of every thread.

    Attributes:
        seconds: How long it has lasted so far.
        request: The label of the request whose code holds the loop; `None` if none does.
        threads: What every thread is doing, the loop's first.
    """

    seconds: float
    request: str | None
    threads: tuple[ThreadStack, ...]

    def __str__(self) -> str:
        who = self.request or "code outside any request"
        lines = [f"the loop has been blocked for {self.seconds:.1f} s by {who}, and still is"]
        for stack, names in _shared_stacks(self.threads):
            lines.append(f"  thread {names}, innermost call last:")
            lines += [f"    {line}" for line in stack or ("no Python code",)]
        return "\n".join(lines)


def _shared_stacks(threads: tuple[ThreadStack, ...]) -> list[tuple[tuple[SourceLine, ...], str]]:
    """Each stack once, with the names of all threads that stand there: a pool's idle ones are many."""
    names: dict[tuple[SourceLine, ...], list[str]] = {}
    for thread in threads:
        names.setdefault(thread.stack, []).append(thread.name)
    return [
        (stack, found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more")
        for stack, found in names.items()
    ]


class Windows(NamedTuple):
    """A figure over the last 1, 10 and 60 seconds; over as many as there were, right after the start."""

    last_1s: float
    last_10s: float
    last_60s: float


@dataclass(frozen=True, slots=True)
class StallHistogram:
    """How many stalls there were of which length.

    Attributes:
        bounds: The upper bounds of the classes in seconds, each included; the last class has none.
        counts: How many stalls each class has: one number more than there are bounds.
        total: The seconds of all stalls together.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class DurationHistogram:
    """How many of something took how long.

    Attributes:
        bounds: The upper bounds of the classes in seconds, each included; the last class has none.
        counts: How many each class has: one number more than there are bounds.
        total: The seconds of all together.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """How a pool of worker processes is doing, and what has happened since it was made.

    Attributes:
        workers: How many processes there are, those that start included.
        idle: How many of them wait for a call.
        running: How many run one.
        queued: How many calls wait for a worker.
        calls: Calls that a worker has answered, with a result or an exception.
        refused: Calls that found the queue full.
        timeouts: Calls that ran out of time.
        cancelled: Calls that nobody waited for any more.
        crashes: Calls whose worker died by itself.
        kills: Workers that were ended since they did not stop when told to.
        respawns: Workers that were started in place of one that had died.
        recycled: Workers that were replaced for their number of calls or their memory.
        wait: For how long calls waited for a worker.
        run: For how long they ran.
    """

    workers: int
    idle: int
    running: int
    queued: int
    calls: int
    refused: int
    timeouts: int
    cancelled: int
    crashes: int
    kills: int
    respawns: int
    recycled: int
    wait: DurationHistogram
    run: DurationHistogram


@dataclass(frozen=True, slots=True)
class InFlight:
    """A request that has begun and not ended.

    Attributes:
        request: Its label, such as ``GET /users/{id}``.
        age: Seconds since it began.
        line: The user's line that it is awaiting; where its endpoint is defined, if that is not known.
    """

    request: str
    age: float
    line: SourceLine | None


@dataclass(frozen=True, slots=True)
class BlockedLine:
    """The stalls that one line has caused so far.

    Attributes:
        line: The line; `None` gathers the stalls without one.
        call: What the line called in the worst of them.
        requests: The labels of the requests that ran it, in the order of first sight; 10 at most.
        count: How many stalls.
        total: Their seconds together.
        worst: The longest, in seconds.
        victims: How many requests had to wait, over all stalls.
        advice: What to do about it.
    """

    line: SourceLine | None
    call: str
    requests: tuple[str, ...]
    count: int
    total: float
    worst: float
    victims: int
    advice: Advice | None


@dataclass(frozen=True, slots=True)
class TimeoutReport:
    """A request whose time was up, and what it was awaiting then.

    `str(report)` is the sentence that the log shows.

    Attributes:
        id: A number that counts up within the process.
        noticed: When its time was up, in seconds since the epoch.
        request: The label of the request: method and route template (``GET /users/{id}``).
        path: The path that was asked for, without the query.
        clock: Which clock ran out: `response`, `idle` or `body`.
        limit: What that clock was set to, in seconds.
        elapsed: Seconds since the request began.
        line: The user's innermost line that it was awaiting, in its worker thread where it ran in one; where
            the endpoint is defined, if no line of the user's was found.
        stack: The user's lines that were awaiting each other, outermost first.
        loop_time: For how many seconds the request had held the loop; `None` without blocking detection.
        outcome: What became of the code that was still running: it was cancelled and ended (`stopped`), it
            goes on in a worker thread (`thread`), it goes on since it is shielded from cancellation
            (`shielded`), or it goes on though it was cancelled (`running`).
    """

    id: int
    noticed: float
    request: str
    path: str
    clock: TimeoutClock
    limit: float
    elapsed: float
    line: SourceLine | None
    stack: tuple[SourceLine, ...]
    loop_time: float | None
    outcome: Literal["stopped", "thread", "shielded", "running"]

    def __str__(self) -> str:
        awaiting = "awaiting" if self.stack else "in the endpoint"
        place = f"; {awaiting} {self.line}" if self.line else ""
        went_on = {
            "stopped": "",
            "thread": "; it runs on in its thread",
            "shielded": "; it is shielded from cancellation and runs on",
            "running": "; it was cancelled, and runs on",
        }[self.outcome]
        return f"{self.headline}{place}{went_on}"

    @property
    def headline(self) -> str:
        """Which request ran out of time, and how, without the place."""
        said = {
            "response": "got no answer in",
            "idle": "was cut off: nothing of its response was sent for",
            "body": "was refused: its body did not come in",
        }[self.clock]
        limit = f"{self.limit:.1f}" if self.limit >= 1 else f"{self.limit:.3g}"
        return f"{self.request} {said} {limit} s"


@dataclass(frozen=True, slots=True)
class SharedStatus:
    """A shared resource, as it is on one event loop.

    Attributes:
        name: Its name.
        declared: The line that declares it.
        state: How it is.
        opened: When the object that is in use was opened, in seconds since the epoch; `None` if none is.
        age: For how many seconds that has been open; `None` if none is.
        renewals: How many times it has been replaced by a new one since the lifespan began.
        in_use: How many of its connections are in use; `None` where the library does not tell.
        waiting: How many callers wait for a connection; `None` where the library does not tell.
        last_error: What went wrong last, in opening, checking or renewing it; `None` if nothing did since it
            was last well.
    """

    name: str
    declared: SourceLine
    state: SharedState
    opened: float | None = None
    age: float | None = None
    renewals: int = 0
    in_use: int | None = None
    waiting: int | None = None
    last_error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it can be used."""
        return self.state in ("open", "replaced")


@dataclass(frozen=True, slots=True)
class ClientReport:
    """A line that builds a client for each request, to throw it away.

    `str(report)` is the sentence that the log shows.

    Attributes:
        id: A number that counts up within the process.
        noticed: When that was found, in seconds since the epoch.
        request: The label of the request that built another one: ``GET /users/{id}``.
        client: The class of the client, such as ``httpx.AsyncClient``.
        line: The user's line that builds it. `None` if no line of the user's led there, and the request had
            not reached its endpoint: a library's middleware does it.
        exact: Whether `line` was seen building it. If not, it is where the endpoint is defined: a library
            does it for that.
        call: What that line called, as it is written there; empty if that is not known.
        stack: The calls from the user's outermost line to the client's constructor, outermost first.
        times: How many that the line has built were closed, or gone, when their request ended. Of those that
            were in use at the same time, one is counted.
        seconds: How long it took to build one, on average.
        advice: What to do about it.
    """

    id: int
    noticed: float
    request: str
    client: str
    line: SourceLine | None
    exact: bool
    call: str
    stack: tuple[SourceLine, ...]
    times: int
    seconds: float
    advice: Advice

    def __str__(self) -> str:
        place = ""
        if self.line:
            place = f" at {self.line}" if self.exact else f" for the endpoint {self.line}"
        elif self.stack:
            place = f" at {self.stack[-1]}"
        return f"{self.headline}{place}; {self.waste}. {self.advice.text} ({self.advice.docs})"

    @property
    def headline(self) -> str:
        """Which request builds what, without the place."""
        return f"{self.request} builds its own {self.client}"

    @property
    def waste(self) -> str:
        """How many have been thrown away, and how long it took to build them."""
        return (
            f"{self.times} before it were thrown away with their requests, "
            f"after {self.seconds * 1000:.1f} ms to build each"
        )
