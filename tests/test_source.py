"""Whose code a file is, and what stands on a line."""

from __future__ import annotations

import ast
import dis
import json
import linecache
import os
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
import starlette
import starlette.routing

import asyncguard
from asyncguard import _frames, _source
from asyncguard._frames import RawFrame
from asyncguard._source import (
    call_text,
    definition_line,
    function_name,
    is_user_code,
    resolved_name,
    source_line,
)


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    yield
    is_user_code.cache_clear()
    linecache.clearcache()


# -- whose code --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        json.__file__,
        os.__file__,
        ast.__file__,
        starlette.routing.__file__,
        anyio.__file__,
        asyncguard.__file__,
        _frames.__file__,
    ],
)
def test_libraries(file: str) -> None:
    assert not is_user_code(file, None)


@pytest.mark.parametrize("file", ["<string>", "<frozen importlib._bootstrap>", "<stdin>"])
@pytest.mark.parametrize("root", [None, "/work"])
def test_what_is_no_file(file: str, root: str | None) -> None:
    assert not is_user_code(file, root)


@pytest.mark.parametrize("file", [__file__, "main.py", "/app/main.py", "/srv/asyncguard_shop/main.py"])
def test_the_rest_is_the_users(file: str) -> None:
    assert is_user_code(file, None)


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_installed_packages(folder: str) -> None:
    assert not is_user_code(f"/opt/lib/{folder}/lib/core.py", None)
    assert is_user_code(f"/opt/lib/my-{folder}/core.py", None)


def test_the_standard_library_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(Path(json.__file__).parents[1])
    assert not is_user_code(str(link / "json" / "__init__.py"), None)


def test_a_project_root_says_what_is_the_users(tmp_path: Path) -> None:
    root = str(tmp_path.resolve())
    assert is_user_code(f"{root}/app/main.py", root)
    assert not is_user_code(f"{root}-other/main.py", root)
    assert not is_user_code(__file__, root)
    assert not is_user_code(json.__file__, root)


def test_an_environment_below_the_project_root(tmp_path: Path) -> None:
    root = str(tmp_path.resolve())
    assert not is_user_code(f"{root}/.venv/lib/python3.11/site-packages/requests/api.py", root)


def test_a_project_root_inside_site_packages() -> None:
    """As for a service that is installed as a package."""
    root = "/opt/lib/site-packages/service"
    assert is_user_code(f"{root}/main.py", root)
    assert not is_user_code(f"{root}/_vendor/site-packages/lib.py", root)
    assert not is_user_code("/opt/lib/site-packages/requests/api.py", root)


def test_a_project_root_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    root = str(tmp_path.resolve() / "real")  # as `checked_directory` makes it
    assert is_user_code(str(tmp_path / "link" / "main.py"), root)


def test_a_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_user_code("relative.py", str(tmp_path.resolve()))


def test_the_root_of_the_file_system_as_project_root() -> None:
    assert is_user_code("/main.py", "/")


def test_the_standard_library_below_the_project_root() -> None:
    stdlib = Path(json.__file__).resolve()
    assert not is_user_code(str(stdlib), str(stdlib.parents[3]))


def test_asyncguard_below_the_project_root() -> None:
    own = Path(asyncguard.__file__).resolve()
    assert not is_user_code(str(own.parent / "blocking" / "_steps.py"), str(own.parents[1]))


# -- lines -------------------------------------------------------------------------------------------


def compiled(file: Path, source: str) -> dict[str, Any]:
    file.write_text(source)
    namespace: dict[str, Any] = {"__name__": file.stem}
    exec(compile(source, str(file), "exec"), namespace)
    return namespace


def test_a_line_as_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "app" / "main.py"
    file.parent.mkdir()
    f = compiled(file, "def f():\n    def g():\n        return 1\n    return g\n")["f"]
    line = source_line(f().__code__, 3)
    assert (line.file, line.line, line.function, line.source) == (str(file), 3, "f.g", "return 1")
    monkeypatch.chdir(tmp_path)
    assert source_line(f.__code__, 1).file == os.path.join("app", "main.py")


def test_a_file_that_is_not_there() -> None:
    code = compile("x = 1", "/no/such/file.py", "exec")
    line = source_line(code, 1)
    assert (line.file, line.source) == ("/no/such/file.py", "")
    assert source_line(compile("x = 1", "<string>", "exec"), 1).file == "<string>"


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert source_line(compile("x = 1", __file__, "exec"), 1).file == __file__


def test_where_a_function_is_defined(tmp_path: Path) -> None:
    source = (
        "def route(path): return lambda f: f\n"
        "@route('/a')\n"
        "@route(\n"
        "    '/b',\n"
        ")\n"
        "async def f():\n"
        "    pass\n"
        "g = lambda: 1\n"
    )
    namespace = compiled(tmp_path / "main.py", source)
    assert definition_line(namespace["f"].__code__).line == 6
    assert definition_line(namespace["f"].__code__).source == "async def f():"
    assert definition_line(namespace["g"].__code__).line == 8


# -- calls -------------------------------------------------------------------------------------------


def frames_of(function: Any) -> Iterator[RawFrame]:
    for instruction in dis.get_instructions(function.__code__):
        yield RawFrame(function.__code__, instruction.offset, function.__globals__)


CALLS = [
    ("requests.get(url)", {"requests.get"}),
    ("sleep(1)", {"sleep"}),
    ("a.b.c.d()", {"a.b.c.d"}),
    ("first(second(1))", {"first", "second"}),
    ("session[key].get(url)", {"….get"}),
    ("'secret'.join(names)", {"….join"}),
    ("make('secret').run.now()", {"make", "….run.now"}),
    ("(a or b).go()", {"….go"}),
    ("{1: f}[1]()", {"…"}),
    ("größe.mißt('ä', 'é') + naïve('日本語')", {"größe.mißt", "naïve"}),
    ("['日本語', after(1)]", {"after"}),
    ("a + b", set()),
    ("a.b", set()),
    ("a[b]", set()),
    ("client.get(\n        'https://example.org',  # a comment\n        timeout=1,\n    )", {"client.get"}),
    ("f'{inner(1)}'", {"inner"}),
]


@pytest.mark.parametrize(("expression", "expected"), CALLS, ids=[call for call, _ in CALLS])
@pytest.mark.parametrize("form", ["return {}", "await {}", "x = yield {}", "if {}: pass"])
def test_calls(tmp_path: Path, expression: str, expected: set[str], form: str) -> None:
    keyword = "async def" if "await" in form else "def"
    before = "" if "if" in form else "ü = 'ä'; "
    # A file of its own name: what is read of a file is kept.
    file = tmp_path / f"calls_{abs(hash((expression, form)))}.py"
    f = compiled(file, f"{keyword} f():\n    {before}{form.format(expression)}\n")["f"]
    texts = {call_text(frame) for frame in frames_of(f)}
    # Apart from the calls themselves, `await x` stands for `x`, and most instructions are no calls.
    assert texts == {"", *expected}


def test_a_chain_over_several_lines(tmp_path: Path) -> None:
    source = "def f():\n    return (client\n        .open('x')\n        . all())\n"
    f = compiled(tmp_path / "chain.py", source)["f"]
    texts = {call_text(frame) for frame in frames_of(f)} - {""}
    assert len(texts) == 2
    assert {text.rpartition(".")[2] for text in texts} == {"open", "all"}
    assert all("." in text for text in texts)


def test_no_argument_is_ever_shown(tmp_path: Path) -> None:
    f = compiled(
        tmp_path / "secret_calls.py",
        "def f():\n    connect('secret')('secret').login(password='secret')[lambda: 'secret']('secret')\n",
    )["f"]
    texts = {call_text(frame) for frame in frames_of(f)}
    assert len(texts) > 3
    assert not any("secret" in text for text in texts)


def test_a_call_in_a_file_that_has_changed_or_gone(tmp_path: Path) -> None:
    file = tmp_path / "changing.py"
    f = compiled(file, "def f():\n    return time.sleep(1)\n")["f"]
    file.write_text("def f():\n    ret")
    assert {call_text(frame) for frame in frames_of(f)} == {""}
    file.unlink()
    linecache.clearcache()
    _source._called.cache_clear()
    assert {call_text(frame) for frame in frames_of(f)} == {""}


def test_an_instruction_without_a_position() -> None:
    assert call_text(RawFrame(call_text.__code__, 1_000_000, {})) == ""


# -- names -------------------------------------------------------------------------------------------


def frame_in(**namespace: Any) -> RawFrame:
    return RawFrame(frame_in.__code__, 0, namespace)


class Outer:
    class Inner:
        def method(self) -> None: ...

        @staticmethod
        def static() -> None: ...


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("json.dumps", "json.dumps"),
        ("dumps", "json.dumps"),
        ("js.dumps", "json.dumps"),
        ("json.decoder.JSONDecoder", "json.decoder.JSONDecoder"),
        ("json.JSONDecoder.decode", "json.decoder.JSONDecoder.decode"),
        ("Outer", f"{__name__}.Outer"),
        ("Outer.Inner.method", f"{__name__}.Outer.Inner.method"),
        ("len", "len"),
        ("str.join", "str.join"),  # a slot of a class in C: its text will do
        ("dict", "dict"),
        # Not known by name: the text stays.
        ("nothing", "nothing"),
        ("json.nothing", "json.nothing"),
        ("json.dumps.attribute", "json.dumps.attribute"),
        ("value.get", "value.get"),
        ("Outer.Inner.static", "Outer.Inner.static"),
        ("….get", "….get"),
        ("json", "json"),
    ],
)
def test_names_are_resolved_in_the_module(text: str, expected: str) -> None:
    frame = frame_in(json=json, js=json, dumps=json.dumps, Outer=Outer, value={"get": len})
    assert resolved_name(frame, text) == expected


def test_builtins_have_no_module_in_their_name() -> None:
    assert resolved_name(frame_in(), "sorted") == "sorted"
    assert resolved_name(frame_in(), "ValueError") == "ValueError"


def test_functions_in_c() -> None:
    import time

    assert resolved_name(frame_in(nap=time.sleep), "nap") == "time.sleep"


def hostile_things() -> dict[str, object]:
    """Objects that fail at whatever is asked of them; made in the test, since pytest asks a module's."""

    def refuse(thing: object, name: str) -> NoReturn:
        raise AssertionError(f"the user's code was run for {name}")

    class Hostile:
        __getattribute__ = refuse

    def unbound(thing: object) -> NoReturn:
        raise RuntimeError("working outside of context")

    # As werkzeug's LocalProxy: its class is that of what it stands for, if it is bound.
    proxy = type("Proxy", (), {"__class__": property(unbound)})

    class HostileMeta(type):
        __getattribute__ = refuse

    class HostileClass(metaclass=HostileMeta):
        pass

    class LazyModule(types.ModuleType):
        __getattribute__ = refuse

    return {
        "object": Hostile(),
        "proxy": proxy(),
        "class": HostileClass,
        "module": LazyModule("lazy"),
    }


@pytest.mark.parametrize("kind", ["object", "proxy", "class", "module"])
@pytest.mark.parametrize("text", ["thing", "thing.get"])
def test_no_code_of_the_users_runs(kind: str, text: str) -> None:
    frame = frame_in(thing=hostile_things()[kind])
    try:
        name = resolved_name(frame, text)
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        failure = ""
    # Said after the fact: with the objects in sight, pytest would ask them for their names.
    assert failure == ""
    assert type(name) is str


def test_no_module_attribute_hook_runs() -> None:
    module = types.ModuleType("lazy")

    def hook(name: str) -> NoReturn:
        raise AssertionError(name)

    module.__dict__["__getattr__"] = hook
    assert resolved_name(frame_in(lazy=module), "lazy.thing") == "lazy.thing"


def test_the_name_of_a_frames_function() -> None:
    def nested() -> None: ...

    frame = RawFrame(nested.__code__, 0, globals())
    assert function_name(frame) == f"{__name__}.test_the_name_of_a_frames_function.nested"
    assert function_name(RawFrame(nested.__code__, 0, {})) == "test_the_name_of_a_frames_function.nested"
    method = typing.cast(Callable[..., Any], Outer.Inner.method)
    assert function_name(RawFrame(method.__code__, 0, globals())) == f"{__name__}.Outer.Inner.method"


# -- an interpreter without columns ------------------------------------------------------------------


def test_without_columns_there_is_no_call(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from asyncguard._frames import RawFrame\n"
        "from asyncguard._source import call_text\n"
        "def f():\n"
        "    return len([])\n"
        "assert {call_text(RawFrame(f.__code__, 2 * n, {})) for n in range(30)} == {''}\n"
    )
    subprocess.run([sys.executable, "-X", "no_debug_ranges", str(program)], check=True)
