"""What to do about a blocking line, from what it calls: a table, and nothing else.

The first name that matches decides, from the user's line inwards: `requests.get` says more than the
`socket.recv` below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asyncguard.events import Advice, Cause

__all__ = ["BUSY_ADVICE", "advice_for"]

_PAGE = "cures/#"


class _Cure(NamedTuple):
    anchor: str
    text: str
    names: tuple[str, ...]
    """Full names; one that ends in a star stands for all that begin so."""


_CURES = (
    _Cure(
        "sleep",
        "Use `await anyio.sleep(...)`, which lets the loop run other requests meanwhile",
        ("time.sleep",),
    ),
    _Cure(
        "client-per-request",
        "Build the client once, in the application's lifespan, and share it: each new one loads "
        "its certificates again, on the loop",
        (
            "httpx.AsyncClient",
            "httpx.Client",
            "httpx._client.AsyncClient.__init__",
            "httpx._client.Client.__init__",
            "httpx2.AsyncClient",
            "httpx2.Client",
            "httpx2._client.AsyncClient.__init__",
            "httpx2._client.Client.__init__",
            "aiohttp.client.ClientSession",
            "requests.sessions.Session.__init__",
            "ssl.create_default_context",
            "ssl.SSLContext",
            "ssl.SSLContext.__new__",
            "ssl.SSLContext.load_*",
        ),
    ),
    _Cure(
        "synchronous-http",
        "Await a shared asynchronous client instead, such as `httpx.AsyncClient`",
        (
            "requests.*",
            "urllib.request.*",
            "urllib3.*",
            "http.client.*",
            "httpx._api.*",
            "httpx._client.Client.*",
            "httpx2._api.*",
            "httpx2._client.Client.*",
        ),
    ),
    _Cure(
        "imports",
        "Import it at the top of the module, so that it is loaded before the first request",
        ("importlib.*", "importlib._bootstrap*"),
    ),
    _Cure(
        "subprocesses",
        "Use `await anyio.run_process(...)`",
        ("subprocess.*", "os.system", "posix.system", "os.popen"),
    ),
    _Cure(
        "databases",
        "Use the driver's asynchronous twin, or call it in a thread: `await anyio.to_thread.run_sync(...)`",
        (
            "MySQLdb.*",
            "psycopg.connection.*",
            "psycopg.cursor.*",
            "psycopg2.*",
            "pymongo.synchronous.*",
            "pymysql.*",
            "redis.client.*",
            "sqlalchemy.engine.*",
            "sqlalchemy.orm.session.*",
            "sqlite3.*",
            "_sqlite3.*",
        ),
    ),
    _Cure(
        "passwords",
        "Hash in a thread, `await anyio.to_thread.run_sync(...)`: this hash leaves the GIL free",
        ("bcrypt.*", "argon2.*", "hashlib.scrypt", "_hashlib.scrypt", "_hashlib.pbkdf2_hmac"),
    ),
    _Cure(
        "locks",
        "Use anyio's `Lock`, `Event` or memory streams, or wait in a thread: "
        "`await anyio.to_thread.run_sync(...)`",
        ("threading.*", "_thread.*", "queue.*", "_queue.*", "concurrent.futures.*", "multiprocessing.*"),
    ),
    _Cure(
        "name-look-ups",
        "Use `await anyio.getaddrinfo(...)`",
        ("socket.getaddrinfo", "socket.gethostby*", "_socket.getaddrinfo", "_socket.gethostby*"),
    ),
    _Cure(
        "files",
        "Use `anyio.Path` or `anyio.open_file`, or do the whole job in a thread: "
        "`await anyio.to_thread.run_sync(...)`",
        (
            "_io.*",
            "csv.*",
            "hashlib.file_digest",
            "_csv.*",
            "io.*",
            "os.fsync",
            "os.walk",
            "pathlib.*",
            "posix.fsync",
            "posix.read",
            "posix.write",
            "shutil.*",
            "tempfile.*",
            "zipfile.*",
        ),
    ),
    _Cure(
        "big-json",
        "Encode and decode big documents in a worker process: decorate the function that does it with "
        "`@asyncguard.offload`, and await it; a thread would still hold the GIL",
        ("json.*", "_json.*"),
    ),
)

_COLLECTING = _Cure(
    "garbage-collection",
    "Call `gc.freeze()` at the end of the start-up, so that what lives on is not looked at again",
    (),
)
_GIL = _Cure(
    "threads-that-compute",
    "Compute in a worker process, not in a thread: decorate the function with `@asyncguard.offload`, "
    "and await it",
    (),
)
_BUSY = _Cure(
    "busy-requests",
    "Do the work of all its pieces at once in a worker process: decorate the function that does it with "
    "`@asyncguard.offload`, and await it",
    (),
)
_FAN_OUT = _Cure(
    "unbounded-fan-out",
    "The request starts too many tasks at once: bound them, for instance with `anyio.CapacityLimiter`",
    (),
)
_COMPUTING = _Cure(
    "computing",
    "Compute in a worker process: decorate the function with `@asyncguard.offload`, and await it",
    (),
)
_WAITING = _Cure(
    "waiting",
    "Await an asynchronous version of this call, or make it in a thread: "
    "`await anyio.to_thread.run_sync(...)`",
    (),
)


def advice_for(names: Sequence[str], cause: Cause, *, fan_out: bool) -> Advice:
    """What to do about a line that blocked.

    Args:
        names: What it called, the outermost first, as full names such as ``requests.api.get``.
        cause: Why it blocked.
        fan_out: Whether many tasks of the same request shared the time.
    """
    if cause == "gc":
        return _advice(_COLLECTING)
    if cause == "gil":
        return _advice(_GIL)
    if fan_out:
        return _advice(_FAN_OUT)
    for name in names:
        for cure in _CURES:
            if any(_matches(name, pattern) for pattern in cure.names):
                return _advice(cure)
    return _advice(_COMPUTING if cause == "cpu" else _WAITING)


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _advice(cure: _Cure) -> Advice:
    return Advice(cure.text, _PAGE + cure.anchor)


BUSY_ADVICE = _advice(_BUSY)
"""For a request that holds the loop for long in small pieces."""
