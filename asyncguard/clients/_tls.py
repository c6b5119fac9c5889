"""One TLS context for all HTTP clients of a process that trust the default authorities.

Making one reads a few hundred certificates, which takes tens of milliseconds; httpx and httpx2 do so for each
client, on the event loop. Here it is done once, in a worker thread. aiohttp has one for all sessions by
itself.
"""

from __future__ import annotations

import inspect
import os
import ssl
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import anyio.to_thread

__all__ = ["with_shared_context"]

_ENVIRONMENT = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""What may name other authorities."""

_contexts: dict[object, ssl.SSLContext] = {}
_making = threading.Lock()


async def with_shared_context(
    library: ModuleType, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments to build a client with, whose TLS context is the shared one.

    They are as given if the client is to have certificates or a transport of its own, and if the context
    cannot be made: building the client then raises what it always does.

    Args:
        library: ``httpx`` or ``httpx2``.
        factory: A class of clients of that library, or a partial call of one.
        args: The arguments that it will be called with.
        kwargs: The keyword arguments that were given for it.
    """
    options = _options(factory, args, kwargs)
    if options.get("verify") is not True or options.get("cert") or options.get("transport") is not None:
        return kwargs
    trust_env = bool(options.get("trust_env", True))
    # Connecting notes in the context which versions of HTTP it may agree on.
    versions = bool(options.get("http1", True)), bool(options.get("http2"))
    key = library.__name__, versions, tuple(map(os.environ.get, _ENVIRONMENT)) if trust_env else None
    context = _contexts.get(key)
    if context is None:
        try:
            context = await anyio.to_thread.run_sync(_make, key, library, trust_env, abandon_on_cancel=True)
        except Exception:
            return kwargs
    return {**kwargs, "verify": context}


def _options(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments that a factory will have, its defaults included; none if it cannot be called so."""
    try:
        bound = inspect.signature(factory).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return bound.arguments


def _make(key: object, library: ModuleType, trust_env: bool) -> ssl.SSLContext:
    with _making:  # several clients may be opened at the same time
        context = _contexts.get(key)
        if context is None:
            context = _contexts[key] = library.create_ssl_context(trust_env=trust_env)
            # It imports its other half with the first transport, which takes as long again.
            library.AsyncHTTPTransport(verify=context)
        return context


def _forget_lock() -> None:
    """In a forked child: whoever held the lock is not in it."""
    global _making
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
