"""Requests that run out of time, over real HTTP: one answer each, on time, and everything cleaned up."""

from __future__ import annotations

import gzip
import json
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recording import marked
from tests.e2e.timeouts import LIMIT
from tests.raw_client import Connection, Response, Truncated, WebSocket, get
from tests.servers import Server, eventually, serve

pytestmark = pytest.mark.e2e

APP = "tests.e2e.timeouts:app"
FILE = "tests/e2e/timeouts.py"
PATIENCE = 20.0
"""Seconds within which everything is over that has been cancelled, on the busiest machine."""
DOWNLOAD = 24_000_000
ASYNCIO = ("uvicorn-asyncio", "uvicorn-uvloop")


@pytest.fixture(scope="module", params=[*ASYNCIO, "hypercorn-trio"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    download = tmp_path_factory.mktemp("download") / "big"
    download.write_bytes(bytes(DOWNLOAD))
    with serve(request.param, APP, env={"ASYNCGUARD_TEST_DOWNLOAD": str(download)}) as server:
        get(server.port, "/plain/thread/first?seconds=0")  # the first use of the thread pool takes its time
        yield server


@pytest.fixture
def asyncio_server(server: Server) -> Server:
    if "trio" in server.kind:
        pytest.skip("asyncio's alone")
    return server


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


class Late:
    """What came of a request that ran out of time, and how long the client waited."""

    def __init__(self, port: int, path: str, headers: dict[str, str] | None = None) -> None:
        with Connection(port) as connection:
            began = time.monotonic()
            connection.send(path, headers=headers)
            self.response = connection.receive()
            self.seconds = time.monotonic() - began


def told(server: Server, token: str) -> list[Any]:
    found: list[Any] = get(server.port, f"/notes/{token}").json()["notes"]
    return found


def await_notes(server: Server, token: str, *expected: str) -> None:
    """Wait until all of these have been noted, and make sure of their order."""

    def texts() -> list[str]:
        return [note for note in told(server, token) if isinstance(note, str)]

    eventually(lambda: len(texts()) >= len(expected), f"{expected}, noted so far: {texts()}", PATIENCE)
    assert texts() == list(expected)


def await_report(server: Server, token: str) -> dict[str, Any]:
    def reports() -> list[dict[str, Any]]:
        return [note["report"] for note in told(server, token) if isinstance(note, dict)]

    eventually(reports, "the report", PATIENCE)
    (report,) = reports()
    return report


def assert_problem(response: Response, status: int = 504, title: str = "Gateway Timeout") -> None:
    assert response.status == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.body
    if response.headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    problem = json.loads(body)
    assert (problem["status"], problem["title"]) == (status, title)


def assert_late(
    server: Server, path: str, limit: float = LIMIT, *, headers: dict[str, str] | None = None
) -> Response:
    """One whole answer, not before the limit, and long before the handler would have given one."""
    late = Late(server.port, path, headers)
    assert_problem(late.response)
    assert limit * 0.95 <= late.seconds < limit + PATIENCE / 2
    return late.response


# -- 1 to 4: whatever the handler does -------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain", "watched", "watched-base", "single", "base-twice", "single-base-inside"]
)
def test_a_handler_asleep_is_cancelled_after_the_answer(server: Server, name: str, token: str) -> None:
    assert_late(server, f"/{name}/asleep/{token}")
    await_notes(server, token, "ended")
    report = await_report(server, token)
    assert report["outcome"] == "stopped"
    assert (report["clock"], report["limit"], report["path"]) == ("response", LIMIT, f"/asleep/{token}")
    assert report["request"] == "GET /asleep/{token}"
    assert LIMIT * 0.95 <= report["elapsed"] < PATIENCE
    if "inside" not in name:  # there, the handler runs in a task that nothing leads to
        assert (report["line"]["file"], report["line"]["line"]) == (FILE, marked(FILE, "asleep", "awaits"))
        assert report["said"] == (
            f"GET /asleep/{{token}} got no answer in {LIMIT:.3g} s; awaiting {FILE}:{report['line']['line']} "
            f"in asleep: await anyio.sleep(LONG)  # awaits: asleep"
        )
    assert (report["loop_time"] is not None) is name.startswith("watched")


@pytest.mark.parametrize("name", ["plain", "single"])
def test_a_handler_in_a_thread_is_answered_for_and_runs_on(server: Server, name: str, token: str) -> None:
    assert_late(server, f"/{name}/thread/{token}?seconds={4 * LIMIT}")
    report = await_report(server, token)
    assert report["outcome"] == "thread"
    if "trio" not in server.kind:
        assert report["line"]["line"] == marked(FILE, "thread", "awaits")
    assert get(server.port, f"/notes/{token}").json()["abandoned"] >= 1
    await_notes(server, token, "ended")
    eventually(lambda: get(server.port, f"/notes/{token}").json()["abandoned"] == 0, "the gauge at 0")


def test_threads_stay_within_their_limit(server: Server) -> None:
    def ask(number: int) -> tuple[int, float]:
        late = Late(server.port, f"/plain/thread/{uuid.uuid4().hex}?seconds={4 * LIMIT}")
        return late.response.status, late.seconds

    with ThreadPoolExecutor(120) as pool:
        answers = list(pool.map(ask, range(120)))
    assert {status for status, _ in answers} == {504}
    assert max(seconds for _, seconds in answers) < PATIENCE
    threads = get(server.port, "/notes/none").json()["threads"]
    assert threads["most"] <= 40
    eventually(lambda: get(server.port, "/notes/none").json()["threads"]["now"] == 0, "the last thread's end")
    eventually(lambda: get(server.port, "/notes/none").json()["abandoned"] == 0, "the gauge at 0")


def test_a_swallowed_cancellation_is_followed_by_another(asyncio_server: Server, token: str) -> None:
    assert_late(asyncio_server, f"/plain/swallow/{token}")
    await_notes(asyncio_server, token, "cancelled", "cancelled")
    report = await_report(asyncio_server, token)
    assert report["outcome"] == "running"
    assert "it was cancelled, and runs on" in report["said"]


def test_a_shielded_section_is_finished_before_the_cancellation(server: Server, token: str) -> None:
    assert_late(server, f"/plain/shielded/{token}")
    await_notes(server, token, "section ended", "cancelled")
    if "trio" not in server.kind:
        assert await_report(server, token)["outcome"] == "shielded"


def test_what_asyncio_shields_is_finished(asyncio_server: Server, token: str) -> None:
    assert_late(asyncio_server, f"/plain/asyncio-shield/{token}")
    await_notes(asyncio_server, token, "cancelled", "transferred")


def test_cleaning_up_may_await(asyncio_server: Server, token: str) -> None:
    assert_late(asyncio_server, f"/plain/cleanup/{token}")
    await_notes(asyncio_server, token, "cleaned up")


def test_a_dependency_sees_the_cancellation_and_closes(server: Server, token: str) -> None:
    assert_late(server, f"/plain/dependency/{token}")
    error = "Cancelled" if "trio" in server.kind else "CancelledError"
    await_notes(server, token, error, "closed")


# -- 5 and 6: responses that have begun ------------------------------------------------------------


def assert_cut(server: Server, path: str, **headers: str) -> None:
    """The client sees an error, after what had been sent before."""
    with Connection(server.port) as connection:
        connection.send(path, headers=headers)
        with pytest.raises(Truncated):
            connection.receive()


@pytest.mark.parametrize("length", [0, 1000], ids=["chunked", "with-length"])
@pytest.mark.parametrize("name", ["plain", "gzip", "base", "base-twice", "base/mounted-base", "single"])
def test_a_stalled_response_is_cut(server: Server, name: str, length: int, token: str) -> None:
    warned = len(server.stderr)
    encoding = "gzip" if "gzip" in name or "twice" in name else "identity"
    assert_cut(server, f"/{name}/stalled/{token}?length={length}", **{"Accept-Encoding": encoding})
    await_notes(server, token, "ended")
    report = await_report(server, token)
    assert (report["clock"], report["limit"]) == ("idle", LIMIT)
    if "mounted" not in name:  # there, it runs in a task that nothing leads to
        assert report["line"]["line"] == marked(FILE, "stalled", "awaits")
    written = server.stderr[warned:]
    assert "Traceback" not in written
    assert written.count("was cut off") == 1


def test_a_response_that_stalls_in_a_thread_is_cut_at_once(asyncio_server: Server, token: str) -> None:
    assert_cut(asyncio_server, f"/plain/stalled-in-thread/{token}")
    assert "ended" not in told(asyncio_server, token)
    get(asyncio_server.port, f"/release/{token}")
    await_notes(asyncio_server, token, "ended")
    assert await_report(asyncio_server, token)["outcome"] == "thread"


@pytest.mark.parametrize(("path", "ending"), [("live", b"data: 7\n\n"), ("events", b"data: 1\n\n")])
def test_a_live_stream_outlives_all_clocks(server: Server, path: str, ending: bytes, token: str) -> None:
    response = get(server.port, f"/plain/{path}/{token}")
    assert response.status == 200
    assert response.body.endswith(ending)


def test_a_slow_download_outlives_all_clocks(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.send(f"/plain/download/{token}")
        eventually(lambda: connection.socket.recv(1, socket.MSG_PEEK), "the head")
        time.sleep(3 * LIMIT)  # the server has to wait for this client
        assert len(connection.receive().body) == DOWNLOAD
    assert not any(isinstance(note, dict) for note in told(server, token))


def test_a_background_task_outlives_all_clocks(server: Server, token: str) -> None:
    assert get(server.port, f"/plain/background/{token}").body == b"sent before"
    await_notes(server, token, "worked afterwards")


def test_a_websocket_outlives_all_clocks(server: Server, token: str) -> None:
    with WebSocket(server.port, f"/plain/websocket/{token}") as websocket:
        websocket.send("still here")
        assert websocket.receive() == "still here"


# -- 7: wherever the time goes ---------------------------------------------------------------------


@pytest.mark.parametrize("path", ["slow-dependency", "mounted/asleep"])
def test_what_is_not_the_endpoint_is_covered(server: Server, path: str, token: str) -> None:
    assert_late(server, f"/plain/{path}/{token}")


@pytest.mark.parametrize("where", ["before", "sending", "after"])
@pytest.mark.parametrize("name", ["hangs-before", "hangs-after"])
def test_a_middleware_that_hangs_is_covered(server: Server, name: str, where: str, token: str) -> None:
    assert_late(server, f"/{name}/quick/{token}?hang={where}")
    await_notes(server, token, "middleware ended")


@pytest.mark.parametrize("name", ["headers-before", "headers-after"])
def test_the_headers_of_the_application_are_on_the_answer(server: Server, name: str, token: str) -> None:
    response = assert_late(server, f"/{name}/asleep/{token}", headers={"Origin": "https://client.example"})
    assert response.headers["access-control-allow-origin"] == "https://client.example"
    assert response.headers["x-request-id"] == token


def test_an_answer_is_compressed_like_any_other(server: Server, token: str) -> None:
    response = assert_late(server, f"/gzip/asleep/{token}", headers={"Accept-Encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"


def test_the_limit_of_an_inner_guard_holds(server: Server, token: str) -> None:
    assert_late(server, f"/inner-guarded/inner/asleep/{token}", 4 * LIMIT)


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [
        ("answer", 503, b'{"late":"/asleep/TOKEN"}'),
        ("answer-response", 503, b"later, please"),
        ("failing-answer", 503, None),
        ("hanging-answer", 504, None),
    ],
)
def test_another_answer(server: Server, name: str, status: int, body: bytes | None, token: str) -> None:
    late = Late(server.port, f"/{name}/asleep/{token}")
    if body is None:
        title = {503: "Service Unavailable", 504: "Gateway Timeout"}[status]
        assert_problem(late.response, status, title)
    else:
        assert (late.response.status, late.response.body) == (status, body.replace(b"TOKEN", token.encode()))
    await_notes(server, token, "ended")


# -- 8: the client's body --------------------------------------------------------------------------


def begin_upload(connection: Connection, path: str, length: int) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n"
    connection.socket.sendall(head.encode())


def assert_refused(connection: Connection) -> None:
    response = connection.receive()
    assert_problem(response, 408, "Request Timeout")
    assert response.headers["connection"] == "close"
    assert connection.is_closed()


@pytest.mark.parametrize("name", ["plain", "single", "base"])
def test_a_stalled_upload_is_refused(server: Server, name: str, token: str) -> None:
    with Connection(server.port) as connection:
        begin_upload(connection, f"/{name}/upload/{token}", 1000)
        connection.socket.sendall(b"x" * 500)
        assert_refused(connection)
    report = await_report(server, token)
    assert report["clock"] == "body"
    assert "its body did not come in" in report["said"]


def test_a_trickling_upload_is_refused(server: Server, token: str) -> None:
    with Connection(server.port) as connection, ThreadPoolExecutor(1) as pool:
        begin_upload(connection, f"/plain/upload/{token}", 10_000)
        refused = pool.submit(assert_refused, connection)
        while not refused.done():
            try:
                connection.socket.sendall(b"x")
            except OSError:
                break
            time.sleep(LIMIT / 10)
        refused.result()


def test_a_steady_upload_takes_its_time(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        pieces = 12
        begin_upload(connection, f"/plain/upload/{token}", pieces * 1000)
        for _ in range(pieces):
            connection.socket.sendall(b"x" * 1000)
            time.sleep(LIMIT / 4)
        assert connection.receive().body == b"12000"


# -- 9: what keeps its own meaning -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("own-504", 504, b'{"detail":"the application\'s own"}'),
        ("own-limit", 200, b'"the application\'s own limit"'),
        ("own-timeout-error", 500, b"Internal Server Error"),
        ("own-error", 500, b"Internal Server Error"),
    ],
)
def test_what_is_the_applications_own_stays_so(
    server: Server, path: str, status: int, body: bytes, token: str
) -> None:
    response = get(server.port, f"/plain/{path}/{token}")
    assert (response.status, response.body) == (status, body)
    assert not any(isinstance(note, dict) for note in told(server, token))


def test_an_error_while_cleaning_up_is_logged_by_the_server(server: Server, token: str) -> None:
    assert_late(server, f"/plain/failing-cleanup/{token}")
    server.await_stderr(f"LookupError: while cleaning up {token}")


# -- 10: connections go on -------------------------------------------------------------------------


def test_a_connection_goes_on_after_an_answer(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        for number in range(3):
            assert_problem(connection.get(f"/plain/thread/{token}-{number}"))
            assert connection.get(f"/plain/quick/{number}").json() == str(number)


def test_requests_in_a_pipeline_are_answered_in_order(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        for path in ("asleep", "quick", "cleanup", "quick"):
            connection.send(f"/plain/{path}/{token}")
        statuses = [connection.receive_one().status for _ in range(4)]
    assert statuses == [504, 200, 504, 200]


# -- 11: limits of their own -----------------------------------------------------------------------


def test_a_longer_limit(server: Server, token: str) -> None:
    left = get(server.port, f"/plain/longer/{token}?seconds={2 * LIMIT}").json()
    assert 0 < left <= LIMIT + 0.01  # uvloop sleeps in whole milliseconds
    assert_late(server, f"/plain/longer/{token}?seconds=60", 3 * LIMIT)


@pytest.mark.parametrize(
    "path",
    [
        "shorter",
        "shorter-thread",
        "shorter-behind-a-dependency",
        "by-dependency",
        "nested",
        "hasty/asleep",
        "methods",
    ],
)
@pytest.mark.parametrize("name", ["plain", "single"])
def test_a_shorter_limit(server: Server, name: str, path: str, token: str) -> None:
    late = Late(server.port, f"/{name}/{path}/{token}")
    assert_problem(late.response)
    assert await_report(server, token)["limit"] == LIMIT / 4
    assert late.seconds >= LIMIT / 4 * 0.95


@pytest.mark.parametrize("path", ["unlimited", "longer-thread", "longer-stream", "hasty/longer"])
def test_in_time_by_a_limit_of_its_own(server: Server, path: str, token: str) -> None:
    assert get(server.port, f"/plain/{path}/{token}").status == 200


def test_a_context_variable_is_seen_outside(server: Server, token: str) -> None:
    assert get(server.port, f"/headers-after/context/{token}").status == 200
    await_notes(server, token, f"seen outside: {token}")


def test_what_is_left(server: Server, token: str) -> None:
    assert 0 < get(server.port, f"/plain/left/{token}").json() <= LIMIT


# -- 12: clients that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disconnect", "disconnect-single"])
def test_work_for_a_client_that_left_is_cancelled(server: Server, name: str, token: str) -> None:
    written = len(server.stderr)
    with Connection(server.port) as connection:
        connection.send(f"/{name}/asleep/{token}")
        get(server.port, "/plain/quick/meanwhile")
    await_notes(server, token, "ended")
    get(server.port, "/plain/quick/afterwards")
    assert "Traceback" not in server.stderr[written:]
    assert "No response returned" not in server.stderr[written:]


def test_background_tasks_of_a_client_that_left_are_spared(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        assert connection.get(f"/disconnect/background/{token}").body == b"sent before"
    await_notes(server, token, "worked afterwards")


def test_uploads_and_streams_work_while_leaving_is_watched(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/disconnect/upload/{token}", method="POST", body=b"x" * 1_000_000)
        assert connection.receive().body == b"1000000"
    assert get(server.port, f"/disconnect/live/{token}").body.endswith(b"data: 7\n\n")


def test_an_upload_that_nobody_reads_costs_no_memory(asyncio_server: Server, token: str) -> None:
    server = asyncio_server
    before = resident(server.pid)
    with Connection(server.port) as connection:
        begin_upload(connection, f"/disconnect/ignore-body/{token}", 300_000_000)
        connection.socket.settimeout(1.0)
        sent, piece = 0, b"x" * 1_000_000
        try:
            while sent < 300_000_000:
                sent += connection.socket.send(piece)
        except TimeoutError:
            pass
    assert sent < 100_000_000
    assert resident(server.pid) - before < 50_000_000


def resident(pid: int) -> int:
    """The memory that a process holds, in bytes."""
    (line,) = (
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


# -- 13: what the caller says ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deadline", "deadline-single"])
def test_the_caller_may_be_in_a_hurry(server: Server, name: str, token: str) -> None:
    late = Late(server.port, f"/{name}/asleep/{token}", {"X-Timeout": "0.1"})
    assert_problem(late.response)
    assert await_report(server, token)["limit"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["deadline", "deadline-single"])
def test_a_caller_without_any_time_is_answered_at_once(server: Server, name: str, token: str) -> None:
    assert_problem(Late(server.port, f"/{name}/asleep/{token}", {"X-Timeout": "0"}).response)
    assert [note for note in told(server, token) if isinstance(note, str)] == []


@pytest.mark.parametrize("said", ["10", "soon", "-1", "nan", "inf", "1e-9", ""])
def test_a_caller_gets_no_more_than_the_limit(server: Server, said: str, token: str) -> None:
    late = Late(server.port, f"/deadline/asleep/{token}", {"X-Timeout": said})
    assert_problem(late.response)
    assert late.seconds >= 0.95 * LIMIT
    assert await_report(server, token)["limit"] == LIMIT
