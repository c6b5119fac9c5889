"""What functions do to the process that they run in, and what they leave behind there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import faulthandler
import io
import locale
import logging
import logging.config
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from asyncguard import report_progress

_kept: list[Any] = []


def same(value: Any) -> Any:
    return value


def pid() -> int:
    return os.getpid()


def log(text: str) -> None:
    logging.getLogger("app.citizens").warning(text)


def sleep(begun: str = "", ended: str = "") -> None:
    report_progress(0)
    try:
        time.sleep(60)
    finally:
        if ended:
            Path(ended).touch()


# -- what it reads and writes ------------------------------------------------------------------------


def ask() -> str:
    return input("what? ")


def read_lines() -> list[str]:
    return [*sys.stdin]


def child_that_talks() -> int:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(len(sys.stdin.read()))"
    return subprocess.run([sys.executable, "-c", script], check=False).returncode


def child_that_is_heard() -> bytes:
    return subprocess.run("echo heard; cat", shell=True, capture_output=True, check=True).stdout


def shell() -> int:
    return os.system("echo from the shell")


def write_to_the_descriptors() -> int:
    return sum(os.write(descriptor, b"past all buffers\n") for descriptor in (1, 2))


def write_megabytes() -> int:
    return sum(sys.stdout.write("x" * 99 + "\n") for _ in range(20_000))


def close_descriptors(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def write_to_standard_output(value: Any) -> int:
    """After somebody has closed it: what has its number now must not be a part of this call."""
    with contextlib.suppress(OSError, ValueError):
        print("spoilt" * 1000, flush=True)
    with contextlib.suppress(OSError):
        os.write(1, b"spoilt" * 1000)
    return sum(value)


class Broken(io.StringIO):
    def write(self, text: str) -> NoReturn:
        raise RuntimeError("no writing")

    def flush(self) -> NoReturn:
        raise RuntimeError("no flushing")


STREAMS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "memory": io.StringIO,
    "broken": Broken,
    "no stream": object,
}


def replace_streams(kind: str) -> None:
    sys.stdout = sys.stderr = STREAMS[kind]()


def close_streams() -> None:
    sys.stdin.close()
    sys.stdout.close()


# -- other processes ---------------------------------------------------------------------------------


def square(number: int) -> int:
    return number * number


def process(method: str) -> tuple[int, int | None]:
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=queue.put, args=(7,))
    child.start()
    answer = queue.get(timeout=60)
    child.join(60)
    return answer, child.exitcode


def process_pool(method: str) -> list[int]:
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(square, range(5))


def executor(method: str) -> list[int]:
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return [*pool.map(square, range(5))]


def executor_that_is_left() -> list[int]:
    """Nobody shuts it down; returns the ids of its processes."""
    context = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(2, mp_context=context)
    _kept.append(pool)
    assert [*pool.map(square, range(5))] == [0, 1, 4, 9, 16]
    return [*pool._processes]


def fork(how: str) -> int:
    """Returns the exit code of a child that ends like that."""
    child = os.fork()
    if child == 0:
        if how == "raises":
            raise ValueError("in the child")
        if how == "exits":
            sys.exit(5)
        if how == "leaves":
            os._exit(6)
        return 7  # as the function does
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork_and_return_much() -> int:
    child = os.fork()
    if child == 0:
        return bytes(5_000_000)  # type: ignore[return-value]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- threads and loops -------------------------------------------------------------------------------


def thread_that_is_left(seconds: float) -> int:
    threading.Thread(target=time.sleep, args=(seconds,), daemon=False).start()
    return threading.active_count()


def thread_that_exits() -> bool:
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()
    return thread.is_alive()


def thread_that_raises() -> None:
    thread = threading.Thread(target=square, args=("no number",))
    thread.start()
    thread.join()


async def _main(seconds: float, ended: str) -> int:
    try:
        await asyncio.sleep(seconds)
        return await asyncio.to_thread(square, 3)
    finally:
        if ended:
            Path(ended).touch()


def run_loop(seconds: float = 0, ended: str = "") -> int:
    return asyncio.run(_main(seconds, ended))


async def _listen_to_a_child() -> bytes:
    child = await asyncio.create_subprocess_exec("echo", "heard", stdout=subprocess.PIPE)
    return (await child.communicate())[0]


def run_loop_with_a_child() -> bytes:
    return asyncio.run(_listen_to_a_child())


# -- what belongs to the whole process ---------------------------------------------------------------

HANDLERS: dict[str, Any] = {
    "ignored": signal.SIG_IGN,
    "default": signal.SIG_DFL,
    "handled": lambda number, frame: None,
}


def set_handler(name: str, how: str) -> None:
    signal.signal(getattr(signal, name), HANDLERS[how])


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def alarm() -> int:
    """A handler and an alarm of its own, in the middle of the call."""
    rung = []
    signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not rung:
        time.sleep(0.01)
    return len(rung)


def terminate_the_group() -> None:
    os.killpg(0, signal.SIGTERM)


def change_directory() -> str:
    os.chdir("/")
    return str(Path.cwd())


def change_mask() -> int:
    os.umask(0o777)
    return os.umask(0o777)


def change_locale() -> str:
    return locale.setlocale(locale.LC_ALL, "C")


def clear_environment() -> int:
    os.environ.clear()
    return len(os.environ)


def basic_config(*, force: bool) -> None:
    logging.basicConfig(level=logging.ERROR, force=force)


def dict_config(level: str = "DEBUG") -> None:
    handlers = {"null": {"class": "logging.NullHandler"}}
    root = {"handlers": ["null"], "level": level}
    logging.config.dictConfig(
        {"version": 1, "disable_existing_loggers": False, "handlers": handlers, "root": root}
    )


def set_default_timeout(seconds: float) -> None:
    socket.setdefaulttimeout(seconds)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def use_up_descriptors() -> bool:
    with contextlib.suppress(OSError):
        while True:
            _kept.append(os.open(os.devnull, os.O_RDONLY))
    return len(_kept) > 10


def disable_faulthandler() -> None:
    faulthandler.disable()


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.startswith("asyncguard")]:
        del sys.modules[name]


def trace() -> None:
    sys.settrace(lambda frame, event, argument: None)


def write_to_sockets() -> None:
    """Nonsense on the wire."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket"):
                os.write(int(name), b"nonsense" * 10)
