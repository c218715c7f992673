"""Tensor types whose weights lie in GGUF's blocks: how many weights and bytes a block has, and what follows from that.

The blocks themselves are opaque here. Source: ``ggml-common.h`` of ggml.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

#: Item size in bytes of the tensor types that hold one number after the other (names as in safetensors).
DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4}


class BlockType(NamedTuple):
    """``num_weights`` neighbouring weights of a row lie in ``num_bytes``."""

    num_weights: int
    num_bytes: int


#: Types of matrices in blocks, under ggml's names.
BLOCK_TYPES: Final = {
    "Q4_0": BlockType(32, 18),
    "Q4_1": BlockType(32, 20),
    "Q8_0": BlockType(32, 34),
    "Q4_K": BlockType(256, 144),
    "Q6_K": BlockType(256, 210),
}

#: All types that a snapshot may hold.
TENSOR_TYPES: Final = (*DTYPE_BYTES, *BLOCK_TYPES)


def fits_blocks(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` can be of ``dtype``: blocks are for matrices of whole blocks."""
    block = BLOCK_TYPES.get(dtype)
    return block is None or (len(shape) == 2 and shape[1] % block.num_weights == 0)


def byte_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``[N, bytes of a row]`` of a matrix ``[N, K]`` in blocks; any other shape as it is. Requires: they fit."""
    block = BLOCK_TYPES.get(dtype)
    return shape if block is None else (shape[0], shape[1] // block.num_weights * block.num_bytes)


def count_tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Requires: a type of :data:`TENSOR_TYPES` that fits ``shape``."""
    return math.prod(byte_shape(dtype, shape)) * DTYPE_BYTES.get(dtype, 1)
