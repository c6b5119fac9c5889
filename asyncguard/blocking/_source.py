"""From a frame's code and instruction to what a person reads: the line, the call, the function."""

from __future__ import annotations

import ast
import builtins
import linecache
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from asyncguard.blocking._lookups import RawFrame, position
from asyncguard.events import SourceLine

__all__ = [
    "call_text",
    "definition_line",
    "function_name",
    "is_own_code",
    "is_user_code",
    "resolved_name",
    "source_line",
]

_OWN = str(Path(__file__).absolute().parents[1]) + os.sep
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
    if project_root is not None:
        path = os.path.realpath(path)
        inside = path.startswith(project_root + os.sep)
        return inside and not any(part in path[len(project_root) :] for part in _INSTALLED)
    if path.startswith(_OWN) or any(part in path for part in _INSTALLED):
        return False
    return not os.path.realpath(path).startswith(_STDLIB)


def source_line(code: CodeType, line: int) -> SourceLine:
    """The line as it is shown: with its text, and a path that is short from here."""
    return SourceLine(
        file=_shown(code.co_filename),
        line=line,
        function=code.co_qualname.replace(".<locals>", ""),
        source=linecache.getline(code.co_filename, line).strip(),
    )


def definition_line(code: CodeType) -> SourceLine:
    """Where a function is defined: the line of its ``def``, below its decorators."""
    line = code.co_firstlineno
    for number in range(line, line + 100):
        if linecache.getline(code.co_filename, number).lstrip().startswith(("def ", "async def ")):
            return source_line(code, number)
    return source_line(code, line)


def call_text(frame: RawFrame) -> str:
    """What the instruction of `frame` calls, as it is written there; empty if it calls nothing."""
    place = position(frame.code, frame.instruction)
    if place is None:
        return ""
    return _called(frame.code.co_filename, *place)


def resolved_name(frame: RawFrame, text: str) -> str:
    """The full name of what `text` means in the module of `frame`, or `text` where that is not known.

    Only names of modules, functions and classes are followed, so that no code of the user's runs.
    """
    first, *rest = text.split(".")
    thing: object = frame.namespace.get(first, getattr(builtins, first, None))
    for name in rest:
        # `isinstance` would ask the object for its class, and a proxy would answer for another.
        if not issubclass(type(thing), ModuleType | type):
            return text
        thing = vars(thing).get(name)
    if not issubclass(type(thing), FunctionType | BuiltinFunctionType | type):
        return text
    module, qualified = getattr(thing, "__module__", None), getattr(thing, "__qualname__", text)
    return qualified if module in (None, "builtins") else f"{module}.{qualified}"


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
    lines[0] = lines[0][column:]
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
    return ".".join(reversed(names))
