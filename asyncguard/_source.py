"""From a frame's code and instruction to what a person reads: the line, the call, the function."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from asyncguard._frames import RawFrame, position
from asyncguard.events import SourceLine

__all__ = [
    "call_text",
    "definition_line",
    "endpoint_line",
    "frame_line",
    "function_name",
    "is_own_code",
    "is_user_code",
    "line_number",
    "resolved_name",
    "source_line",
]

_OWN = str(Path(__file__).absolute().parents[0]) + os.sep
_STDLIB = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def is_own_code(file: str) -> bool:
    """Whether `file` is part of asyncguard."""
    return file.startswith(_OWN)


@lru_cache(maxsize=4096)
def is_user_code(file: str, project_root: str | None) -> bool:
    """Whether `file` is the user's: below `project_root`, or else in no library.

    Libraries are the standard library, whatever lies in a ``site-packages`` or ``dist-packages``
    folder, and asyncguard itself.
    """
    if file.startswith("<"):
        return False
    path = os.path.abspath(file)
    if project_root is None:
        root = ""
    else:
        root = os.path.join(project_root, "")
        path = os.path.realpath(path)
        if not path.startswith(root):
            return False
    if any(part in path[max(0, len(root) - 1) :] for part in _INSTALLED):
        return False
    # A library below the root is a library; a root inside a library makes the code there the user's.
    libraries = tuple(library for library in (_OWN, *_STDLIB) if library.startswith(root))
    return not path.startswith(libraries) and not os.path.realpath(path).startswith(libraries)


def source_line(code: CodeType, line: int) -> SourceLine:
    """The line as it is shown: with its text, and a path that is short from here."""
    return SourceLine(
        file=_shown(code.co_filename),
        line=line,
        function=code.co_qualname.replace(".<locals>", ""),
        source=linecache.getline(code.co_filename, line).strip(),
    )


def line_number(frame: RawFrame) -> int:
    """The line that `frame` stands on; that of its function where the instruction has none."""
    return position(frame.code, frame.instruction).line or frame.code.co_firstlineno


def frame_line(frame: RawFrame) -> SourceLine:
    """The line that `frame` stands on, as it is shown."""
    return source_line(frame.code, line_number(frame))


def definition_line(code: CodeType) -> SourceLine:
    """Where a function is defined: the line of its ``def``, below its decorators."""
    line = code.co_firstlineno
    for number in range(line, line + 100):
        if linecache.getline(code.co_filename, number).lstrip().startswith(("def ", "async def ")):
            return source_line(code, number)
    return source_line(code, line)


def endpoint_line(endpoint: object) -> SourceLine | None:
    """Where an endpoint is defined; `None` for what is no function of Python's."""
    try:
        code = inspect.unwrap(endpoint).__code__  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError):
        return None
    return definition_line(code) if isinstance(code, CodeType) else None


def call_text(frame: RawFrame) -> str:
    """What the instruction of `frame` calls, as it is written there; empty if it calls nothing."""
    line, end_line, column, end_column = position(frame.code, frame.instruction)
    if line is None or end_line is None or column is None or end_column is None:
        return ""
    return _called(frame.code.co_filename, line, end_line, column, end_column)


def resolved_name(frame: RawFrame, text: str) -> str:
    """The full name of what `text` means in the module of `frame`, or `text` where that is not known.

    Only names of modules, functions and classes are followed, so that no code of the user's runs.
    """
    first, *rest = text.split(".")
    thing: object = frame.namespace.get(first, getattr(builtins, first, None))
    # Everything is read past the object: a proxy, or a metaclass, would answer for another.
    for name in rest:
        if issubclass(type(thing), ModuleType):
            thing = object.__getattribute__(thing, "__dict__").get(name)
        elif issubclass(type(thing), type):
            thing = _of_class("__dict__", thing).get(name)
        else:
            return text
    if issubclass(type(thing), type):
        module, qualified = _of_class("__module__", thing), _of_class("__qualname__", thing)
    elif issubclass(type(thing), FunctionType | BuiltinFunctionType):
        module, qualified = getattr(thing, "__module__", None), getattr(thing, "__qualname__", text)
    else:
        return text
    return qualified if module in (None, "builtins") else f"{module}.{qualified}"


def _of_class(name: str, thing: object) -> Any:
    return type.__dict__[name].__get__(thing)


def function_name(frame: RawFrame) -> str:
    """The module and qualified name of the function that `frame` runs."""
    module = frame.namespace.get("__name__", "")
    name = frame.code.co_qualname.replace(".<locals>", "")
    return f"{module}.{name}" if module else name


def _shown(file: str) -> str:
    if file.startswith("<"):
        return file
    path = os.path.abspath(file)
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return path


@lru_cache(maxsize=1024)
def _called(file: str, line: int, end_line: int, column: int, end_column: int) -> str:
    lines = [linecache.getline(file, number).encode() for number in range(line, end_line + 1)]
    if not all(lines):
        return ""
    # The end first: both columns may be on the same line.
    lines[-1] = lines[-1][:end_column]
    before, lines[0] = lines[0][:column], lines[0][column:]
    try:
        expression = ast.parse(b"(" + b"".join(lines) + b")", mode="eval").body
    except SyntaxError:
        return ""
    if isinstance(expression, ast.Await):
        expression = expression.value
    if not isinstance(expression, ast.Call):
        return ""
    called = expression.func
    names: list[str] = []
    while isinstance(called, ast.Attribute):
        names.append(called.attr)
        called = called.value
    # What comes before the last names may be a whole expression with values in it: leave that out.
    names.append(called.id if isinstance(called, ast.Name) else "…")
    if before.rstrip().endswith(b"."):
        names.append("…")  # a chain over several lines: this call begins at the name of its method
    return ".".join(reversed(names))
