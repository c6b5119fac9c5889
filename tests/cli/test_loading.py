"""From import strings to applications, without a process of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncguard import AppNotLoaded, AsyncguardError
from asyncguard._loading import load_app

MODULE = """
import functools

made = []

async def app(scope, receive, send): ...

bound = functools.partial(app)

class Application:
    async def __call__(self, scope, receive, send): ...
    async def method(self, scope, receive, send): ...

instance = Application()

def create():
    made.append(object())
    return Application()

async def coroutine_factory():
    return app

class Lazy:
    @property
    def app(self):
        raise LookupError("no settings")
    def __getattr__(self, name):
        raise AttributeError(name)

lazy = Lazy()
fails = functools.partial(int, "x")

def with_default(settings=None):
    return instance

def wants(settings):
    return instance
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with applications; gone again after the test."""
    (tmp_path / "loaded_by_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    load_app.cache_clear()
    yield "loaded_by_a_test"
    load_app.cache_clear()
    sys.modules.pop("loaded_by_a_test", None)


@pytest.mark.parametrize("name", ["app", "bound", "instance", "instance.method"])
def test_application_is_taken_as_it_is(module: str, name: str) -> None:
    app = load_app(f"{module}:{name}")
    found: object = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    assert app == found


@pytest.mark.parametrize(
    ("name", "factory"), [("create", False), ("create", True), ("with_default", False), ("Application", True)]
)
def test_factory_is_called(module: str, name: str, factory: bool) -> None:
    app = load_app(f"{module}:{name}", factory=factory)
    assert isinstance(app, sys.modules[module].Application)


def test_factory_is_called_once(module: str) -> None:
    """The command checks the application first, and the server asks for it again."""
    assert load_app(f"{module}:create", factory=True) is load_app(f"{module}:create", factory=True)
    assert len(sys.modules[module].made) == 1


@pytest.mark.parametrize(
    ("name", "factory", "message"),
    [
        ("missing", False, "the module 'loaded_by_a_test' has no attribute 'missing'; it has .*instance"),
        ("instance.missing", False, "the module 'loaded_by_a_test' has no attribute 'instance.missing'"),
        ("lazy.missing", False, "has no attribute 'lazy.missing'"),
        ("lazy.app", False, "looking up 'loaded_by_a_test:lazy.app' failed: LookupError: no settings"),
        ("functools", False, "'loaded_by_a_test:functools' is no ASGI application but a module"),
        ("made", False, r"'loaded_by_a_test:made' is no ASGI application but a list \(\[\]\): .*await app\("),
        ("Application", False, "is no ASGI application but a type"),
        ("wants", False, "is no ASGI application but a function"),
        ("made", True, "'loaded_by_a_test:made' is no application factory but a list"),
        ("wants", True, "the factory 'loaded_by_a_test:wants' failed: TypeError: wants.*settings"),
        ("fails", True, "the factory 'loaded_by_a_test:fails' failed: ValueError: invalid literal"),
    ],
)
def test_refusals(module: str, name: str, factory: bool, message: str) -> None:
    with pytest.raises(AppNotLoaded, match=message) as caught:
        load_app(f"{module}:{name}", factory=factory)
    assert isinstance(caught.value, AsyncguardError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["", ":", "main", ":app", "main:"])
def test_what_is_no_import_string(target: str) -> None:
    with pytest.raises(AppNotLoaded, match="is no import string: write module:attribute, such as main:app"):
        load_app(target)


def test_error_of_the_applications_own_is_the_cause(module: str) -> None:
    with pytest.raises(AppNotLoaded) as caught:
        load_app(f"{module}:fails", factory=True)
    assert isinstance(caught.value.__cause__, ValueError)


def test_exit_of_the_applications_own_is_a_failure(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AppNotLoaded):
        load_app(f"{module}:missing")
    monkeypatch.setattr(sys.modules[module], "create", lambda: sys.exit("no settings"))
    with pytest.raises(AppNotLoaded, match="create' failed: SystemExit: no settings") as caught:
        load_app(f"{module}:create", factory=True)
    assert isinstance(caught.value.__cause__, SystemExit)


def test_long_thing_is_cut_short(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AppNotLoaded):
        load_app(f"{module}:missing")
    monkeypatch.setattr(sys.modules[module], "made", list(range(1000)))
    with pytest.raises(AppNotLoaded) as caught:
        load_app(f"{module}:made")
    assert len(str(caught.value)) < 250


def test_failure_is_not_remembered(module: str, tmp_path: Path) -> None:
    """A server that reloads gets the mended module."""
    with pytest.raises(AppNotLoaded):
        load_app(f"{module}:missing")
    sys.modules[module].missing = sys.modules[module].instance  # type: ignore[attr-defined]
    assert load_app(f"{module}:missing") is sys.modules[module].instance
