"""One TLS context for all clients of a process."""

from __future__ import annotations

import functools
import gc
import os
import ssl
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import anyio
import certifi
import httpx
import httpx2
import pytest

from asyncguard.clients import _tls
from asyncguard.clients._fittings import prepare

LIBRARIES = [pytest.param(httpx, id="httpx"), pytest.param(httpx2, id="httpx2")]

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("library", LIBRARIES)]


@pytest.fixture(autouse=True)
def contexts(monkeypatch: pytest.MonkeyPatch) -> dict[object, ssl.SSLContext]:
    """Those that have been made; none at first."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    contexts: dict[object, ssl.SSLContext] = {}
    monkeypatch.setattr(_tls, "_contexts", contexts)
    return contexts


@pytest.fixture
def makers(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that made contexts."""
    threads: list[str] = []
    make = library.create_ssl_context

    def create_ssl_context(**options: Any) -> ssl.SSLContext:
        threads.append(threading.current_thread().name)
        time.sleep(0.05)
        context: ssl.SSLContext = make(**options)
        return context

    monkeypatch.setattr(library, "create_ssl_context", create_ssl_context)
    return threads


async def test_it_is_made_once_and_off_the_loop(library: ModuleType, makers: list[str]) -> None:
    found: list[object] = []

    async def open_one() -> None:
        options = await prepare(library.AsyncClient, (), {})
        async with library.AsyncClient(**options) as client:
            found.append(client._transport._pool._ssl_context)

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(open_one)
    assert len(set(map(id, found))) == 1
    (maker,) = makers
    assert maker != threading.current_thread().name


async def test_opening_ten_clients_hardly_holds_up_the_loop(library: ModuleType) -> None:
    """It takes 3 ms in all; where each makes its own context, more than 200."""
    gc.disable()  # what other tests have left behind is not theirs
    try:
        # The time of this thread alone: others may be at work on this machine.
        spent = time.thread_time()
        for _ in range(10):
            options = await prepare(library.AsyncClient, (), {})
            async with library.AsyncClient(**options):
                pass
        spent = time.thread_time() - spent
    finally:
        gc.enable()
    assert spent < 0.06


@pytest.mark.parametrize("kind", ["AsyncClient", "Client"])
async def test_it_is_what_the_library_makes(kind: str, library: ModuleType) -> None:
    options = await prepare(getattr(library, kind), (), {"timeout": 3})
    context, expected = options.pop("verify"), library.create_ssl_context()
    assert options == {"timeout": 3}
    assert type(context) is type(expected)
    assert (context.verify_mode, context.check_hostname) == (expected.verify_mode, expected.check_hostname)
    assert context.cert_store_stats() == expected.cert_store_stats()


@pytest.mark.parametrize(
    "options",
    [
        {"verify": False},
        {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)},
        {"verify": "/nowhere.pem"},
        {"cert": "/nowhere.pem"},
        {"transport": object()},
        {"no such option": 1},
    ],
    ids=str,
)
async def test_what_a_client_has_of_its_own_stays(options: dict[str, Any], library: ModuleType) -> None:
    assert await prepare(library.AsyncClient, (), options) is options


async def test_other_factories_get_what_was_given_for_them(library: ModuleType) -> None:
    class Own(library.AsyncClient):  # type: ignore[misc, name-defined]
        def __init__(self, **options: Any) -> None:
            super().__init__(verify=False, **options)

    def function(verify: bool = True) -> None: ...

    for factory in (
        Own,
        function,
        functools.partial(library.AsyncClient, verify=False),
        aiohttp.ClientSession,
    ):
        options: dict[str, Any] = {}
        assert await prepare(factory, (), options) is options


async def test_partial_calls_and_subclasses(library: ModuleType) -> None:
    class Own(library.AsyncClient):  # type: ignore[misc, name-defined]
        pass

    partial = functools.partial(functools.partial(Own, timeout=3), http2=True)
    options = await prepare(partial, (), {})
    assert isinstance(options["verify"], ssl.SSLContext)


async def test_clients_that_agree_on_other_versions_have_another(
    library: ModuleType, contexts: dict[object, ssl.SSLContext]
) -> None:
    found = [(await prepare(library.AsyncClient, (), {"http2": http2}))["verify"] for http2 in (0, 1, 0)]
    assert found[0] is found[2] is not found[1]
    assert len(contexts) == 2


async def test_the_environment_may_name_other_authorities(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = tmp_path / "one.pem"
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    one.write_text(first + end)
    default = (await prepare(library.AsyncClient, (), {}))["verify"]
    monkeypatch.setenv("SSL_CERT_FILE", str(one))
    other = (await prepare(library.AsyncClient, (), {}))["verify"]
    assert other.cert_store_stats()["x509"] == 1
    assert other is not default
    untrusting = (await prepare(library.AsyncClient, (), {"trust_env": False}))["verify"]
    assert untrusting.cert_store_stats() == default.cert_store_stats()


async def test_what_cannot_be_made_is_left_to_the_library(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    assert await prepare(library.AsyncClient, (), {"timeout": 3}) == {"timeout": 3}
    with pytest.raises(FileNotFoundError):
        library.AsyncClient()


@pytest.mark.skipif(sys.platform == "win32", reason="it does not fork")
async def test_a_child_that_was_forked_meanwhile_is_not_stuck(library: ModuleType) -> None:
    with _tls._making:
        pid = os.fork()
        if not pid:
            os._exit(not _tls._making.acquire(timeout=5))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
