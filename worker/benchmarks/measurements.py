"""Durations and what is said about them: percentiles and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Summary:
    """Of durations in microseconds. ``histogram`` counts those below each power of two, by that power."""

    num_samples: int
    min_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    max_us: float
    histogram: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def summarize(durations_ns: Sequence[int]) -> Summary:
    """Nearest-rank percentiles.

    Raises:
        ValueError: no durations.
    """
    if not durations_ns:
        raise ValueError("nothing was measured")
    ordered = sorted(durations_ns)

    def rank(share: float) -> float:
        return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000, 3)

    buckets: dict[int, int] = {}
    for duration in ordered:
        power = max(0, math.ceil(math.log2(max(duration, 1) / 1000)))
        buckets[power] = buckets.get(power, 0) + 1
    histogram = {f"<= {1 << power} us": count for power, count in sorted(buckets.items())}
    return Summary(len(ordered), rank(0.0), rank(0.5), rank(0.95), rank(0.99), rank(1.0), histogram)
