"""A service for clients to call: slow, dripping, closing or redirecting, as the path says.

    python -m tests.clients.peer PORT

It answers with what it got. `peer` serves it in a process of its own.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.servers import HOST, free_port, start

__all__ = ["peer"]

_PAUSE = 0.02
_LONG = 500


@contextmanager
def peer() -> Iterator[str]:
    """Serve; the block gets its URL."""
    port = free_port()
    with start(["tests.clients.peer", str(port)], port) as server:
        server.await_port()
        yield f"http://{HOST}:{port}"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, OSError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = await _body(head.lower(), reader)
            if not await _answer(head, body, writer):
                break
    writer.close()


async def _body(head: str, reader: asyncio.StreamReader) -> bytes:
    if "transfer-encoding: chunked" in head:
        return await reader.readuntil(b"0\r\n\r\n")
    length = re.search(r"content-length: (\d+)", head)
    return await reader.readexactly(int(length[1])) if length else b""


async def _answer(head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
    """Answer a request; returns whether the connection goes on."""
    path = head.split(" ", 2)[1]
    status, headers, body, goes_on = "200 OK", "", head.encode() + body, True
    match path.strip("/").split("/"):
        case ["silent"]:
            await asyncio.sleep(_LONG * _PAUSE)
        case ["storm"]:
            await asyncio.sleep(random.random() * 0.01)
            goes_on = random.random() < 0.4
        case ["close"]:
            goes_on = False
        case ["redirect", "silent"]:
            status, headers = "302 Found", "location: /silent\r\n"
        case ["redirect"]:
            status, headers = "302 Found", "location: /\r\n"
        case ["drip", "head"]:
            writer.write(b"HTTP/1.1 200 OK\r\n")
            for number in range(_LONG):
                writer.write(b"x-%d: drip\r\n" % number)
                await _pause(writer)
        case ["drip", "body", *pieces]:
            count = int(pieces[0]) if pieces else _LONG
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % count)
            for _ in range(count):
                writer.write(b".")
                await _pause(writer)
            return True
    closing = "" if goes_on else "connection: close\r\n"
    writer.write(
        f"HTTP/1.1 {status}\r\n{headers}{closing}content-length: {len(body)}\r\n\r\n".encode() + body
    )
    await writer.drain()
    return goes_on


async def _pause(writer: asyncio.StreamWriter) -> None:
    await writer.drain()
    await asyncio.sleep(_PAUSE)


async def _main(port: int) -> None:
    server = await asyncio.start_server(_serve, HOST, port, backlog=1000)
    await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(int(sys.argv[1])))
