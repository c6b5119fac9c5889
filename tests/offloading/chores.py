"""What workers run in the tests of a worker itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from asyncguard.offloading._progress import report_progress
from tests.offloading import tracer

logger = logging.getLogger("tests.chores")
request: ContextVar[str] = ContextVar("request", default="none")
not_a_variable = 3


def add(a: int, b: int = 0) -> int:
    return a + b


def same(value: Any) -> Any:
    return value


def pid() -> int:
    return os.getpid()


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def press_ctrl_c() -> NoReturn:
    raise KeyboardInterrupt


def leave(code: Any) -> NoReturn:
    sys.exit(code)


def leave_hard(code: int) -> NoReturn:
    os._exit(code)


def crash() -> None:
    ctypes.string_at(0)


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def lock() -> Any:
    return threading.Lock()


def say(text: str) -> None:
    print(text)


def listen() -> str:
    return sys.stdin.read()


def request_name() -> str:
    found = request.get()
    request.set("spoiled")
    return found


class Unbuildable:
    def __reduce__(self) -> Any:
        return fail, ("cannot be built",)


def log(*, level: int = logging.WARNING, extra: Any = None) -> None:
    logger.log(level, "%d of %s", 3, "many", extra=extra)


def log_in_handler() -> int:
    """A signal handler that logs, whatever is being sent at that moment."""
    begun = time.monotonic()
    count = 0

    def on_alarm(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        logger.warning("alarm %s", "y" * 2000)

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        while count < 100 and time.monotonic() < begun + 20:
            logger.warning("plain %s", "x" * 100_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return count


def log_failure() -> None:
    try:
        fail("failure")
    except ValueError:
        logger.exception("it failed")


def log_bad_arguments() -> None:
    logger.warning("%d", "no number")


def warn() -> None:
    warnings.warn("take care", UserWarning, stacklevel=1)


def configure_logging() -> None:
    logging.basicConfig(level=logging.DEBUG, force=True)


def log_from_threads(threads: int, each: int) -> bytes:
    def work(number: int) -> None:
        for index in range(each):
            logger.warning("%d %d %s", number, index, "x" * (index * 50 % 3000))

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for _ in range(each):
        report_progress(0.5)
    for thread in running:
        thread.join()
    return bytes(200_000)


_stop = threading.Event()
_talker: list[threading.Thread] = []


def start_talking() -> None:
    """A thread that logs while other calls come and go."""

    def talk() -> None:
        while not _stop.wait(0.0005):
            logger.warning("still here %s", "x" * 500)

    _talker.append(threading.Thread(target=talk))
    _talker[0].start()


def stop_talking() -> None:
    _stop.set()
    _talker[0].join()


def report(*fractions: Any) -> None:
    for fraction in fractions:
        report_progress(fraction)


def report_from_thread() -> None:
    thread = threading.Thread(target=report_progress, args=(0.25,))
    thread.start()
    thread.join()


# -- what is to be stopped ---------------------------------------------------------------------------


def spin(ended: str = "") -> None:
    report_progress(0)
    try:
        while True:
            pass
    finally:
        if ended:
            Path(ended).touch()


def sleep(seconds: float = 60) -> None:
    report_progress(0)
    time.sleep(seconds)


def wait() -> None:
    report_progress(0)
    threading.Event().wait(60)


def clean_up(ended: str) -> None:
    """Its `finally` takes longer than the next signal does to come."""
    try:
        report_progress(0)
        time.sleep(60)
    finally:
        report_progress(0.5)
        time.sleep(0.1)
        Path(ended).touch()


def linger() -> None:
    """Interrupted in its `finally`."""
    try:
        pass
    finally:
        report_progress(0)
        time.sleep(60)


def swallow() -> str:
    try:
        report_progress(0)
        time.sleep(60)
    except BaseException as error:
        return type(error).__name__
    return "slept"


def translate() -> None:
    try:
        report_progress(0)
        time.sleep(60)
    except BaseException as error:
        raise ValueError("translated") from error


def log_for_ever() -> None:
    report_progress(0)
    while True:
        logger.warning("on and on")


def report_for_ever() -> None:
    report_progress(0)
    while True:
        report_progress(0.5)


def die_in_del() -> None:
    """Interrupted where an exception comes to nothing."""

    class Sleeper:
        def __del__(self) -> None:
            report_progress(0)
            time.sleep(60)

    Sleeper()
    time.sleep(60)


def be_traced() -> None:
    """Half of the time that passes is the tracer's."""
    before = sys.gettrace()
    sys.settrace(tracer.trace)
    report_progress(0)
    try:
        while True:
            add(1)
    finally:
        sys.settrace(before)


def tracer_is_whole() -> bool:
    return not tracer.lock.locked()


def import_slowly() -> None:
    from tests.offloading import slow_import

    assert slow_import.DONE
    while True:
        pass


def slow_import_is_whole() -> bool:
    from tests.offloading import slow_import

    return slow_import.DONE


class SlowToRebuild:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> Any:
        return time.sleep, (self.seconds,)


class SlowToPickle:
    def __reduce__(self) -> Any:
        report_progress(0)
        time.sleep(60)
        return int, ()


def slow_to_pickle() -> SlowToPickle:
    return SlowToPickle()


def short(size: int) -> int:
    return sum(range(size))


def count_in_c() -> int:
    report_progress(0)
    return sum(range(10**12))


def match() -> object:
    report_progress(0)
    return re.match(r"(a+)+$", "a" * 60 + "b")


# -- what is left of a call --------------------------------------------------------------------------


class Tracked:
    def __init__(self) -> None:
        _tracked.add(self)

    def __reduce__(self) -> Any:
        return Tracked, ()


class Selfish(Exception):
    def __init__(self, held: Any = None) -> None:
        super().__init__("selfish")
        self.me = self


_tracked: weakref.WeakSet[Tracked] = weakref.WeakSet()


def take(value: Any, *, how: str) -> Any:
    if how == "raise":
        raise ValueError("taken")
    if how == "cycle":
        raise Selfish
    if how == "unpicklable":
        return value, threading.Lock()
    return value if how == "return" else None


def alive() -> int:
    assert gc.isenabled()
    return len(_tracked)


def memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing is gone
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def descriptors_of_a_program() -> list[str]:
    listing = subprocess.run(["ls", "/proc/self/fd"], capture_output=True, close_fds=False, check=True)
    return listing.stdout.decode().split()


def handlers_of_a_program() -> str:
    """Which signals a program that is started here ignores."""
    command = ["grep", "SigIgn", "/proc/self/status"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode().split()[1]


def fork() -> tuple[int, bool]:
    """A child of its own, which logs and can be terminated."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=logger.warning, args=("from the child",))
    child.start()
    child.join(20)
    sleeper = context.Process(target=time.sleep, args=(60,))
    sleeper.start()
    sleeper.terminate()
    sleeper.join(20)
    return child.exitcode or 0, sleeper.exitcode == -signal.SIGTERM


def draw() -> tuple[float, float]:
    import numpy as np

    return random.random(), float(np.random.random())


def touch_at_exit(path: str) -> None:
    import atexit

    atexit.register(Path(path).touch)


def niceness() -> int:
    return os.nice(0)


def is_imported(module: str) -> bool:
    return module in sys.modules


def log_level() -> int:
    return logging.getLogger().level


def log_with_extras() -> None:
    logger.warning("extras", extra={"colour": "red", "held": threading.Lock()})


def main_is_loaded() -> bool:
    return sys.modules["__main__"].__name__ != "__main__"
