"""How many processor cores this process may use: its affinity, and the quota of the control groups that it is in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OWN_CGROUPS: Final = Path("/proc/self/cgroup")


def count_usable_cores(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Cores by affinity (a container's cpuset shows there), or fewer where a quota grants fewer; at least 1.

    A quota of 1.5 cores counts as 1: a second thread would be throttled for half of each period, and the product would
    wait for it. What cannot be read sets no limit.

    Source: Linux Documentation/admin-guide/cgroup-v2.rst, ``cpu.max``; scheduler/sched-bwc.rst, ``cpu.cfs_quota_us``.
    """
    cores = len(os.sched_getaffinity(0))
    quota = read_quota_cores(cgroup_root, own_cgroups)
    return max(1, min(cores, math.floor(quota)) if quota is not None else cores)


def read_quota_cores(cgroup_root: Path, own_cgroups: Path) -> float | None:
    """The smallest quota, in cores, of the process's groups and all above them; None without any."""
    try:
        lines = own_cgroups.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2: one hierarchy
            quotas += _quotas_upwards(cgroup_root, path, _read_v2)
        elif "cpu" in controllers.split(","):
            mount = cgroup_root / controllers
            quotas += _quotas_upwards(mount if mount.is_dir() else cgroup_root / "cpu", path, _read_v1)
    return min(quotas, default=None)


def _quotas_upwards(mount: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    """Quotas of ``path`` and its parents. In a container the path may be the host's: then the mount itself counts."""
    parts = [part for part in path.split("/") if part and part != ".."]
    folders = [mount.joinpath(*parts[:count]) for count in range(len(parts) + 1)]
    return [quota for folder in folders if (quota := read(folder)) is not None]


def _read_v2(folder: Path) -> float | None:
    return _divide(*(_read_words(folder / "cpu.max") or ["max", "1"])[:2])


def _read_v1(folder: Path) -> float | None:
    quota = _read_words(folder / "cpu.cfs_quota_us")
    period = _read_words(folder / "cpu.cfs_period_us")
    return _divide(quota[0], period[0]) if quota and period else None


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


def _divide(quota: str, period: str = "100000") -> float | None:
    """Cores; None for no limit ("max", or -1 in version 1) or anything else that is no quota."""
    if not (quota.isdecimal() and period.isdecimal() and int(period) > 0 and int(quota) > 0):
        return None
    return int(quota) / int(period)
