"""The options of an offloaded function, checked, and the runner that they ask for."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, Literal

from asyncguard._options import checked_choice, checked_hook, checked_seconds
from asyncguard.offloading import _pools
from asyncguard.offloading._call import CallOptions, OnCancel, Runner
from asyncguard.offloading._executors import ExecutorRunner, ThreadRunner, interpreters

__all__ = ["Backend", "Settings", "checked_integer"]

Backend = Literal["process", "thread", "interpreter"] | concurrent.futures.Executor
"""Where an offloaded function runs: see `offload`."""

_BACKENDS = ("process", "thread", "interpreter")
_ON_CANCEL = ("raise", "kill", "abandon")
_threads = ThreadRunner()


class Settings:
    """Checked options; see `offload` and `Offloaded.using`.

    Attributes:
        needs_address: Whether the function has to be found by its name.
        options: What the runner is told of them.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range, or not for this backend.
    """

    def __init__(
        self,
        timeout: float | None,
        backend: Backend,
        on_cancel: OnCancel | None,
        context: Iterable[ContextVar[Any]],
        pool: Runner | None,
        priority: int = 0,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        self._given: dict[str, Any] = {
            "timeout": timeout,
            "backend": backend,
            "on_cancel": on_cancel,
            "context": context,
            "pool": pool,
            "priority": priority,
            "on_progress": on_progress,
        }
        if not isinstance(backend, concurrent.futures.Executor):
            checked_choice("backend", backend, _BACKENDS, other="a concurrent.futures.Executor")
        is_process = backend == "process"
        self.needs_address: bool = backend in ("process", "interpreter")
        if on_cancel is not None:
            checked_choice("on_cancel", on_cancel, _ON_CANCEL)
            if not is_process and on_cancel != "abandon":
                raise ValueError(
                    f'on_cancel={on_cancel!r} needs backend="process": elsewhere nothing can be stopped '
                    'that has begun, and on_cancel="abandon" is all there is'
                )
        if checked_integer("priority", priority) and not is_process:
            raise ValueError(f'priority={priority!r} needs backend="process"')
        checked_hook("on_progress", on_progress)
        if on_progress is not None and not is_process:
            raise ValueError('on_progress=... needs backend="process"')
        self._pool: Runner | None = None
        if pool is not None:
            if isinstance(pool, type) or not hasattr(pool, "run_call"):
                raise TypeError(f"pool must be an OffloadPool or None, not {pool!r}")
            if not is_process:
                raise ValueError('pool=... needs backend="process"')
            self._pool = pool
        elif isinstance(backend, concurrent.futures.Executor):
            self._pool = ExecutorRunner(backend)
        elif backend == "thread":
            self._pool = _threads
        elif backend == "interpreter":
            self._pool = interpreters()
        self.options: CallOptions = CallOptions(
            None if timeout is None else checked_seconds("timeout", timeout),
            on_cancel or ("raise" if is_process else "abandon"),
            priority,
            _checked_context(context),
            on_progress,
        )
        self._given["context"] = self.options.context

    def changed(self, changes: dict[str, Any]) -> Settings:
        """The same, but for some."""
        return Settings(**(self._given | changes))

    def runner(self) -> Runner:
        """What runs a call now.

        Raises:
            RuntimeError: If no event loop runs in this thread.
        """
        return self._pool or _pools.current()

    def __reduce__(self) -> Any:
        return Settings, tuple(self._given.values())


def checked_integer(option: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an integer, not {value!r}")
    return value


def _checked_context(context: object) -> tuple[ContextVar[Any], ...]:
    if not isinstance(context, Iterable):
        raise TypeError(f"context must be a sequence of context variables, not {context!r}")
    variables = tuple(context)
    for variable in variables:
        if not isinstance(variable, ContextVar):
            raise TypeError(f"context must be context variables, not {variable!r}")
    return variables
