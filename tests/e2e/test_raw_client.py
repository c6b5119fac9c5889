"""The client of the end-to-end tests sees what it is for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.raw_client import Connection, Response, Surplus, Truncated

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, server = socket.socketpair()
    with Connection(ours) as connection, server:
        connection.send("/")
        yield connection, server


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        (LENGTH + b"12345", b"12345"),
        (CHUNKED + b"3\r\n123\r\n2;name=value\r\n45\r\n0\r\n\r\n", b"12345"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
def test_whole_response(pair: tuple[Connection, socket.socket], sent: bytes, body: bytes) -> None:
    connection, server = pair
    server.sendall(sent)
    assert connection.receive().body == body


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\n",
        LENGTH + b"1234",
        CHUNKED,
        CHUNKED + b"3\r\n12",
        CHUNKED + b"3\r\n123\r\n",
        CHUNKED + b"3\r\n123\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n12345",
    ],
)
def test_truncated_response(pair: tuple[Connection, socket.socket], sent: bytes) -> None:
    connection, server = pair
    server.sendall(sent)
    server.close()
    with pytest.raises(Truncated):
        connection.receive()


@pytest.mark.parametrize("sent", [LENGTH + b"12345" + LENGTH, CHUNKED + b"1\r\n12\r\n0\r\n\r\n"])
def test_surplus(pair: tuple[Connection, socket.socket], sent: bytes) -> None:
    connection, server = pair
    server.sendall(sent)
    with pytest.raises(Surplus):
        connection.receive()


def test_request_as_sent(pair: tuple[Connection, socket.socket]) -> None:
    connection, server = pair
    assert server.recv(100) == b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
    connection.send("/x", method="POST", headers={"A": "b"}, body=b"12")
    assert server.recv(100) == b"POST /x HTTP/1.1\r\nHost: test\r\nA: b\r\nContent-Length: 2\r\n\r\n12"
    server.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 4\r\nX-Name: value\r\n\r\n[1]\n")
    response = connection.receive()
    assert response == Response(201, {"content-length": "4", "x-name": "value"}, b"[1]\n")
    assert response.json() == [1]
