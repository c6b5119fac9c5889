"""What counts as an ASGI application."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette

from asyncguard._asgi import checked_app, is_asgi_app, is_factory


async def application(scope: Any, receive: Any, send: Any) -> None: ...


class Application:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    async def method(self, scope: Any, receive: Any, send: Any) -> None: ...


class Wsgi:
    def __call__(self, environ: Any, start_response: Any) -> None: ...


def factory() -> Application:
    return Application()


def needy_factory(settings: object) -> None: ...


APPS = [
    application,
    Application(),
    Application().method,
    functools.partial(application),
    functools.partial(functools.partial(Application()), 1),
    FastAPI(),
    Starlette(),
]
OTHERS = [None, 1, "main:app", Application, Wsgi(), Wsgi, factory, functools.partial(factory), FastAPI]


@pytest.mark.parametrize("app", APPS, ids=repr)
def test_applications(app: object) -> None:
    assert is_asgi_app(app)
    checked_app(app, called_by="guard()")


@pytest.mark.parametrize("app", OTHERS, ids=repr)
def test_what_is_no_application(app: object) -> None:
    assert not is_asgi_app(app)
    with pytest.raises(TypeError) as caught:
        checked_app(app, called_by="guard()")
    assert str(caught.value).startswith(f"guard() takes an ASGI application, not {app!r}")


def test_a_proxy_is_not_asked() -> None:
    """An unbound proxy would fail, a bound one would answer for another object."""

    def unbound(*arguments: object) -> NoReturn:
        raise RuntimeError("working outside of context")

    proxy = type("Proxy", (), {"__class__": property(unbound), "__getattr__": unbound})
    assert not is_asgi_app(proxy())


def test_a_factory_is_told_apart() -> None:
    with pytest.raises(TypeError, match=r"call the factory and pass what it returns$"):
        checked_app(factory, called_by="guard()")
    with pytest.raises(TypeError) as caught:
        checked_app(needy_factory, called_by="guard()")
    assert "factory" not in str(caught.value).replace(repr(needy_factory), "")


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (factory, True),
        (lambda: None, True),
        (lambda number=1: number, True),
        (needy_factory, False),
        (application, False),
        (Application, False),
        (Application(), False),
        (None, False),
        (dict.fromkeys, False),
    ],
    ids=repr,
)
def test_factories(candidate: object, verdict: bool) -> None:
    assert is_factory(candidate) is verdict
