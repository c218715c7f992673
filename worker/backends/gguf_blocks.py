"""GGUF's blocks as float32, for the reference backend: NumPy alone, no package of an importer in a worker.

Source: ``ggml-quants.c`` of ggml, ``dequantize_row_*``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from snapshots.block_types import BLOCK_TYPES

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def dequantise_blocks(rows: ByteArray, block_type: str) -> FloatArray:
    """``[N, K]`` of ``rows`` ``[N, bytes of a row]``, a copy. ``block_type``: a name of snapshots.block_types."""
    block = BLOCK_TYPES[block_type]
    blocks = np.ascontiguousarray(rows).reshape(-1, block.num_bytes)
    return _DEQUANTISERS[block_type](blocks).reshape(len(rows), -1)


def _halves(blocks: ByteArray, start: int, count: int = 1) -> FloatArray:
    """``count`` float16 numbers from byte ``start`` of each block, ``[blocks, count]``."""
    return np.ascontiguousarray(blocks[:, start : start + 2 * count]).view(np.float16).astype(np.float32)


def _signed(values: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    return np.ascontiguousarray(values).view(np.int8)


def _split_nibbles(packed: ByteArray) -> ByteArray:
    """Low four bits of all bytes, then the high ones, along the last axis."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _q4_0(blocks: ByteArray) -> FloatArray:
    return (_split_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)) * _halves(blocks, 0)


def _q4_1(blocks: ByteArray) -> FloatArray:
    return _split_nibbles(blocks[:, 4:]).astype(np.float32) * _halves(blocks, 0) + _halves(blocks, 2)


def _q8_0(blocks: ByteArray) -> FloatArray:
    return _signed(blocks[:, 2:]).astype(np.float32) * _halves(blocks, 0)


def _q4_k(blocks: ByteArray) -> FloatArray:
    """Eight sub-blocks of 32 with six-bit scales and minima, the last four of each split over two places."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6) << 4), axis=1)
    codes = _split_nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    factors = _halves(blocks, 0) * scales.astype(np.float32)  # [blocks, 8]
    offsets = _halves(blocks, 2) * minima.astype(np.float32)
    return codes.astype(np.float32) * factors[:, :, None] - offsets[:, :, None]


def _q6_k(blocks: ByteArray) -> FloatArray:
    """Two halves of four quarters of 32: four low bits by pairs of quarters, two high bits, a scale for each 16."""
    low = _split_nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    codes = (low | high << 4).astype(np.float32) - np.float32(32)
    factors = _halves(blocks, 208) * _signed(blocks[:, 192:208]).astype(np.float32)  # [blocks, 16]
    return codes.reshape(-1, 16, 16) * factors[:, :, None]


_DEQUANTISERS: Final[dict[str, Callable[[ByteArray], FloatArray]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
