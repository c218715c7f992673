"""Matrices in GGUF's blocks for tests: any bits, with scales of a size that keeps a model's values near 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from snapshots.block_types import BLOCK_TYPES

#: Offsets of a block's float16 numbers, with what each is for weights of deviation 1 and mean 0.
_HALVES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 0.2},
    "Q4_1": {0: 0.2, 2: -1.5},
    "Q8_0": {0: 0.0135},
    "Q4_K": {0: 0.0045, 2: 0.034},
    "Q6_K": {208: 0.0007},
}


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, int], block_type: str, deviation: float = 1.0
) -> npt.NDArray[np.uint8]:
    """``[N, bytes of a row]`` of a matrix ``[N, K]``, every bit pattern that codes and scales may have."""
    block, (num_rows, width) = BLOCK_TYPES[block_type], shape
    blocks: npt.NDArray[Any] = rng.integers(0, 256, (num_rows, width // block.num_weights, block.num_bytes), np.uint8)
    factor = deviation * rng.uniform(0.5, 1.5, blocks.shape[:2])
    for start, size in _HALVES[block_type].items():
        blocks[..., start : start + 2] = (factor * size).astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(num_rows, -1)
