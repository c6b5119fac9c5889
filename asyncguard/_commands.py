"""The commands, on top of uvicorn's own command line: whatever uvicorn can be told, ``run`` can be told."""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import click
from uvicorn.main import main as _UVICORN  # noqa: N812 - a constant here

from asyncguard._demo import run_demo
from asyncguard._loading import load_app
from asyncguard._options import checked_directory, checked_seconds
from asyncguard._served import Settings
from asyncguard.blocking import SHORTEST_THRESHOLD
from asyncguard.errors import AppNotLoaded

__all__ = ["commands"]

F = TypeVar("F", bound=Callable[..., Any])


class _Refused(click.ClickException):
    """What stops a command before it begins: one line, and exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"asyncguard: {self.format_message()}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asyncguard", prog_name="asyncguard")
def commands() -> None:
    """Find what blocks the event loop of an ASGI service."""


def _threshold(default: float) -> Callable[[F], F]:
    return click.option(
        "--threshold",
        type=float,
        default=default,
        show_default=True,
        help="Report stalls of the event loop from this many seconds on.",
    )


@_threshold(0.1)
@click.option(
    "--project-root",
    default=None,
    help="The directory whose files are yours. By default, all but installed packages.",
)
def _run(*, threshold: float, project_root: str | None, **options: Any) -> None:
    """Serve an ASGI application with uvicorn, guarded, and print each line that blocks its event loop.

    APP is an import string such as main:app, or names a function that makes the application. Every
    option of uvicorn is accepted as well.
    """
    try:
        threshold = checked_seconds("--threshold", threshold, minimum=SHORTEST_THRESHOLD)
        project_root = checked_directory("--project-root", project_root)
    except ValueError as error:
        raise _Refused(str(error)) from None
    target, factory = options.pop("app"), options.pop("factory")
    sys.path.insert(0, options["app_dir"])
    try:
        load_app(target, factory=factory)
    except AppNotLoaded as error:
        _show_own_failure(error.__cause__)
        raise _Refused(str(error)) from None
    if options["uds"] is not None:
        _check_socket(options["uds"])
    elif options["fd"] is None:
        _check_port(options["host"], options["port"])
    Settings(target, factory, threshold, project_root).publish()
    assert _UVICORN.callback is not None
    _UVICORN.callback(app="asyncguard._served:create", factory=True, **options)


def _show_own_failure(error: BaseException | None) -> None:
    """The application's own exception, from the application's first line on."""
    if error is not None:
        traceback.print_exception(type(error), error, _without_import(error.__traceback__))


def _without_import(found: TracebackType | None) -> TracebackType | None:
    shown = found
    while shown is not None and (
        "importlib" in shown.tb_frame.f_code.co_filename
        or shown.tb_frame.f_globals.get("__name__") == load_app.__module__
    ):
        shown = shown.tb_next
    return shown


def _check_socket(path: str) -> None:
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise _Refused(f"--uds must be a path in an existing directory, not {path!r}")


def _check_port(host: str, port: int) -> None:
    """Refuse in one line what uvicorn would refuse in several."""
    if not 0 <= port <= 65535:
        raise _Refused(f"--port must be between 0 and 65535, not {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        _cannot_listen(host, port, error)


def _cannot_listen(host: str, port: int, error: OSError) -> NoReturn:
    reason = (error.strerror or str(error)).lower()
    raise _Refused(f"cannot listen on {host} port {port}: {reason}; choose another with --host and --port")


@commands.command()
@_threshold(0.05)
@click.option(
    "--loop",
    type=click.Choice(["auto", "asyncio", "uvloop"]),
    default="auto",
    show_default=True,
    help="The event loop to serve the shop on.",
)
def demo(threshold: float, loop: str) -> None:
    """Serve a shop with every pitfall in it, put load on it, and show what asyncguard says."""
    try:
        code = run_demo(threshold=threshold, loop=loop)
    except RuntimeError as error:
        raise _Refused(str(error)) from None
    sys.exit(code)


_run_command: click.Command = click.command("run", context_settings=_UVICORN.context_settings)(_run)
_run_command.params[:0] = [option for option in _UVICORN.params if option.name != "version"]
commands.add_command(_run_command)
