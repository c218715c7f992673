"""The engine's sampling rows as the arrays that the kernel ``sample_rows`` reads; imports no CUDA library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.backends.cuda_kernels import SAMPLING_ROW
from worker.backends.sampling_rows import NO_VALUES, SamplingRow


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Host arrays of one launch. ``masks`` is None where every row allows every token."""

    table: npt.NDArray[Any]  # [R] of SAMPLING_ROW
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]  # counts and biases, beside their ids
    masks: npt.NDArray[np.uint32] | None  # [rows that have one, ceil(V / 32)]


@dataclass(slots=True)
class _Pool:
    """Ids of all rows, one after the other."""

    ids: list[npt.NDArray[np.int64]] = field(default_factory=list)
    values: list[npt.NDArray[np.float32]] = field(default_factory=list)
    size: int = 0

    def add(self, ids: npt.NDArray[np.int64], values: npt.NDArray[np.float32] = NO_VALUES) -> tuple[int, int]:
        """Where ``ids`` begin and end; ``values`` are zeros where there are none."""
        begin, self.size = self.size, self.size + len(ids)
        if len(ids):
            self.ids.append(ids)
            self.values.append(values if len(values) else np.zeros(len(ids), np.float32))
        return begin, self.size


def pack_sampling_rows(rows: Sequence[SamplingRow]) -> PackedRows:
    """Copies of all that the rows refer to. No array is empty, so that each has an address."""
    table, pool = np.zeros(len(rows), SAMPLING_ROW), _Pool()
    masks: list[npt.NDArray[np.uint32]] = []
    for index, row in enumerate(rows):
        mask_row = -1
        if row.allowed is not None:
            mask_row = len(masks)
            masks.append(row.allowed)
        table[index] = (
            *(row.uniform, row.top_p, row.temperature, row.min_p),
            *(row.repetition_penalty, row.frequency_penalty, row.presence_penalty),
            *(row.row, row.top_k, mask_row),
            *pool.add(row.seen_ids),
            *pool.add(row.counted_ids, row.counts),
            *pool.add(row.bias_ids, row.bias_values),
        )
    pool.add(np.zeros(1, np.int64))
    return PackedRows(
        table,
        np.concatenate(pool.ids).astype(np.int32),
        np.concatenate(pool.values).astype(np.float32),
        np.stack(masks) if masks else None,
    )
