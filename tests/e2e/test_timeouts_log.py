"""What servers write when responses are cut off: one warning of asyncguard's for each, and no traceback."""

from __future__ import annotations

import itertools
import re
import uuid
from contextlib import ExitStack

import pytest

from tests.e2e.test_timeouts import await_notes, await_report
from tests.e2e.timeouts import LIMIT
from tests.raw_client import Connection, Truncated, get
from tests.servers import serve

pytestmark = pytest.mark.e2e

INSTALLED = ("plain", "fastapi-watched", "gzip", "base", "base-twice", "base/mounted-base")
ALONE = ("single", "single-base-inside")
"""Of these, the connection is not found: uvicorn says by itself what it makes of such a response."""
LENGTHS = (0, 1000)
CUT = re.compile(
    rf"GET /\S+ was cut off: nothing of its response was sent for {LIMIT:.3g} s"
    r"(; (awaiting|in the endpoint) .+)?"
)
SERVERS_OWN = re.compile(
    r"INFO: .*"  # uvicorn's start, its requests and its end
    r"|\[[^]]+\] \[\d+\] \[INFO\] .*"  # hypercorn's
)
UNFINISHED = "ERROR:    ASGI callable returned without completing response."


STALLS = [
    *itertools.product((*INSTALLED, *ALONE), LENGTHS, ["identity"]),
    *itertools.product(("gzip", "base-twice"), LENGTHS, ["gzip"]),
]


@pytest.mark.parametrize(
    "command",
    [
        ("uvicorn-asyncio",),
        ("uvicorn-uvloop",),
        ("uvicorn-uvloop", "--http", "httptools"),
        ("hypercorn-trio",),
    ],
    ids=" ".join,
)
def test_a_cut_is_one_line_of_the_log(command: tuple[str, ...]) -> None:
    kind, *options = command
    with serve(kind, "tests.e2e.timeouts_fastapi:app", *options) as server, ExitStack() as stack:
        requests: dict[str, Connection] = {}
        for name, length, encoding in STALLS:
            token = uuid.uuid4().hex
            requests[token] = connection = stack.enter_context(Connection(server.port))
            path = f"/{name}/stalled/{token}?length={length}"
            connection.send(path, headers={"Accept-Encoding": encoding})
        token = uuid.uuid4().hex
        requests[token] = connection = stack.enter_context(Connection(server.port))
        connection.send(f"/plain/stalled-in-thread/{token}")
        await_report(server, token)
        get(server.port, f"/release/{token}")
        for token, connection in requests.items():
            with pytest.raises(Truncated):
                connection.receive()
            await_notes(server, token, "ended")
        server.terminate()

        written = [line for line in server.stderr.splitlines() if not SERVERS_OWN.fullmatch(line)]
        assert [line for line in written if not CUT.fullmatch(line) and line != UNFINISHED] == []
        assert sum(CUT.fullmatch(line) is not None for line in written) == len(requests)
        alone = sum(name in ALONE for name, _, _ in STALLS)
        assert written.count(UNFINISHED) == (alone if kind.startswith("uvicorn") else 0)
