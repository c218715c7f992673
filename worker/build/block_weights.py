"""Matrices of a GGUF file as they lie there: which stay as they are, and what becomes of the others.

A matrix keeps its blocks where the GPU backend's kernels read their type and all that is joined to it (queries, keys
and values; gate and up) has the same. Any other quantised matrix becomes ``Q8_0``, whose error is small beside its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from snapshots.block_types import BLOCK_TYPES
from worker.build.errors import BuildError, MalformedModelError
from worker.build.source import ByteArray, ModelSource, SourceTensor

#: What blocks become that are not kept.
OTHERWISE: Final = "Q8_0"
#: Where the float16 numbers of a block are, byte offsets: all that can make its weights infinite or no numbers.
_HALVES: Final = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def require_blocks(source: ModelSource) -> None:
    """Check that there are blocks to keep.

    Raises:
        BuildError: no matrix of ``source`` is quantised.
    """
    if not any(tensor.quantised for tensor in source.tensors):
        raise BuildError(
            "--quantize gguf keeps the blocks of a quantised .gguf file, and this source has none: leave the option "
            "out (bf16), or take int8, fp8 or int4"
        )


def choose_block_type(tensor: SourceTensor) -> str:
    """The block type to store ``tensor`` in; empty: its file does not quantise it either."""
    if tensor.quantised is None:
        return ""
    (first, *others) = tensor.quantised.types
    return first if not others and first in BLOCK_TYPES else OTHERWISE


def read_block_rows(tensor: SourceTensor) -> Iterator[ByteArray]:
    """Consecutive rows ``[rows, bytes of a row]`` of the type that :func:`choose_block_type` says.

    Raises:
        MalformedModelError: a weight is not finite.
    """
    block_type = choose_block_type(tensor)
    if tensor.quantised is not None and tensor.quantised.types == {block_type}:
        for rows in tensor.quantised.row_blocks():
            _require_finite(tensor, all(_is_finite(rows, block_type, start) for start in _HALVES[block_type]))
            yield rows
        return
    for values in tensor.row_blocks():
        _require_finite(tensor, bool(np.isfinite(values).all()))
        yield quantize(values, GGMLQuantizationType[block_type])


def _is_finite(rows: ByteArray, block_type: str, start: int) -> bool:
    blocks = rows.reshape(-1, BLOCK_TYPES[block_type].num_bytes)
    return bool(np.isfinite(np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")).all())


def _require_finite(tensor: SourceTensor, is_finite: bool) -> None:
    if not is_finite:
        raise MalformedModelError(f"tensor {tensor.name} holds values that are infinite or not a number")
