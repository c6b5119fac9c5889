"""The one door to what asyncguard does for clients of known libraries: before one is built, and after.

What is not known goes through it untouched. No library is imported for this: who builds a client of one has
imported it.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from asyncguard.clients._aiohttp import fit_session
from asyncguard.clients._http import fit_async, fit_sync
from asyncguard.clients._tls import with_shared_context

__all__ = ["fit", "prepare"]

logger = logging.getLogger("asyncguard.clients")


async def prepare(
    factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments to call a factory with: those given, and what clients of its kind can share.

    Args:
        factory: A class or a function.
        args: The arguments that it will be called with.
        kwargs: The keyword arguments that were given for it.
    """
    kind: Any = factory
    while isinstance(kind, functools.partial):
        kind = kind.func
    if isinstance(kind, type):
        for library in _httpx_libraries():
            if issubclass(kind, library.AsyncClient | library.Client):
                return await with_shared_context(library, factory, args, kwargs)
    return kwargs


def fit(client: object, name: str) -> None:
    """Fit a client that has been built, before anybody gets it.

    Args:
        client: Whatever a factory has made.
        name: What the log calls it.
    """
    try:
        for library in _httpx_libraries():
            if isinstance(client, library.AsyncClient):
                fit_async(client, library, name)
            elif isinstance(client, library.Client):
                fit_sync(client, library)
        aiohttp: Any = sys.modules.get("aiohttp")
        if aiohttp is not None and isinstance(client, aiohttp.ClientSession):
            fit_session(client)
    except (AttributeError, TypeError):
        # A version whose inner parts are not known: it works as it would without us.
        logger.debug("%s could not be fitted", name, exc_info=True)


def _httpx_libraries() -> Iterator[ModuleType]:
    """Those that have been imported: httpx and httpx2, which are alike."""
    for name in ("httpx", "httpx2"):
        library = sys.modules.get(name)
        if library is not None and hasattr(library, "AsyncClient"):
            yield library
