"""From an import string such as ``main:app`` to the ASGI application it names."""

from __future__ import annotations

import functools
import importlib
import sys
from types import FunctionType
from typing import Any

from starlette.types import ASGIApp

from asyncguard._asgi import is_asgi_app, is_factory
from asyncguard.errors import AppNotLoaded

__all__ = ["load_app"]


@functools.cache
def load_app(target: str, *, factory: bool = False) -> ASGIApp:
    """Import the application that `target` names; once per process, whoever asks.

    Args:
        target: ``module:attribute``; the attribute may have dots in it.
        factory: Whether the attribute is a function that makes the application. A plain function that
            needs no arguments is taken for one anyway.

    Raises:
        AppNotLoaded: If there is no such module or attribute, if it is no ASGI application, or if the
            application's own code failed; its exception is then the cause.
    """
    module_name, colon, attribute = target.partition(":")
    if not module_name.strip(".") or module_name.startswith(".") or not colon or not attribute:
        raise AppNotLoaded(f"{target!r} is no import string: write module:attribute, such as main:app")
    found: Any = _import(module_name)
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise AppNotLoaded(_no_attribute(module_name, attribute)) from None
        except Exception as error:
            raise AppNotLoaded(f"looking up {target!r} failed: {_summary(error)}") from error
    if factory or is_factory(found):
        return _called(target, found)
    if not is_asgi_app(found):
        raise AppNotLoaded(
            f"{target!r} is no ASGI application but {_described(found)}: "
            "asyncguard serves what can be called as `await app(scope, receive, send)`"
        )
    app: ASGIApp = found
    return app


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise AppNotLoaded(
                f"there is no module {error.name!r} here: run the command from the directory that "
                f"holds it, or name that directory with --app-dir (looked first in {sys.path[0] or '.'})"
            ) from None
        raise AppNotLoaded(f"importing {name!r} failed: {_summary(error)}") from error
    except (Exception, SystemExit) as error:
        raise AppNotLoaded(f"importing {name!r} failed: {_summary(error)}") from error


def _called(target: str, factory: Any) -> ASGIApp:
    if not callable(factory):
        raise AppNotLoaded(f"{target!r} is no application factory but {_described(factory)}")
    try:
        app = factory()
    except (Exception, SystemExit) as error:
        raise AppNotLoaded(f"the factory {target!r} failed: {_summary(error)}") from error
    if not is_asgi_app(app):
        raise AppNotLoaded(f"the factory {target!r} returned no ASGI application but {_described(app)}")
    made: ASGIApp = app
    return made


def _no_attribute(module_name: str, attribute: str) -> str:
    members = vars(sys.modules[module_name]).items()
    # Endpoints are coroutine functions as well: of functions, only those that take what ASGI passes.
    candidates = sorted(
        name
        for name, value in members
        if not name.startswith("_")
        and is_asgi_app(value)
        and (not isinstance(value, FunctionType) or value.__code__.co_argcount == 3)
    )
    more = ", ..." if len(candidates) > 5 else ""
    hint = f"; it has {', '.join(candidates[:5])}{more}" if candidates else ""
    return f"the module {module_name!r} has no attribute {attribute!r}{hint}"


def _described(thing: object) -> str:
    name = type(thing).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name} ({thing!r:.80})"


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
