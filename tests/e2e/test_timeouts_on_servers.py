"""Request timeouts on the other servers: the answer, the cut, the connection afterwards."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.e2e.timeouts import LIMIT
from tests.raw_client import Connection, Truncated, get
from tests.servers import Server, eventually, serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # what it is about is no matter of the Python version

DOWNLOAD = 24_000_000


@pytest.fixture(scope="module", params=["hypercorn-asyncio", "hypercorn-uvloop", "granian"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    download = tmp_path_factory.mktemp("download") / "big"
    download.write_bytes(bytes(DOWNLOAD))
    env = {"ASYNCGUARD_TEST_DOWNLOAD": str(download)}
    with serve(request.param, "tests.e2e.timeouts:app", env=env) as server:
        yield server
        server.terminate()
        assert "Traceback" not in server.stdout + server.stderr


def await_note(server: Server, token: str, note: str) -> None:
    eventually(lambda: note in get(server.port, f"/notes/{token}").json()["notes"], note)


def test_answered_cancelled_and_the_connection_goes_on(server: Server) -> None:
    token = uuid.uuid4().hex
    with Connection(server.port) as connection:
        response = connection.get(f"/base-twice/asleep/{token}")
        assert (response.status, response.json()["title"]) == (504, "Gateway Timeout")
        assert connection.get("/base-twice/quick/afterwards").json() == "afterwards"
    await_note(server, token, "ended")


def test_answered_while_a_thread_runs_on(server: Server) -> None:
    token = uuid.uuid4().hex
    assert get(server.port, f"/plain/thread/{token}").status == 504
    assert "ended" not in get(server.port, f"/notes/{token}").json()["notes"]
    await_note(server, token, "ended")


@pytest.mark.parametrize("name", ["plain", "base-twice"])
def test_a_stalled_response_is_cut(server: Server, name: str) -> None:
    token = uuid.uuid4().hex
    with Connection(server.port) as connection, pytest.raises(Truncated):
        connection.get(f"/{name}/stalled/{token}")
    await_note(server, token, "ended")


def test_a_slow_download_outlives_all_clocks(server: Server) -> None:
    """granian is told the path of the file, and sends it by itself."""
    with Connection(server.port) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.send("/plain/download/big")
        eventually(lambda: connection.socket.recv(1, socket.MSG_PEEK), "the head")
        time.sleep(3 * LIMIT)  # the server has to wait for this client
        assert len(connection.receive().body) == DOWNLOAD


def test_work_for_a_client_that_left_is_cancelled(server: Server) -> None:
    token = uuid.uuid4().hex
    with Connection(server.port) as connection:
        connection.send(f"/disconnect/asleep/{token}")
        get(server.port, "/plain/quick/meanwhile")
    await_note(server, token, "ended")
