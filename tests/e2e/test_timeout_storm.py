"""Thousands of requests that run out of time: one response each, and nothing left of them."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.e2e.timeout_storm import HANDLERS, HEADER, body_of
from tests.raw_client import Surplus, Truncated, get
from tests.servers import HOST, Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests.e2e.timeout_storm:app"
PATIENCE = 60.0
"""Seconds after which a response is given up that should have come within one."""


# -- a client for hundreds of requests at a time ---------------------------------------------------


class Answer(NamedTuple):
    """A whole response."""

    status: int
    body: str


class Client:
    """A connection for one request after the other, made anew when it has ended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._before: list[str] = []  # what has been asked on this connection: an error may stem from there

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Make one request.

        Raises:
            Truncated: If the response is not whole.
            Surplus: If there is something else on the connection.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
            self._before = []
        self._before.append(path)
        fields = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._streams[1].write(f"GET {path} HTTP/1.1\r\nHost: test\r\n{fields}\r\n".encode())
        try:
            return await self._receive(self._streams[0])
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await self.close()
            raise Truncated(f"{error!r} after {self._before}") from error
        except ValueError as error:
            raise Surplus(f"in place of the response to {path}: {error!r}") from error

    async def _receive(self, reader: asyncio.StreamReader) -> Answer:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
        version, status, *_ = first.split(" ")
        if version != "HTTP/1.1":
            raise ValueError(first)
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(fields["content-length"]))
        if fields.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if fields.get("connection") == "close":
            await self.close()
        return Answer(int(status), body.decode())

    async def close(self) -> None:
        """Leave."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def problem(answer: Answer, number: int) -> str | None:
    """What is wrong with a response, if it is none to the request of this number."""
    if answer.status == 200:
        return None if answer.body == body_of(number) else "not its body"
    if answer.status == 500:
        return None if answer.body == "Internal Server Error" else "not the server's error"
    is_answer = answer.status == 504 and json.loads(answer.body)["title"] == "Gateway Timeout"
    return None if is_answer else "not an answer"


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner() as runner:
        runner.run(main)


# -- the storm -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """One request.

    Attributes:
        kind: What its handler does; see `HANDLERS`.
        pause: How many milliseconds that takes, where it is to end by itself.
        deadline: After how many milliseconds its caller wants an answer.
        leaves: After how many milliseconds its client leaves.
        compressed: Whether its client takes a compressed response.
    """

    kind: str
    pause: int
    deadline: int | None
    leaves: int | None
    compressed: bool


CUT = 0
"""Stands among the statuses for a response that the client sees the connection end in."""
LEFT = -1
"""Stands there for what the client has not waited for."""

ALLOWED: Mapping[str, set[int]] = {
    # Even what is quick comes too late on a machine that is slow enough.
    "quick": {200, 504},
    "asleep": {504},
    "thread": {200, 504},
    "shielded": {504},
    "swallowing": {504},
    "raising": {500, 504},
    "failing-cleanup": {504},
    "streaming": {200, 504, CUT},
    "stalling": {504, CUT},
    "background": {200, 504},
}
LEAVES_CONNECTIONS = {"raising", "failing-cleanup"}
"""After an exception the server closes the connection, without having said so."""

PLANS = st.builds(
    Plan,
    kind=st.sampled_from(sorted(HANDLERS)),
    pause=st.integers(0, 400),
    deadline=st.none() | st.just(0) | st.integers(0, 300) | st.integers(0, 300),
    leaves=st.none() | st.none() | st.integers(0, 400),
    compressed=st.booleans(),
)

EXAMPLES = 6  # the first of which is always the simplest: quick requests only
DISTINCT = 400
COPIES = 5
CONCURRENT = 200
POOL = {"AnyIO worker thread": 40}


class Outcome(NamedTuple):
    """What came of a request.

    Attributes:
        number: Which one it is.
        plan: What was planned for it.
        status: That of its response, or `CUT` or `LEFT`.
        wrong: What is wrong with that, whatever the plan.
        cut: How the connection ended in it.
    """

    number: int
    plan: Plan
    status: int
    wrong: str | None = None
    cut: str = ""

    @property
    def path(self) -> str:
        return f"/storm/{self.plan.kind}/{self.plan.pause}/{self.number}"

    @property
    def is_as_planned(self) -> bool:
        allowed = {504} if self.plan.deadline == 0 else ALLOWED[self.plan.kind]
        return self.wrong is None and (
            self.status in allowed or (self.status == LEFT and self.plan.leaves is not None)
        )


async def ask(client: Client, number: int, plan: Plan) -> Outcome:
    made = Outcome(number, plan, LEFT)
    headers = {"Accept-Encoding": "gzip" if plan.compressed else "identity"}
    if plan.deadline is not None:
        headers[HEADER] = f"{plan.deadline / 1000:.3f}"
    asked = asyncio.ensure_future(client.get(made.path, headers))
    await asyncio.wait([asked], timeout=PATIENCE if plan.leaves is None else plan.leaves / 1000)
    if not asked.done():
        asked.cancel()
        await asyncio.wait([asked])
        await client.close()
        return made if plan.leaves is not None else made._replace(wrong="no response")
    try:
        answer = asked.result()
    except Truncated as cut:
        return made._replace(status=CUT, cut=str(cut))
    except Surplus as surplus:
        return made._replace(wrong=str(surplus))
    if plan.kind in LEAVES_CONNECTIONS:
        await client.close()
    return made._replace(status=answer.status, wrong=problem(answer, number))


last_numbers = itertools.count(-1, -1)
"""Those of the last requests of connections."""


async def make(port: int, plans: Iterator[tuple[int, Plan]], outcomes: list[Outcome]) -> None:
    """Make one planned request after the other, on one connection as long as that lasts."""
    client = Client(port)
    try:
        for number, plan in plans:
            outcomes.append(await ask(client, number, plan))
        # Nothing has come behind the last response.
        number = next(last_numbers)
        outcomes.append(await ask(client, number, Plan("quick", 0, None, None, compressed=False)))
    finally:
        await client.close()


async def make_all(port: int, plans: Iterable[tuple[int, Plan]], outcomes: list[Outcome]) -> None:
    shared = iter(plans)
    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENT):
            group.create_task(make(port, shared, outcomes))


class Storm:
    """The server of a storm, and what is found out about it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.numbers = itertools.count(1)
        self.statuses: Counter[int] = Counter()
        self.reported: Counter[str] = Counter()
        self.resident: list[int] = []
        run(make_all(server.port, [], []))  # each connection once
        self.before = self.counts()

    def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = get(self.server.port, "/counts").json()
        return found

    def left(self) -> dict[str, Any]:
        """What there is more of than there was before, by kind."""
        before, now = self.before, self.counts()
        more = {
            kind: {name: count for name, count in now[kind].items() if count > before[kind].get(name, 0)}
            for kind in ("tasks", "timers", "objects", "unfinished", "threads")
        }
        # Those of the pool stay; of each of the guard's own there is one at most, whatever the requests.
        for name in list(more["threads"]):
            if now["threads"][name] <= (1 if name.startswith("asyncguard-") else POOL.get(name, 0)):
                del more["threads"][name]
        singles = ("abandoned", "borrowed", "descriptors")
        single = {kind: now[kind] for kind in singles if now[kind] > before[kind]}
        return {kind: found for kind, found in {**more, **single}.items() if found}

    def survive(self, plans: list[Plan]) -> list[Any]:
        """Make the planned requests; returns all that is wrong with what came of them."""
        outcomes: list[Outcome] = []
        run(make_all(self.server.port, zip(self.numbers, plans * COPIES, strict=False), outcomes))
        wrong: list[Any] = [each for each in outcomes if not each.is_as_planned]
        if len(outcomes) != len(plans) * COPIES + CONCURRENT:
            wrong.append(f"{len(outcomes)} outcomes")
        left: dict[str, Any] = {"nothing": "has been counted yet"}

        def nothing_left() -> bool:
            nonlocal left
            left = self.left()
            return not left

        with suppress(AssertionError):
            eventually(nothing_left, "nothing is left of the requests")
        wrong += left.items()
        wrong += self.unlike_reports(outcomes)
        self.statuses.update(each.status for each in outcomes)
        self.resident.append(self.counts()["resident"])
        return wrong

    def unlike_reports(self, outcomes: list[Outcome]) -> Iterator[str]:
        """Reports that tell otherwise than the clients do."""
        told = get(self.server.port, "/reports").json()
        times = Counter(path for path, _ in told)
        self.reported.update(clock for _, clock in told)
        yield from (f"{path} was reported {count} times" for path, count in times.items() if count > 1)
        in_time = {each.path for each in outcomes if each.status in (200, 500)}
        yield from (f"{path} was answered by its handler, and reported" for path in times.keys() & in_time)


WRITTEN = re.compile(
    r"GET /storm/\S+ (got no answer in|was cut off: nothing of its response was sent for) \S+ s"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop"])
def test_a_storm_is_answered_once_each_and_leaves_nothing(kind: str) -> None:
    with serve(kind, APP, "--log-level", "warning") as server:
        storm = Storm(server)
        wrong: list[Any] = []

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(PLANS, min_size=DISTINCT, max_size=DISTINCT))
        def example(plans: list[Plan]) -> None:
            if not wrong:  # as an exception, it would have Hypothesis make thousands of requests again
                wrong.extend(storm.survive(plans))

        example()
        counts = storm.counts()
        print(storm.statuses, storm.reported, storm.resident, counts)
        assert not wrong, "\n".join(map(str, [f"{len(wrong)} in all:", *wrong[:20]]))
        assert sum(storm.statuses.values()) >= 10_000
        assert set(storm.statuses) == {200, 500, 504, CUT, LEFT}
        assert set(storm.reported) == {"response", "idle"}
        assert set(counts["begun"]) >= set(HANDLERS)
        assert counts["planned"] >= storm.statuses[500]
        assert storm.resident[-1] - storm.resident[1] < 16 << 20
        unexpected = [line for line in server.stderr.splitlines() if not WRITTEN.match(line)]
        assert unexpected == []


# -- the race --------------------------------------------------------------------------------------

# Of which servers, how many connections and how many requests on each.
RACES = {"uvicorn-asyncio": (32, 100), "uvicorn-uvloop": (32, 100), "hypercorn-trio": (16, 50)}
WIDEST, NARROWEST = 4000.0, 20.0
"""Microseconds by which a handler comes nearer to the point where it would be too late."""
LAYERS = ("race", "race-single")
"""The connections take turns in which of these they are about."""


async def race(port: int, kind: str, lane: int, count: int, statuses: list[int]) -> None:
    """Make requests on one connection, each sooner than the last if that was too late, or else later."""
    client, chance, layers = Client(port), random.Random(lane), LAYERS[lane % 2]
    offset, step = 0.0, WIDEST
    try:
        for number in range(lane * count, (lane + 1) * count):
            async with asyncio.timeout(PATIENCE):
                answer = await client.get(f"/{layers}/{kind}/{max(round(offset), -45_000)}/{number}")
            assert problem(answer, number) is None, answer
            if statuses:  # in small steps where it is close, and in large ones again where it is not any more
                turned = answer.status != statuses[-1]
                step = max(step / 2, NARROWEST) if turned else min(step * 1.5, WIDEST)
            statuses.append(answer.status)
            offset += chance.uniform(0.5, 1.5) * (step if answer.status == 200 else -step)
        for _ in range(3):  # it goes on, and nothing is left over on it
            answer = await client.get(f"/{layers}/quick/0/{number}")
            assert problem(answer, number) is None, answer
    finally:
        await client.close()


@pytest.mark.parametrize("how", ["asleep", "thread"])
@pytest.mark.parametrize("kind", RACES)
def test_an_answer_in_the_tick_of_the_deadline_is_the_only_one(kind: str, how: str) -> None:
    lanes, count = RACES[kind]
    statuses: list[list[int]] = [[] for _ in range(lanes)]

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for lane in range(lanes):
                group.create_task(race(server.port, how, lane, count, statuses[lane]))

    with serve(kind, APP) as server:
        run(main())
        for number, layers in enumerate(LAYERS):
            raced = statuses[number :: len(LAYERS)]
            found = Counter(itertools.chain.from_iterable(raced))
            turns = sum(before != after for lane in raced for before, after in itertools.pairwise(lane))
            print(layers, found, turns)
            assert found.total() == lanes * count / len(LAYERS)
            assert set(found) == {200, 504}
            assert turns > found.total() / 10  # it has been close
        eventually(lambda: get(server.port, "/gauge").json() == 0, "the gauge at 0")
        assert "Traceback" not in server.stdout + server.stderr
