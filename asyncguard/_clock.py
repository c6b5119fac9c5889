"""The clock that everything in asyncguard reads.

Call it through this module (``_clock.monotonic()``), so that a test can turn it by replacing the
attribute. Code on a request's path may bind it once per request.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["monotonic", "wall"]

monotonic: Callable[[], float] = time.perf_counter
"""Seconds on a clock that never goes back; only differences mean anything."""

wall: Callable[[], float] = time.time
"""Seconds since the epoch, for a person to read."""
