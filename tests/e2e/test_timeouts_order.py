"""Requests that run out of time, over real HTTP: in which order, and how often, things happen.

Where `test_timeouts` has handlers that take long, those here stand at a gate which the client opens when it
has got its answer: no machine is too slow for them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.timeouts import BEGIN, GRACE, LIMIT
from tests.raw_client import Connection, Response, get
from tests.servers import Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests.e2e.timeouts:app"
SERVERS = ("uvicorn-asyncio", "uvicorn-uvloop", "hypercorn-trio")
POOL = 40
"""How many worker threads there may be."""

both = pytest.mark.parametrize("name", ["plain", "single"])
both_patient = pytest.mark.parametrize("name", ["patient", "patient-single"])
both_leaving = pytest.mark.parametrize("name", ["disconnect", "disconnect-single"])


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(request.param, APP) as server:
        get(server.port, "/plain/thread/first?seconds=0")  # the first use of the thread pool takes its time
        yield server


@pytest.fixture
def asyncio_server(server: Server) -> Server:
    if "trio" in server.kind:
        pytest.skip("asyncio's alone")
    return server


@pytest.fixture
def token(server: Server) -> Iterator[str]:
    """One for the test; before it and after it, nothing runs on."""
    await_nothing_left(server)
    token = uuid.uuid4().hex
    yield token
    release(server, token)
    await_nothing_left(server)


def await_nothing_left(server: Server) -> None:
    eventually(lambda: told(server)["abandoned"] == 0, "the gauge at 0")
    eventually(lambda: told(server)["borrowed"] == 0, "all threads given back")


def told(server: Server, token: str = "none") -> dict[str, Any]:
    found: dict[str, Any] = get(server.port, f"/notes/{token}").json()
    return found


def texts(server: Server, token: str) -> list[str]:
    return [note for note in told(server, token)["notes"] if isinstance(note, str)]


def numbers(server: Server, token: str) -> list[float]:
    return [note for note in told(server, token)["notes"] if isinstance(note, int | float)]


def await_texts(server: Server, token: str, *expected: str) -> None:
    """Wait until all of these have been noted, and make sure of their order."""
    eventually(
        lambda: len(texts(server, token)) >= len(expected),
        f"{expected}, noted so far: {texts(server, token)}",
    )
    assert texts(server, token) == list(expected)


def await_report(server: Server, token: str) -> dict[str, Any]:
    def reports() -> list[dict[str, Any]]:
        return [note["report"] for note in told(server, token)["notes"] if isinstance(note, dict)]

    eventually(reports, "the report")
    (report,) = reports()
    return report


def release(server: Server, token: str) -> None:
    """Open the gate of the handlers that were given this token."""
    assert get(server.port, f"/release/{token}").body == b"open"


def assert_late(response: Response) -> None:
    assert (response.status, response.json()["title"]) == (504, "Gateway Timeout")


# -- answered while the handler runs on --------------------------------------------------------------


@both
def test_answered_before_a_shielded_section_ends(server: Server, name: str, token: str) -> None:
    assert_late(get(server.port, f"/{name}/gate/shielded/{token}"))
    assert texts(server, token) == ["begun"]
    assert told(server)["abandoned"] == 1
    release(server, token)
    await_texts(server, token, "begun", "passed", "cancelled")


@both
def test_answered_before_what_asyncio_shields_ends(asyncio_server: Server, name: str, token: str) -> None:
    assert_late(get(asyncio_server.port, f"/{name}/gate/asyncio-shield/{token}"))
    await_texts(asyncio_server, token, "cancelled")
    release(asyncio_server, token)
    await_texts(asyncio_server, token, "cancelled", "passed")


@both_patient
def test_answered_before_the_cleanup_ends(server: Server, name: str, token: str) -> None:
    shield = "trio" in server.kind
    assert_late(get(server.port, f"/{name}/gate/cleanup/{token}?shield={shield}"))
    await_texts(server, token, "cancelled")
    assert told(server)["abandoned"] == 1
    release(server, token)
    await_texts(server, token, "cancelled", "passed")


@both
def test_answered_though_each_cancellation_is_swallowed(
    asyncio_server: Server, name: str, token: str
) -> None:
    assert_late(get(asyncio_server.port, f"/{name}/gate/swallow/{token}"))
    assert await_report(asyncio_server, token)["outcome"] == "running"
    await_texts(asyncio_server, token, "cancelled", "cancelled")
    assert told(asyncio_server)["abandoned"] == 1
    release(asyncio_server, token)
    await_texts(asyncio_server, token, "cancelled", "cancelled", "passed")


@both
def test_answered_before_a_thread_ends(server: Server, name: str, token: str) -> None:
    assert_late(get(server.port, f"/{name}/gate/thread/{token}"))
    await_texts(server, token, "begun")
    assert (told(server)["abandoned"], told(server)["borrowed"]) == (1, 1)
    release(server, token)
    await_texts(server, token, "begun", "passed")


# -- the threads -------------------------------------------------------------------------------------


@both
def test_threads_that_run_on_keep_their_places_and_give_them_back(
    server: Server, name: str, token: str
) -> None:
    path = f"/{name}/gate/thread/{token}"
    for _ in range(5):  # in the first wave, all have a thread in time if the machine is not too slow
        assert {answer.status for answer in ask_at_once(server, path)} == {504}
        if told(server)["borrowed"] == POOL:
            break
    for _ in range(2):
        assert {answer.status for answer in ask_at_once(server, path)} == {504}
        # Those that waited for a thread are over; those that have one are not.
        eventually(lambda: told(server)["abandoned"] == POOL, "only those with a thread are left")
        assert told(server)["borrowed"] == POOL
        assert told(server)["workers"] <= POOL
    assert texts(server, token) == ["begun"] * POOL
    release(server, token)
    await_nothing_left(server)
    assert texts(server, token) == ["begun"] * POOL + ["passed"] * POOL
    answers = ask_at_once(server, f"/{name}/gate/together/{token}?count={POOL}")
    assert [answer.status for answer in answers] == [200] * POOL
    assert {answer.json() for answer in answers} == set(range(POOL))


def ask_at_once(server: Server, path: str) -> list[Response]:
    """Make as many requests as there may be threads; returns when the last one is answered."""
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(server.port)) for _ in range(POOL)]
        for connection in connections:
            connection.send(path)
        return [connection.receive() for connection in connections]


# -- how often it is cancelled -----------------------------------------------------------------------


@both
def test_cancelled_again_when_grace_is_over(asyncio_server: Server, name: str, token: str) -> None:
    assert_late(get(asyncio_server.port, f"/{name}/endless-cleanup/{token}"))
    assert await_report(asyncio_server, token)["outcome"] == "running"
    eventually(lambda: len(numbers(asyncio_server, token)) == 4, "cancelled twice")
    first, gauge, second, gauge_again = numbers(asyncio_server, token)
    assert second - first >= 0.95 * GRACE
    assert (gauge, gauge_again) == (1, 1)
    eventually(lambda: told(asyncio_server)["abandoned"] == 0, "the gauge at 0")


# -- clients that leave ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disconnect", "disconnect-single", "disconnect-base"])
def test_work_for_a_client_that_left_is_cancelled_soon(server: Server, name: str) -> None:
    took = []
    for _ in range(5):
        token = uuid.uuid4().hex
        with Connection(server.port) as connection:
            connection.send(f"/{name}/timed/{token}")
            await_texts(server, token, "begun")
            left = time.monotonic()
        (cancelled,) = eventually(lambda at=token: numbers(server, at), "cancelled")  # type: ignore[misc]
        took.append(cancelled - left)
        if took[-1] < 0.2:
            break
    assert 0 <= min(took) < 0.2, took


@pytest.mark.parametrize("kind", SERVERS)
def test_under_another_middleware_the_server_has_nothing_to_say_of_a_client_that_left(kind: str) -> None:
    token = uuid.uuid4().hex
    with serve(kind, APP) as server:
        with Connection(server.port) as connection:
            connection.send(f"/disconnect-base/timed/{token}")
            await_texts(server, token, "begun")
        eventually(lambda: numbers(server, token), "cancelled")
        await_nothing_left(server)
        server.terminate()
        written = server.stdout + server.stderr
        assert "Traceback" not in written
        assert "No response returned" not in written


@both_leaving
def test_left_while_a_thread_works(server: Server, name: str, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/{name}/gate/thread/{token}")
        await_texts(server, token, "begun")
    eventually(lambda: told(server)["abandoned"] == 1, "that it was noticed")
    assert told(server)["borrowed"] == 1
    assert texts(server, token) == ["begun"]
    release(server, token)
    await_texts(server, token, "begun", "passed")
    await_nothing_left(server)


@both_leaving
@pytest.mark.parametrize("path", ["stalled", "deaf"])
def test_left_in_mid_stream(server: Server, name: str, path: str, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/{name}/{path}/{token}")
        assert connection.receive_head()[0] == 200
        assert texts(server, token) == []
    await_texts(server, token, "ended")


@both_leaving
def test_left_during_a_shielded_section(server: Server, name: str, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/{name}/gate/shielded/{token}")
        await_texts(server, token, "begun")
    eventually(lambda: told(server)["abandoned"] == 1, "that it was noticed")
    release(server, token)
    await_texts(server, token, "begun", "passed", "cancelled")


@both_leaving
def test_left_in_mid_upload(server: Server, name: str, token: str) -> None:
    head = f"POST /{name}/reading/{token} HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n"
    with Connection(server.port) as connection:
        connection.socket.sendall(head.encode() + b"x" * 500)
        await_texts(server, token, "read")
    await_texts(server, token, "read", "ended")


# -- streams whose first piece is late ---------------------------------------------------------------

STREAMS = ("stream", "generator")
STREAMS_IN_THREADS = ("stream-in-thread", "generator-in-thread")


@pytest.mark.parametrize("name", ["plain", "single", "base"])
@pytest.mark.parametrize("path", [*STREAMS, *STREAMS_IN_THREADS])
def test_a_stream_begins_before_its_first_piece(server: Server, name: str, path: str, token: str) -> None:
    """So its own limit is kept, whatever comes then; and if nothing comes, it is cut."""
    with Connection(server.port) as connection:
        connection.send(f"/{name}/gate/{path}/{token}")
        assert connection.receive_head()[0] == 200
        report = await_report(server, token)
        assert (report["clock"], report["limit"]) == ("idle", LIMIT)
        release(server, token)  # some servers cut it off no sooner
        assert connection.is_closed()
    await_texts(server, token, "ended")


@pytest.mark.parametrize("path", [*STREAMS, *STREAMS_IN_THREADS])
def test_where_the_head_is_held_back_until_the_first_piece_a_limit_is_that_of_the_piece(
    server: Server, path: str, token: str
) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/gzip/gate/{path}/{token}")
        assert_late(connection.receive())
    if path in STREAMS:
        await_texts(server, token, "ended")
    else:
        assert texts(server, token) == []
    release(server, token)
    await_texts(server, token, "ended")
    report = await_report(server, token)
    assert (report["clock"], report["limit"]) == ("response", BEGIN)


@pytest.mark.parametrize("name", ["plain", "single", "gzip"])
def test_server_sent_events_may_be_late(server: Server, name: str, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/{name}/gate/events/{token}")
        assert connection.receive_head()[0] == 200
        time.sleep(3 * LIMIT)
        assert told(server, token)["notes"] == []
        release(server, token)
        eventually(lambda: texts(server, token) == ["passed", "ended"], "the end of the stream")
