"""Elementwise operations of the CPU backend, bound to the buffers of one step shape.

Each ``bind_`` function returns a call without arguments that allocates nothing. Arrays are feature-major
``[width, T]``; one token (decode at batch 1) has its own, shorter forms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from worker.backends.cpu_buffers import transpose_into
from worker.backends.protocol import BackendError, FloatArray, WeightTensor

Call = Callable[[], None]

#: Elements that an elementwise chain works on at a time: its arrays then stay in the core's own cache.
_BLOCK_ELEMENTS: Final = 65_536


def bind_embed(table: WeightTensor, token_ids: npt.NDArray[np.int64], out: FloatArray) -> Call:
    """``out[D, T]`` = rows of ``table`` ``[V, D]`` at ``token_ids`` ``[T]``, read at the time of the call."""
    data = table.data
    rows = np.empty((len(token_ids), data.shape[1]), data.dtype)

    if data.dtype == np.float32:

        def embed_float32() -> None:
            data.take(token_ids, 0, rows, "clip")
            transpose_into(out, rows)

        return embed_float32

    if data.dtype == ml_dtypes.bfloat16:
        data_bits, row_bits, out_bits = data.view(np.uint16), rows.view(np.uint16), out.view(np.uint32)

        def embed_bfloat16() -> None:
            data_bits.take(token_ids, 0, row_bits, "clip")
            transpose_into(out_bits, row_bits)
            np.left_shift(out_bits, 16, out_bits)  # bf16 is the upper half of float32

        return embed_bfloat16

    if data.dtype == np.int8 and table.scale is not None:
        scale = table.scale

        def embed_int8() -> None:
            data.take(token_ids, 0, rows, "clip")
            transpose_into(out, rows)
            np.multiply(out, scale.take(token_ids), out)

        return embed_int8
    raise BackendError(
        f"{table.name}: {table.block_type or data.dtype} cannot be an embedding table of this backend: build the "
        "snapshot with --quantize int8, or serve it on a GPU (GLOWPLUG_BACKEND=cuda)"
    )


@functools.cache
def _ones(width: int) -> FloatArray:
    """``[1, width]``, the same for all norms of all steps."""
    return np.ones((1, width), np.float32)


def bind_rms_norm(source: FloatArray, weight: FloatArray, epsilon: float, out: FloatArray, factors: FloatArray) -> Call:
    """RMS norm of each column of ``source`` ``[D, T]``; ``out`` is another buffer, ``factors`` ``[1, T]`` scratch."""
    width, num_tokens = source.shape
    if num_tokens == 1:
        vector, result = source[:, 0], out[:, 0]

        def normalise_one() -> None:
            mean_square = float(np.dot(vector, vector)) / width
            np.multiply(vector, (mean_square + epsilon) ** -0.5, result)
            np.multiply(result, weight, result)

        return normalise_one

    column_weight = weight[:, None]
    ones = _ones(width)

    def normalise() -> None:
        np.multiply(source, source, out)
        np.matmul(ones, out, factors)  # sums over the columns; BLAS is faster at it than a reduction
        _invert_root_mean(factors, width, epsilon)
        np.multiply(source, factors, out)
        np.multiply(out, column_weight, out)

    return normalise


def bind_head_rms_norm(heads: FloatArray, weight: FloatArray, epsilon: float, scratch: FloatArray) -> Call:
    """RMS norm, in place, of each head in ``heads`` ``[H, Dh, T]``; ``scratch`` is as large."""
    num_heads, head_dim, num_tokens = heads.shape
    squares = scratch
    factors = np.empty((num_heads, 1, num_tokens), np.float32)
    column_weight = weight[:, None]

    def normalise() -> None:
        np.multiply(heads, heads, squares)
        np.add.reduce(squares, 1, out=factors, keepdims=True)
        _invert_root_mean(factors, head_dim, epsilon)
        np.multiply(heads, factors, heads)
        np.multiply(heads, column_weight, heads)

    return normalise


def _invert_root_mean(sums: FloatArray, count: int, epsilon: float) -> None:
    """In place: ``1 / sqrt(sums / count + epsilon)``."""
    np.multiply(sums, 1.0 / count, sums)
    np.add(sums, epsilon, sums)
    np.sqrt(sums, sums)
    np.reciprocal(sums, sums)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosines and signed sines of the step's positions, ``[2, half, T]``; ``update`` computes them for a step."""

    cosines: FloatArray
    sines: FloatArray
    update: Call


def make_rope_table(inverse_frequencies: FloatArray, scale: float, positions: FloatArray) -> RopeTable:
    """Table for ``positions`` ``[T]``, read at each update.

    Row 0 of ``sines`` is negative: half-split rotation is then ``x * cosines + swap_halves(x) * sines``.
    """
    half, num_tokens = len(inverse_frequencies), len(positions)
    frequencies = inverse_frequencies[:, None]
    angles = np.empty((half, num_tokens), np.float32)
    cosines = np.empty((2, half, num_tokens), np.float32)
    sines = np.empty((2, half, num_tokens), np.float32)

    def update() -> None:
        np.multiply(frequencies, positions, angles)
        np.cos(angles, cosines[0])
        np.sin(angles, sines[1])
        if scale != 1:
            np.multiply(cosines[0], scale, cosines[0])
            np.multiply(sines[1], scale, sines[1])
        cosines[1] = cosines[0]
        np.negative(sines[1], sines[0])

    return RopeTable(cosines, sines, update)


def bind_rope(heads: FloatArray, table: RopeTable, scratch: FloatArray) -> Call:
    """Rotate ``heads`` ``[H, Dh, T]`` in place; ``scratch`` is as large."""
    num_heads, head_dim, num_tokens = heads.shape
    halves = heads.reshape(num_heads, 2, head_dim // 2, num_tokens)
    swapped = halves[:, ::-1]
    products = scratch.reshape(halves.shape)
    cosines, sines = table.cosines, table.sines

    def rotate() -> None:
        np.multiply(swapped, sines, products)
        np.multiply(halves, cosines, halves)
        np.add(halves, products, halves)

    return rotate


def bind_silu_mul(source: FloatArray, out: FloatArray) -> Call:
    """``out[F, T] = silu(source[:F]) * source[F:]``, in blocks of rows that stay in cache."""
    width, num_tokens = out.shape
    block_rows = max(1, _BLOCK_ELEMENTS // num_tokens)
    blocks: list[tuple[Any, Any, Any]] = [
        (
            source[begin : min(begin + block_rows, width)],
            source[width + begin : width + min(begin + block_rows, width)],
            out[begin : min(begin + block_rows, width)],
        )
        for begin in range(0, width, block_rows)
    ]

    def activate() -> None:
        for gate, up, result in blocks:
            np.negative(gate, result)
            np.exp(result, result)  # infinite for very negative gates: the quotient is then rightly 0
            np.add(result, 1.0, result)
            np.divide(gate, result, result)
            np.multiply(result, up, result)

    return activate


def bind_add(left: FloatArray, right: FloatArray, out: FloatArray) -> Call:
    """``out = left + right``; ``out`` may be one of them."""

    def add() -> None:
        np.add(left, right, out)

    return add


def bind_bias(out: FloatArray, bias: FloatArray) -> Call:
    """Add ``bias`` ``[N]`` to each column of ``out`` ``[N, T]``."""
    column = bias[:, None]

    def add_bias() -> None:
        np.add(out, column, out)

    return add_bias
