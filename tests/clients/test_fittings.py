"""What goes through the door to the fittings, and what is left as it is."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from typing import Any

import aiohttp
import httpx
import httpx2
import pytest

from asyncguard.clients._fittings import fit, prepare


class Unknown:
    """A client of no known library."""

    def __init__(self, address: str, size: int = 1) -> None:
        self.address = address
        self.size = size


async def build(address: str) -> Unknown:
    return Unknown(address)


@pytest.mark.parametrize("factory", [Unknown, build, dict, print, lambda: None], ids=str)
def test_what_is_not_known_is_left_as_it_is_without_waiting(factory: Any) -> None:
    options: dict[str, Any] = {"size": 2}
    steps = prepare(factory, ("address",), options)
    with pytest.raises(StopIteration) as end:
        steps.send(None)
    assert end.value.value is options


@pytest.mark.parametrize("client", [Unknown("address"), object(), None, 1, dict, httpx.AsyncClient], ids=str)
def test_what_is_no_client_is_left_as_it_is(client: object) -> None:
    before = dict(getattr(client, "__dict__", {}))
    fit(client, "upstream")
    assert dict(getattr(client, "__dict__", {})) == before


@pytest.mark.anyio
async def test_clients_are_fitted() -> None:
    for library in (httpx, httpx2):
        async with library.AsyncClient(verify=False) as client:
            transport = client._transport
            fit(client, "upstream")
            assert client._transport is not transport
            assert isinstance(client._transport, library.AsyncBaseTransport)


@pytest.mark.asyncio
async def test_sessions_are_fitted() -> None:
    async with aiohttp.ClientSession() as session:
        fit(session, "upstream")
        assert not inspect.ismethod(session._request)


@pytest.mark.anyio
async def test_a_client_with_other_inner_parts_works_as_without_us(caplog: pytest.LogCaptureFixture) -> None:
    class Other(httpx.AsyncClient):
        def __init__(self) -> None:
            """Without any of them."""

    caplog.set_level(logging.DEBUG, "asyncguard.clients")
    client = Other()
    fit(client, "upstream")
    (message,) = (record.getMessage() for record in caplog.records if record.name == "asyncguard.clients")
    assert message == "upstream could not be fitted"


def test_no_library_is_imported() -> None:
    code = (
        "import sys, asyncguard.clients._fittings as fittings; fittings.fit(object(), '');"
        "assert not sys.modules.keys() & {'httpx', 'httpx2', 'httpcore', 'aiohttp'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
