"""Where a shared resource was declared, and the variable that it was assigned to: what messages say."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import FrameType

from asyncguard._frames import RawFrame
from asyncguard._source import frame_line
from asyncguard.events import SourceLine

__all__ = ["Declaration"]

_STORES = {"STORE_NAME", "STORE_GLOBAL", "STORE_FAST", "STORE_FAST_LOAD_FAST", "STORE_DEREF"}


class Declaration:
    """The call that declares a resource; nothing is read until somebody asks.

    Args:
        frame: The frame that the call is made from, while it is being made.
    """

    def __init__(self, frame: FrameType) -> None:
        self._frame = RawFrame(frame.f_code, frame.f_lasti, {})

    @functools.cached_property
    def line(self) -> SourceLine:
        """The line of the call, without its text: that may hold a password."""
        return replace(frame_line(self._frame), source="")

    @functools.cached_property
    def place(self) -> str:
        """The line as ``file:line``."""
        return f"{self.line.file}:{self.line.line}"

    @functools.cached_property
    def variable(self) -> str | None:
        """The variable that takes the result at once; `None` if there is none."""
        import dis  # only messages need it

        code, instruction, _ = self._frame
        following = (step for step in dis.get_instructions(code) if step.offset > instruction)
        step = next(following, None)
        if step is None or step.opname not in _STORES:
            return None
        # From Python 3.13 on, an instruction may do two things: it has two names then.
        return step.argval if isinstance(step.argval, str) else step.argval[0]
