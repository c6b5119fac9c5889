"""An HTTP/1.1 client on a bare socket, which cannot hide a truncated response.

Client libraries forgive much: a body that ends early, a second response behind the first. This one
raises `Truncated` unless it has seen the end of the response, and `Surplus` if anything came after it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

__all__ = ["Connection", "Response", "Surplus", "Truncated", "WebSocket", "get"]

_TIMEOUT = 60.0


class Truncated(Exception):
    """The connection ended before the response did, or the end of the response cannot be told."""


class Surplus(Exception):
    """Something came that is no part of the response."""


class Response(NamedTuple):
    """A whole response; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _Stream:
    """Bytes of a socket, of which every missing one is an error."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""

    def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._more()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._more()
        taken, _, self._buffer = self._buffer.partition(end)
        return taken

    def assert_empty(self) -> None:
        if self._buffer:
            raise Surplus(f"after the end of the response: {self._buffer[:200]!r}")

    def _more(self) -> None:
        try:
            received = self._socket.recv(1 << 16)
        except ConnectionResetError:
            received = b""
        if not received:
            raise Truncated(f"the connection ended after {self._buffer[-200:]!r}")
        self._buffer += received


class Connection:
    """One connection, for one request after the other; `send` and `receive` are apart on purpose."""

    def __init__(self, target: int | socket.socket) -> None:
        if isinstance(target, int):
            self.socket = socket.create_connection(("127.0.0.1", target))
        else:
            self.socket = target
        self.socket.settimeout(_TIMEOUT)
        self._stream = _Stream(self.socket)
        self._method = ""

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        """Send a request, without waiting for the response."""
        fields = {"Host": "test", **(headers or {})}
        if body:
            fields["Content-Length"] = str(len(body))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._method = method
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    def receive(self) -> Response:
        """Wait for the whole response.

        Raises:
            Truncated: If it is not whole.
            Surplus: If there is something behind it.
        """
        response = self.receive_one()
        self._stream.assert_empty()
        return response

    def receive_one(self) -> Response:
        """Wait for the whole response, behind which another may follow.

        Raises:
            Truncated: If it is not whole.
        """
        status, headers = self.receive_head()
        return Response(status, headers, self._body(status, headers))

    def is_closed(self) -> bool:
        """Whether the server closes the connection, without having sent anything more."""
        with contextlib.suppress(Truncated):
            self._stream.exactly(1)
            return False
        return True

    def receive_head(self) -> tuple[int, dict[str, str]]:
        """Wait for the status and the headers only."""
        first, *lines = self._stream.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, *_ = first.split(" ")
        assert version == "HTTP/1.1", first
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        return int(status), headers

    def _body(self, status: int, headers: Mapping[str, str]) -> bytes:
        if self._method == "HEAD" or status in (204, 304):
            return b""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = b""
            while size := int(self._stream.until(b"\r\n").partition(b";")[0], 16):
                body += self._stream.exactly(size)
                self._crlf()
            self._crlf()
            return body
        if "content-length" in headers:
            return self._stream.exactly(int(headers["content-length"]))
        raise Truncated("neither a length nor chunks: its end cannot be told from a cut")

    def _crlf(self) -> None:
        if (end := self._stream.exactly(2)) != b"\r\n":
            raise Surplus(f"{end!r} where a chunk ends")

    def get(self, path: str) -> Response:
        """Send a request and wait for its response."""
        self.send(path)
        return self.receive()


def get(port: int, path: str) -> Response:
    """Make one request on a connection of its own."""
    with Connection(port) as connection:
        return connection.get(path)


class WebSocket:
    """A websocket for short text messages (https://www.rfc-editor.org/rfc/rfc6455#section-5.2)."""

    def __init__(self, port: int, path: str) -> None:
        self._connection = Connection(port)
        self._stream = self._connection._stream
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        }
        self._connection.send(path, headers=headers)
        status, _ = self._connection.receive_head()
        assert status == 101, status

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._connection:
            if kind is None:
                self._send(0x8, (1000).to_bytes(2, "big"))
                opcode, _ = self._receive()
                assert opcode == 0x8, opcode

    def send(self, text: str) -> None:
        self._send(0x1, text.encode())

    def receive(self) -> str:
        opcode, payload = self._receive()
        assert opcode == 0x1, opcode
        return payload.decode()

    def _send(self, opcode: int, payload: bytes) -> None:
        assert len(payload) < 126
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._connection.socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def _receive(self) -> tuple[int, bytes]:
        first, length = self._stream.exactly(2)
        assert length < 126
        return first & 0x0F, self._stream.exactly(length)
