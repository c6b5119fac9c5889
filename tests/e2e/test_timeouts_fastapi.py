"""Request timeouts around what FastAPI does by itself: reading bodies, and answering for exceptions."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.e2e.test_timeouts import (
    assert_late,
    assert_problem,
    assert_refused,
    await_notes,
    await_report,
    told,
)
from tests.e2e.timeouts_fastapi import BURNT
from tests.raw_client import Connection, get
from tests.servers import Server, serve

pytestmark = pytest.mark.e2e

NAMES = ("fastapi", "fastapi-base", "fastapi-single", "fastapi-single-base")


@pytest.fixture(scope="module", params=["uvicorn-asyncio", "hypercorn-trio"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(request.param, "tests.e2e.timeouts_fastapi:app") as server:
        yield server
        server.terminate()
        assert "Traceback" not in server.stdout + server.stderr


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


# -- bodies ----------------------------------------------------------------------------------------

BOUNDARY = "the-boundary"
FILE = (
    f"--{BOUNDARY}\r\n"
    'Content-Disposition: form-data; name="file"; filename="order.txt"\r\n'
    "Content-Type: text/plain\r\n\r\n"
    f"shoes\r\n--{BOUNDARY}--\r\n"
)
BODIES = {
    "model": ("application/json", '{"article": "shoes"}'),
    "form": ("application/x-www-form-urlencoded", "article=shoes"),
    "file": (f"multipart/form-data; boundary={BOUNDARY}", FILE),
    "file-in-thread": (f"multipart/form-data; boundary={BOUNDARY}", FILE),
}


def send_head(connection: Connection, path: str, kind: str, framing: str) -> None:
    connection.socket.sendall(
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode()
    )


@pytest.mark.parametrize("chunked", [False, True], ids=["with-length", "chunked"])
@pytest.mark.parametrize("path", BODIES)
def test_an_endpoint_is_not_called_for_a_body_that_stalls(
    server: Server, path: str, chunked: bool, token: str
) -> None:
    """All of it but the last byte has come; with that byte, it would have been called."""
    kind, text = BODIES[path]
    body = text.encode()
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    before, after = (f"{len(body):x}\r\n".encode(), b"\r\n0\r\n\r\n") if chunked else (b"", b"")
    with Connection(server.port) as connection:
        send_head(connection, f"/fastapi/{path}/{token}", kind, framing)
        connection.socket.sendall(before + body[:-1])
        assert_refused(connection)
    report = await_report(server, token)
    assert (report["clock"], report["outcome"]) == ("body", "stopped")
    assert not [note for note in told(server, token) if isinstance(note, str)]

    with Connection(server.port) as connection:
        send_head(connection, f"/fastapi/{path}/{token}", kind, framing)
        connection.socket.sendall(before + body + after)
        assert connection.receive().json() == "shoes"
    await_notes(server, token, "called")


@pytest.mark.parametrize("name", NAMES)
def test_an_endpoint_that_reads_a_body_that_stalls_is_cancelled(
    server: Server, name: str, token: str
) -> None:
    with Connection(server.port) as connection:
        framing = "Transfer-Encoding: chunked"
        send_head(connection, f"/{name}/pieces/{token}", "text/plain", framing)
        connection.socket.sendall(b"5\r\nshoes\r\n")
        assert_refused(connection)
    await_notes(server, token, "called", "cancelled")
    assert (await_report(server, token))["clock"] == "body"


# -- exceptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"), [("own-timeout-error", "the application's own"), ("fails-after", "")]
)
@pytest.mark.parametrize("name", NAMES)
def test_an_application_answers_for_its_own_timeout_errors(
    server: Server, name: str, path: str, text: str, token: str
) -> None:
    response = get(server.port, f"/{name}/{path}/{token}")
    assert (response.status, response.json()) == (503, {"own": text})
    assert told(server, token) == ["handled"]


@pytest.mark.parametrize("what", ["conflict", "timeout-error"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_raised_by_a_handler_that_is_cancelled_is_no_second_response(
    server: Server, name: str, what: str, token: str
) -> None:
    with Connection(server.port) as connection:
        assert_problem(connection.get(f"/{name}/raises-when-cancelled/{token}?what={what}"))
        await_notes(server, token, "cancelled", *(["handled"] if what == "timeout-error" else []))
        assert connection.get(f"/{name}/quick/{token}").json() == token
    assert (await_report(server, token))["outcome"] == "stopped"


# -- the loop, and the headers ---------------------------------------------------------------------


def test_the_time_for_which_a_handler_held_the_loop_is_reported(server: Server, token: str) -> None:
    assert_late(server, f"/fastapi-watched/burns/{token}")
    report = await_report(server, token)
    assert BURNT <= report["loop_time"] <= report["elapsed"]


def test_without_blocking_detection_it_is_not_known(server: Server, token: str) -> None:
    assert_late(server, f"/fastapi/burns/{token}")
    assert (await_report(server, token))["loop_time"] is None


@pytest.mark.parametrize("where", ["before", "sending"])
def test_an_answer_for_a_middleware_that_hangs_lacks_the_headers_of_the_others(
    server: Server, where: str, token: str
) -> None:
    headers = {"Origin": "https://client.example"}
    response = assert_late(server, f"/hangs-in-cors/quick/{token}?hang={where}", headers=headers)
    assert "access-control-allow-origin" not in response.headers
    response = assert_late(server, f"/hangs-in-cors/asleep/{token}", headers=headers)
    assert response.headers["access-control-allow-origin"] == "https://client.example"
