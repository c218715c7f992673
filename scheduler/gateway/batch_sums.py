"""What the batches under way come to, for metrics: pure sums over their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Final

from scheduler.gateway.batch_records import ENDED, BatchRecord

#: Stands for a name that a client made up: label values are bounded.
UNKNOWN_MODEL: Final = "unknown"


@dataclass(frozen=True)
class BatchSums:
    """``lines`` by model and state (waiting, in_flight, completed, failed), ``batches`` by status, and how long ago the
    oldest of each status was created."""

    lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    oldest_s: dict[str, float] = field(default_factory=dict)


def sum_batches(records: Iterable[BatchRecord], models: Container[str], now_s: float) -> BatchSums:
    """The sums over ``records`` that have not ended. A model that is not among ``models`` counts as unknown."""
    sums = BatchSums()
    for record in records:
        if record.status in ENDED:
            continue
        sums.batches[record.status] += 1
        sums.oldest_s[record.status] = max(sums.oldest_s.get(record.status, 0.0), now_s - record.created_at)
        model = record.model if record.model in models else UNKNOWN_MODEL
        answered = record.completed + record.failed
        sums.lines[model, "waiting"] += max(0, record.total - answered - record.in_flight)
        sums.lines[model, "in_flight"] += record.in_flight
        sums.lines[model, "completed"] += record.completed
        sums.lines[model, "failed"] += record.failed
    return sums
