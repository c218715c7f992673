"""What each process of a running server holds, over time, and how fast that grows."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.processes import command_name, descendants, memory_bytes

MIB: Final = 1024 * 1024
LISTENING: Final = "0A"
#: Two-sided 95 % quantiles of Student's t for small degrees of freedom; 1.96 from the last on.
STUDENT_T: Final = (
    (1, 12.7),
    (2, 4.30),
    (3, 3.18),
    (5, 2.57),
    (8, 2.31),
    (12, 2.18),
    (20, 2.09),
    (40, 2.02),
    (80, 1.99),
)
#: ``fds`` are without the clients' connections, which are as many as there are requests under way.
KINDS: Final = ("rss_mib", "pss_mib", "fds", "threads")


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one instant; ``at_s`` since the first sample."""

    at_s: float
    role: str
    pid: int
    values: dict[str, float]


class Samples:
    """All samples of one run of ``glowplug serve``. May be used in a thread; one call at a time."""

    def __init__(self, serve_pid: int, state_dir: Path, port: int = 0) -> None:
        """``port``: where clients connect to; their connections are counted apart."""
        self._port = port
        self.rows: list[Sample] = []
        self._serve_pid = serve_pid
        self._state_dir = state_dir
        self._began_s = time.monotonic()

    def take(self) -> None:
        """Ask every process once; those that end meanwhile are left out."""
        at_s = time.monotonic() - self._began_s
        for pid, role in self._roles().items():
            try:
                self.rows.append(Sample(at_s, role, pid, read_process(pid, self._port)))
            except OSError:
                continue

    def slopes(self, settle_s: float) -> dict[str, dict[str, Any]]:
        """By role: the slope of each kind per hour, of the process that was seen longest, after ``settle_s``."""
        found: dict[str, dict[str, Any]] = {}
        for role in sorted({row.role for row in self.rows}):
            pids = [row.pid for row in self.rows if row.role == role]
            longest = max(set(pids), key=pids.count)
            rows = [row for row in self.rows if row.pid == longest and row.at_s >= settle_s]
            slopes = {}
            for kind in KINDS:
                points = [(row.at_s / 3600, row.values[kind]) for row in rows]
                if len(points) >= 3:
                    slope, confidence = fit_slope(points)
                    late = points[len(points) // 2 :]
                    slopes[kind] = {
                        "slope_per_hour": round(slope, 2),
                        "confidence_per_hour": round(confidence, 2),
                        "late_slope_per_hour": round(fit_slope(late)[0], 2) if len(late) >= 3 else None,
                        "first": points[0][1],
                        "last": points[-1][1],
                    }
            found[role] = {"n": len(rows), "starts": len(set(pids)), "slopes": slopes}
        return found

    def as_json(self) -> list[dict[str, Any]]:
        """Every sample."""
        return [{"at_s": round(row.at_s, 1), "role": row.role, "pid": row.pid, **row.values} for row in self.rows]

    def _roles(self) -> dict[int, str]:
        roles = {self._serve_pid: "serve"}
        for pid in descendants(self._serve_pid):
            name, words = command_name(pid), _words(pid)
            if name == "gp:zygote":
                roles[pid] = "zygote"
            elif name.startswith("gp:"):
                roles[pid] = "worker"
            elif words[-2:-1] in (["scheduler"], ["worker"]):
                roles[pid] = words[-1]
        try:
            redis_pid = int((self._state_dir / "redis" / "server.pid").read_text())
        except (OSError, ValueError):
            return roles
        return {**roles, redis_pid: "redis"}


def read_process(pid: int, port: int = 0) -> dict[str, float]:
    """Memory in MiB, descriptors, connections that clients made to ``port``, and threads of a process.

    Raises:
        OSError: it is gone.
    """
    clients = client_sockets(pid, port) if port else 0
    return {
        "rss_mib": round(memory_bytes(pid, "Rss") / MIB, 2),
        "pss_mib": round(memory_bytes(pid) / MIB, 2),
        "fds": len(os.listdir(f"/proc/{pid}/fd")) - clients,
        "clients": clients,
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def client_sockets(pid: int, port: int) -> int:
    """How many of a process's descriptors are connections to its ``port``. Source: proc(5), /proc/net/tcp."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    ours = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] != LISTENING}
    count = 0
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            count += os.readlink(f"/proc/{pid}/fd/{descriptor}") in ours
    return count


def fit_slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares slope of (x, y) and half the width of its 95 % confidence interval.

    Residuals that hang together in time make the true interval wider than this.

    Raises:
        ValueError: fewer than three points, or all at one x.
    """
    if len(points) < 3:
        raise ValueError(f"{len(points)} points: a slope with its confidence needs 3")
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        raise ValueError("all points are at one instant")
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    degrees = len(points) - 2
    quantile = next((t for most, t in STUDENT_T if degrees <= most), 1.96)
    return slope, quantile * math.sqrt(residual / degrees / spread)


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []
