"""Request timeouts on uvicorn's parser httptools, which it takes where it is installed, and with each of its
websockets. All other end-to-end tests are on h11 and wsproto.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.e2e.test_timeouts import (
    APP,
    ASYNCIO,
    DOWNLOAD,
    assert_cut,
    assert_late,
    assert_problem,
    assert_refused,
    await_notes,
    await_report,
    begin_upload,
    told,
)
from tests.e2e.timeouts import LIMIT
from tests.raw_client import Connection, WebSocket, get
from tests.servers import Server, eventually, serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # what it is about is no matter of the Python version


@pytest.fixture(scope="module", params=ASYNCIO)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    download = tmp_path_factory.mktemp("download") / "big"
    download.write_bytes(bytes(DOWNLOAD))
    env = {"ASYNCGUARD_TEST_DOWNLOAD": str(download)}
    with serve(request.param, APP, "--http", "httptools", env=env) as server:
        get(server.port, "/plain/thread/first?seconds=0")  # the first use of the thread pool takes its time
        assert served_by(server, "first") == "uvicorn.protocols.http.httptools_impl"
        yield server
        server.terminate()
        assert "Traceback" not in server.stdout + server.stderr


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


def served_by(server: Server, token: str) -> str:
    module: str = get(server.port, f"/notes/{token}").json()["served_by"]
    return module


# -- the answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "single"])
def test_a_handler_asleep_is_answered_for_and_cancelled(server: Server, name: str, token: str) -> None:
    assert_late(server, f"/{name}/asleep/{token}")
    await_notes(server, token, "ended")
    assert (await_report(server, token))["outcome"] == "stopped"


def test_a_connection_goes_on_after_an_answer(server: Server, token: str) -> None:
    """Though the handlers still run, in threads."""
    with Connection(server.port) as connection:
        for number in range(3):
            assert_problem(connection.get(f"/plain/thread/{token}-{number}"))
            assert connection.get(f"/plain/quick/{number}").json() == str(number)
    for number in range(3):
        await_notes(server, f"{token}-{number}", "ended")


def test_requests_in_a_pipeline_are_answered_in_order(server: Server, token: str) -> None:
    """Those that come before an answer, and one that comes while what was answered cleans up."""
    paths = ["asleep", "quick", "cleanup", "quick", "thread", "quick"]
    with Connection(server.port) as connection:
        for number, path in enumerate(paths):
            connection.send(f"/plain/{path}/{token}-{number}")
        responses = [connection.receive_one() for _ in paths]
        assert [response.status for response in responses] == [504, 200, 504, 200, 504, 200]
        assert [responses[number].json() for number in (1, 3, 5)] == [f"{token}-{n}" for n in (1, 3, 5)]
        assert connection.get(f"/plain/quick/{token}").json() == token


# -- the cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1000], ids=["chunked", "with-length"])
@pytest.mark.parametrize("name", ["plain", "base-twice"])
def test_a_stalled_response_is_cut(server: Server, name: str, length: int, token: str) -> None:
    assert_cut(server, f"/{name}/stalled/{token}?length={length}")
    await_notes(server, token, "ended")
    assert (await_report(server, token))["clock"] == "idle"


def test_a_response_that_stalls_in_a_thread_is_cut_at_once(server: Server, token: str) -> None:
    """The connection is ended while the application still runs: it is found behind `send`."""
    assert_cut(server, f"/plain/stalled-in-thread/{token}")
    assert "ended" not in told(server, token)
    get(server.port, f"/release/{token}")
    await_notes(server, token, "ended")


# -- the client's body -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "base"])
def test_a_stalled_upload_is_refused(server: Server, name: str, token: str) -> None:
    with Connection(server.port) as connection:
        begin_upload(connection, f"/{name}/upload/{token}", 1000)
        connection.socket.sendall(b"x" * 500)
        assert_refused(connection)
    await_notes(server, token, "CancelledError")
    assert (await_report(server, token))["clock"] == "body"


def test_an_upload_that_stalls_within_a_chunk_is_refused(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        head = f"POST /plain/upload/{token} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.socket.sendall(head.encode() + b"3e8\r\n" + b"x" * 500)
        assert_refused(connection)
    await_notes(server, token, "CancelledError")


def test_a_steady_upload_takes_its_time(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        begin_upload(connection, f"/plain/upload/{token}", 12_000)
        for _ in range(12):
            connection.socket.sendall(b"x" * 1000)
            time.sleep(LIMIT / 4)
        assert connection.receive().body == b"12000"
        assert connection.get(f"/plain/quick/{token}").json() == token


# -- clients that are slow, or leave ---------------------------------------------------------------


def test_a_slow_download_outlives_all_clocks(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.send(f"/plain/download/{token}")
        eventually(lambda: connection.socket.recv(1, socket.MSG_PEEK), "the head")
        time.sleep(3 * LIMIT)  # the server has to wait for this client
        assert len(connection.receive().body) == DOWNLOAD
    assert told(server, token) == []


@pytest.mark.parametrize("name", ["disconnect", "disconnect-single"])
def test_work_for_a_client_that_left_is_cancelled(server: Server, name: str, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/{name}/asleep/{token}")
        get(server.port, "/plain/quick/meanwhile")
    await_notes(server, token, "ended")


def test_uploads_and_streams_work_while_leaving_is_watched(server: Server, token: str) -> None:
    with Connection(server.port) as connection:
        connection.send(f"/disconnect/upload/{token}", method="POST", body=b"x" * 1_000_000)
        assert connection.receive().body == b"1000000"
        assert connection.get(f"/disconnect/live/{token}").body.endswith(b"data: 7\n\n")


# -- websockets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("http", "ws", "module"),
    [
        ("h11", "wsproto", "wsproto_impl"),
        ("httptools", "wsproto", "wsproto_impl"),
        ("h11", "websockets-sansio", "websockets_sansio_impl"),
        ("httptools", "auto", "websockets_sansio_impl"),
    ],
)
def test_a_websocket_outlives_all_clocks(http: str, ws: str, module: str, token: str) -> None:
    with serve("uvicorn-asyncio", APP, "--http", http, "--ws", ws) as server:
        with WebSocket(server.port, f"/plain/websocket/{token}") as websocket:
            websocket.send("still here")
            assert websocket.receive() == "still here"
        assert served_by(server, token) == f"uvicorn.protocols.websockets.{module}"
        assert told(server, token) == []
