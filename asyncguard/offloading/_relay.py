"""Log records and warnings of a worker on their way to the server's loggers."""

from __future__ import annotations

import logging
from typing import Any

from asyncguard.offloading._outlet import Outlet
from asyncguard.offloading._payload import Packed, PackError, pack
from asyncguard.offloading._wire import Kind

__all__ = ["Relay"]

_NAME = "the log record"
_formatter = logging.Formatter()


class Relay(logging.Handler):
    """Sends what is logged. It is the one handler of the root logger of a worker.

    Args:
        outlet: What it is sent by.
        level: The level of the root logger.
    """

    def __init__(self, outlet: Outlet, level: int) -> None:
        super().__init__()
        self._outlet = outlet
        self._root_level = level

    def install(self) -> None:
        """Have all be sent, and nothing be written here; again if a module has configured logging since."""
        root = logging.getLogger()
        if root.handlers != [self]:
            root.handlers[:] = [self]
            root.setLevel(self._root_level)
            logging.captureWarnings(True)

    def remove(self) -> None:
        """In a child that the function has forked."""
        logging.getLogger().removeHandler(self)

    def handle(self, record: logging.LogRecord) -> bool:
        """Without the handler's lock, which a signal handler that logs might wait for. The outlet has one."""
        passes = bool(self.filter(record))
        if passes:
            self.emit(record)
        return passes

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self._outlet.send(Kind.LOG, 0, _packed(record))
        except ConnectionError:  # nobody is left to read it
            pass
        except Exception:
            self.handleError(record)


def _packed(record: logging.LogRecord) -> Packed:
    """What `logging.makeLogRecord` makes the record of again, without what only this process can know."""
    attributes: dict[str, Any] = {**record.__dict__, "msg": record.getMessage(), "args": None}
    exc_info = attributes.pop("exc_info", None)
    if exc_info and not record.exc_text:
        attributes["exc_text"] = _formatter.formatException(exc_info)
    attributes.pop("message", None)
    try:
        return pack([(_NAME, attributes)])
    except PackError:
        return pack([(_NAME, {name: value for name, value in attributes.items() if _is_picklable(value)})])


def _is_picklable(value: object) -> bool:
    try:
        pack([(_NAME, value)])
    except PackError:
        return False
    return True
