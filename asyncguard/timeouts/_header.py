"""The header in which a caller says for how many seconds it will wait."""

from __future__ import annotations

import logging
import re

from starlette.types import Scope

__all__ = ["caller_seconds", "checked_header"]

logger = logging.getLogger("asyncguard.timeouts")

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""https://www.rfc-editor.org/rfc/rfc9110#section-5.6.2"""
_SECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


def checked_header(option: str, value: object) -> bytes | None:
    """The name of a header, as a scope has it; `None` for none.

    Raises:
        TypeError: If `value` is no string.
        ValueError: If no header can have that name.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{option} must be the name of a header, or None, not {value!r}")
    if not _NAME.fullmatch(value):
        raise ValueError(f"{option} must be the name of a header, not {value!r}")
    return value.lower().encode()


def caller_seconds(scope: Scope, name: bytes) -> float | None:
    """What the caller says in the header `name`: seconds, with a fraction or without.

    Anything else is not understood, and ignored: who sends it is a client, whose mistake is no error here.
    """
    for key, value in scope["headers"]:
        if key == name:
            if _SECONDS.fullmatch(value.strip()):
                return float(value)
            logger.debug("ignored %s: %r: it is no number of seconds", name.decode(), value[:100])
            return None
    return None
