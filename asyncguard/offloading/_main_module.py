"""The server's main module in a worker: imported when something of it is wanted, and not before.

Its `__name__` is ``__mp_main__`` there, as `multiprocessing` has it, so that what stands under
``if __name__ == "__main__":`` does not run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import sys
from types import CodeType, ModuleType
from typing import NamedTuple

__all__ = ["MainModule", "install", "load", "of_this_process", "refuse_while_loading"]

_MAIN = "__main__"
_ALIAS = "__mp_main__"

_loading = False


class MainModule(NamedTuple):
    """Where a main module was run from: a file, or else a name (``python -m``).

    Attributes:
        path: The path of the file.
        name: The name of the module.
    """

    path: str | None = None
    name: str | None = None


def of_this_process() -> MainModule | None:
    """That of the process that calls it; `None` if it was typed in, or given by ``python -c``.

    What workers send of it is found under both names from then on.
    """
    main = sys.modules.get(_MAIN)
    if main is None:
        return None
    sys.modules.setdefault(_ALIAS, main)
    if isinstance(main, _Awaited):
        return main._wanted
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return MainModule(name=spec.name)
    path = getattr(main, "__file__", None)
    return MainModule(path=os.path.abspath(path)) if isinstance(path, str) and os.path.exists(path) else None


def refuse_while_loading() -> None:
    """Start no workers while the main module is imported by one: that would never end.

    Raises:
        RuntimeError: If it is. (While a worker of anyio's imports it, there is none.)
    """
    if _loading or _MAIN not in sys.modules:
        raise RuntimeError(
            "a worker process was about to start workers of its own, since the main module starts the "
            "program when it is imported: put that under `if __name__ == '__main__':`"
        )


class _Awaited(ModuleType):
    """Stands for the main module until something of it is wanted."""

    def __init__(self, wanted: MainModule | None) -> None:
        super().__init__(_MAIN)
        self._wanted = wanted

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for by whoever looks at modules
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        return getattr(load(), name)


def install(main: MainModule | None) -> None:
    """Let it be found as ``__main__``."""
    sys.modules[_MAIN] = sys.modules[_ALIAS] = _Awaited(main)


def load() -> ModuleType:
    """Import it, if that has not been done.

    Raises:
        AttributeError: If there is none that could be imported.
        BaseException: What it raises.
    """
    global _loading
    awaited = sys.modules[_MAIN]
    if not isinstance(awaited, _Awaited):
        return awaited
    if awaited._wanted is None:
        raise AttributeError("the main module of the server was not read from a file, and cannot be imported")
    module, code = _prepared(awaited._wanted)
    _loading = True
    sys.modules[_MAIN] = sys.modules[_ALIAS] = module
    try:
        exec(code, module.__dict__)  # noqa: S102 (it is what an import does)
    except BaseException:
        sys.modules[_MAIN] = sys.modules[_ALIAS] = awaited
        raise
    finally:
        _loading = False
    return module


def _prepared(main: MainModule) -> tuple[ModuleType, CodeType]:
    module = ModuleType(_ALIAS)
    if main.path is not None:
        with io.open_code(main.path) as file:
            code = compile(file.read(), main.path, "exec", dont_inherit=True)
        module.__file__ = main.path
        return module, code
    name = main.name or _MAIN
    # `python folder` and `python app.zip` make that the first place to look.
    find = importlib.machinery.PathFinder.find_spec if name == _MAIN else importlib.util.find_spec
    spec = find(name)
    loader: importlib.machinery.SourceFileLoader | None = getattr(spec, "loader", None)
    found = loader.get_code(name) if loader is not None else None
    if spec is None or found is None:
        raise ImportError(f"there is no module {name} as the server ran it", name=name)
    module.__file__ = spec.origin
    module.__loader__ = loader
    module.__package__ = spec.parent
    module.__spec__ = spec
    return module, found
