"""A process that does not outlive another, however that one dies.

The other has one end of a socket pair and never writes to it; the system closes it when it dies.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import threading

__all__ = ["arm", "is_cut"]


def arm(lifeline: int, *, may_use_thread: bool = True) -> None:
    """End this process at once when the other end is closed.

    Where the system can send a signal then, it even ends one that never lets go of the GIL.
    `PR_SET_PDEATHSIG` would not do: it tells of the death of the thread that started this process, not of the
    process that has it.

    Args:
        lifeline: The descriptor of this end.
        may_use_thread: Whether to have a thread wait for it where the system sends no such signal.
    """
    if not _ask_for_signal(lifeline) and may_use_thread:
        threading.Thread(target=_wait, args=(lifeline,), name="asyncguard-lifeline", daemon=True).start()
    if is_cut(lifeline):  # before the system was asked, so that it said nothing
        os._exit(1)


def is_cut(lifeline: int) -> bool:
    """Whether the other end is closed."""
    poll = select.poll()
    poll.register(lifeline, 0)
    return bool(poll.poll(0))


def _ask_for_signal(lifeline: int) -> bool:
    if not hasattr(fcntl, "F_SETSIG"):
        return False
    try:
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:  # a sandbox that does not know them
        return False
    return True


def _wait(lifeline: int) -> None:
    with socket.socket(fileno=os.dup(lifeline)) as end:
        end.recv(1)
    os._exit(1)
