"""What a model's past says of its future: how often it is asked for, and how long it takes to come back."""

from __future__ import annotations

import math
from typing import Final

#: How fast the past is forgotten.
MEMORY_S: Final = 120.0
#: Until a wake was measured: what a restore takes apart from its bytes, and how fast those come.
ASSUMED_START_S: Final = 0.5
ASSUMED_BYTES_PER_S: Final = 4e9


class ModelHistory:
    """Of one model. ``now_s`` is any monotonic clock."""

    def __init__(self) -> None:
        self._per_s = 0.0
        self._counted_s = 0.0
        self._reload_s: float | None = None

    def on_request(self, now_s: float) -> None:
        """A request arrived."""
        self._per_s = self.requests_per_s(now_s) + 1 / MEMORY_S
        self._counted_s = now_s

    def on_ready(self, elapsed_s: float) -> None:
        """A worker was ready ``elapsed_s`` after it was ordered. Halfway between this and what was known."""
        self._reload_s = elapsed_s if self._reload_s is None else (self._reload_s + elapsed_s) / 2

    def requests_per_s(self, now_s: float) -> float:
        """Recent rate of arrivals: each counts less the longer ago it was."""
        return self._per_s * math.exp(-max(0.0, now_s - self._counted_s) / MEMORY_S)

    def reload_s(self, weights_bytes: int) -> float:
        """Seconds from an order to a worker that is ready, as measured, or assumed for ``weights_bytes``."""
        return ASSUMED_START_S + weights_bytes / ASSUMED_BYTES_PER_S if self._reload_s is None else self._reload_s
