"""Rounding to int8 in which the weights of a row make up for each other's errors, weighed by what the model reads.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323: columns are rounded one after the other, and each error is spread over the columns still to come so
that the product with typical activations changes least. The scale of a row stays what plain rounding would take, so
the result is read by the same kernel.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.build.quantize import INT8_MAX, scale_rows
from worker.build.source import FloatArray

#: Added to the diagonal, of its mean: what the calibration never showed must not be rounded at will.
_DAMPING: Final = 0.01
#: Columns whose errors are spread among themselves first, then over all the others in one product.
_BLOCK_COLUMNS: Final = 32
#: Rows that one thread works on at a time: a block of columns of theirs stays in the core's cache.
_CHUNK_ROWS: Final = 2048


def quantize_with_feedback(
    values: FloatArray, second_moments: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Symmetric int8 of ``values`` ``[N, K]`` for activations x with ``second_moments`` ``[K, K]``, sums of x x^T.

    Columns are taken by falling activation, so that the heaviest are rounded nearest. Blocks, on two threads at most;
    O(N K^2 + K^3).

    Returns:
        Quantised rows ``[N, K]`` int8 and scales ``[N]`` float32, as :func:`~worker.build.quantize.quantize_rows`.
    """
    scale = scale_rows(values)
    order = np.argsort(-np.diagonal(second_moments), kind="stable")
    spread = _error_spread(second_moments[np.ix_(order, order)])
    quantized = np.empty(values.shape, np.int8)
    chunks = [slice(first, first + _CHUNK_ROWS) for first in range(0, len(values), _CHUNK_ROWS)]

    def quantize_chunk(rows: slice) -> None:
        columns = np.ascontiguousarray(values[rows].T[order])
        rounded = np.empty((columns.shape[1], len(order)), np.int8)
        rounded[:, order] = _round_columns(columns, scale[rows], spread).T
        quantized[rows] = rounded

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1), thread_name_prefix="quantize") as executor:
        list(executor.map(quantize_chunk, chunks))
    return quantized, scale


def _error_spread(second_moments: npt.NDArray[np.floating]) -> FloatArray:
    """Upper triangular ``[K, K]``: row i says how the error of column i goes to those behind it (by its diagonal).

    It is the upper Cholesky factor of the inverse, by way of the factor of the matrix read backwards.
    """
    damped = second_moments.astype(np.float64)
    mean = float(np.diagonal(damped).mean())
    damped[np.diag_indices(len(damped))] += _DAMPING * mean if mean > 0 else 1.0
    backwards = np.linalg.cholesky(damped[::-1, ::-1])
    spread: FloatArray = np.linalg.inv(backwards[::-1, ::-1]).astype(np.float32)
    return spread


def _round_columns(columns: FloatArray, scale: FloatArray, spread: FloatArray) -> npt.NDArray[np.int8]:
    """``[K, rows]``: ``columns`` ``[K, rows]`` rounded; they are overwritten with what the errors made of them."""
    num_columns = len(columns)
    rounded = np.empty(columns.shape, np.int8)
    steps = np.empty(columns.shape[1], np.float32)
    per_step = np.float32(1) / scale
    for begin in range(0, num_columns, _BLOCK_COLUMNS):
        end = min(begin + _BLOCK_COLUMNS, num_columns)
        errors = np.empty((end - begin, columns.shape[1]), np.float32)
        for column in range(begin, end):
            np.multiply(columns[column], per_step, steps)
            np.rint(steps, steps)
            np.clip(steps, -INT8_MAX, INT8_MAX, steps)
            rounded[column] = steps
            error = errors[column - begin]
            np.multiply(steps, scale, error)
            np.subtract(columns[column], error, error)
            np.divide(error, spread[column, column], error)
            if column + 1 < end:
                columns[column + 1 : end] -= spread[column, column + 1 : end, None] * error
        if end < num_columns:
            columns[end:] -= spread[begin:end, end:].T @ errors
    return rounded
