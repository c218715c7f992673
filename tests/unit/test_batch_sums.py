"""What metrics say of batches."""

from __future__ import annotations

import msgspec

from scheduler.gateway.batch_records import CANCELLING, COMPLETED, IN_PROGRESS, BatchRecord
from scheduler.gateway.batch_sums import UNKNOWN_MODEL, sum_batches

RECORD = BatchRecord("batch_1", "t", "k", "/v1/chat/completions", "file-1", "24h", 100, 900, "file-2", "file-3")


def test_lines_and_ages_are_summed_by_bounded_labels() -> None:
    """Batches of one model add up, ended ones count for nothing, and a name that no model has is no label."""
    some = {"model": "m", "status": IN_PROGRESS, "total": 10, "completed": 3, "failed": 1, "in_flight": 2}
    records = [
        msgspec.structs.replace(RECORD, **some),
        msgspec.structs.replace(RECORD, **{**some, "created_at": 150}),
        msgspec.structs.replace(RECORD, model="made up", status=CANCELLING, total=5),
        msgspec.structs.replace(RECORD, model="m", status=COMPLETED, total=7, completed=7),
    ]
    sums = sum_batches(records, {"m"}, now_s=200.0)
    assert {state: sums.lines["m", state] for state in ("waiting", "in_flight", "completed", "failed")} == {
        "waiting": 8,
        "in_flight": 4,
        "completed": 6,
        "failed": 2,
    }
    assert sums.lines[UNKNOWN_MODEL, "waiting"] == 5
    assert sums.batches == {IN_PROGRESS: 2, CANCELLING: 1}
    assert sums.oldest_s == {IN_PROGRESS: 100.0, CANCELLING: 100.0}
