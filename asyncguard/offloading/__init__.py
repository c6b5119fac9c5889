"""CPU work off the event loop: `offload`, and the pool of worker processes behind it."""

from typing import TYPE_CHECKING

from asyncguard.offloading._offload import Offloaded, offload
from asyncguard.offloading._progress import report_progress
from asyncguard.offloading._serving import ANSWERS, with_pool

if TYPE_CHECKING:
    from asyncguard.offloading._pool import OffloadPool

__all__ = ["ANSWERS", "OffloadPool", "Offloaded", "offload", "report_progress", "with_pool"]


def __getattr__(name: str) -> object:
    # What it takes to start processes is imported by who starts some.
    if name == "OffloadPool":
        from asyncguard.offloading._pool import OffloadPool

        return OffloadPool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
