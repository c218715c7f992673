"""Figures: medians, p99, ratios, and the JSON they are kept in."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any


def quantile(values: list[float], fraction: float) -> float:
    """The ``fraction`` quantile by linear interpolation."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def machine() -> str:
    """Processor, cores and kernel of this machine."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release().split('-')[0]}"


class Report:
    """Collects figures, prints each as it comes, writes them all."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._machine = machine()

    def add(self, metric: str, unit: str, tier: str, values: list[float]) -> None:
        """A metric with its sample."""
        p50, p99 = statistics.median(values), quantile(values, 0.99)
        self.rows.append(
            {
                "metric": metric,
                "unit": unit,
                "tier": tier,
                "n": len(values),
                "p50": round(p50, 3),
                "p99": round(p99, 3),
                "machine": self._machine,
            }
        )
        print(f"{metric:<44} {tier:<3} p50 {p50:10.2f}  p99 {p99:10.2f} {unit:<9} n={len(values)}", flush=True)

    def add_ratio(self, metric: str, ours: list[float], theirs: list[float], peer: str) -> None:
        """Ours over the peer's, pair by pair."""
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        p50 = statistics.median(ratios)
        row: dict[str, Any] = {"metric": metric, "ratio_p50": round(p50, 4), "n_pairs": len(ratios), "peer": peer}
        row["ratios"] = [round(ratio, 4) for ratio in ratios]
        self.rows.append(row)
        print(f"{metric:<44}     ratio {p50:7.3f}  (ours / {peer}) pairs={len(ratios)}", flush=True)

    def write(self, path: Path) -> None:
        """All rows as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows, indent=1) + "\n")
