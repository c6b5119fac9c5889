"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["usable_cpus"]

_CGROUP = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cpus(cgroup: Path = _CGROUP, own: Path = _OWN) -> int:
    """The CPUs that this process may run on, or those that its container pays for, whichever is less.

    Args:
        cgroup: Where control groups are mounted.
        own: Says which of them this process is in.

    Returns:
        At least 1.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        allowed = os.cpu_count() or 1
    quotas = [quota for folder in _folders(cgroup, own) if (quota := _quota(folder)) is not None]
    return max(1, min([allowed, *map(math.ceil, quotas)]))


def _folders(cgroup: Path, own: Path) -> list[Path]:
    """That of this process, and those around it, whose limits count as well (version 2)."""
    try:
        names = [line[4:] for line in own.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        names = []
    path = Path(*names[:1])
    return [cgroup / each for each in (path, *path.parents)]


def _quota(cgroup: Path) -> float | None:
    """CPUs' worth of time, as a container's limit gives them; `None` for no limit.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html, ``cpu.max``, and for the first version
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        granted, each = int(quota), int(period)
    except ValueError:  # "max"
        return None
    return granted / each if granted > 0 and each > 0 else None
