"""Calls of shared clients for requests that run out of time, between real services."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.e2e.shared_calls import LIMIT, LONG
from tests.raw_client import get
from tests.servers import HOST, Server, eventually, serve

pytestmark = pytest.mark.e2e

LIBRARIES = {"uvicorn-uvloop": "httpx,httpx2,aiohttp", "hypercorn-trio": "httpx,httpx2"}
ERRORS = {"httpx": "ReadTimeout", "httpx2": "ReadTimeout", "aiohttp": "TimeoutError"}


@pytest.fixture(scope="module", params=LIBRARIES)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve("uvicorn-asyncio", "tests.e2e.shared_calls:upstream") as upstream:
        env = {
            "ASYNCGUARD_TEST_URL": f"http://{HOST}:{upstream.port}",
            "ASYNCGUARD_TEST_LIBRARIES": LIBRARIES[request.param],
        }
        with serve(request.param, "tests.e2e.shared_calls:app", env=env) as server:
            yield server


@pytest.fixture(params=ERRORS)
def library(request: pytest.FixtureRequest, server: Server) -> str:
    name: str = request.param
    if name not in LIBRARIES[server.kind].split(","):
        pytest.skip("asyncio's alone")
    return name


def test_the_client_gives_up_when_its_request_is_out_of_time(server: Server, library: str) -> None:
    token = uuid.uuid4().hex
    assert get(server.port, f"/slow/{library}/{token}").status == 504
    note = eventually(lambda: get(server.port, f"/notes/{token}").json(), "the end of the call")
    assert note["error"] == ERRORS[library]
    assert 0 < note["left"] <= LIMIT
    assert note["left"] - 0.01 <= note["seconds"] < LONG / 2


def test_the_other_service_is_told_what_is_left(server: Server, library: str) -> None:
    assert 0 < float(get(server.port, f"/told/{library}").json()) <= LIMIT
