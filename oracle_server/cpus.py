"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """Cores of the affinity mask, or of the container's CPU quota or OMP_NUM_THREADS where that is less; at least 1.

    torch counts the machine's cores; in a container with a quota its surplus threads would wait for each other.
    OMP_NUM_THREADS is what says how many of a machine's cores are whose: Ray sets it to what a replica was given.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, math.ceil(_quota(cgroup)), _omp_threads(affinity)))


def _omp_threads(otherwise: int) -> int:
    """The outermost level's number of OMP_NUM_THREADS, which may be a list."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(said) if said.isascii() and said.isdigit() else otherwise


def _quota(cgroup: Path) -> float:
    """Cores by quota; a large number where there is none."""
    unlimited = 1_000_000.0
    try:  # version 2: "max 100000", or microseconds of CPU time per period
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # version 1: -1 for no quota
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return unlimited
    return int(quota) / int(period) if quota.isdigit() else unlimited
