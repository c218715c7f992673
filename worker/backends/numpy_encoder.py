"""Encoders on the reference backend: float32 NumPy, one plain function an operation; see numpy_reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from guests.abi import Opcode
from guests.program import Operation
from worker.backends.encoder_protocol import TokenSpan
from worker.backends.protocol import FloatArray


class StepValues(Protocol):
    """What these operations read and write of a step."""

    positions: npt.NDArray[np.float32]  # [T]
    spans: list[TokenSpan]
    values: list[FloatArray]


_erf = np.frompyfunc(math.erf, 1, 1)


def _layer_norm(operation: Operation, tensors: list[FloatArray], step: StepValues) -> None:
    rows = step.values[operation.inputs[0]]
    centred = rows - rows.mean(axis=-1, keepdims=True, dtype=np.float32)
    variance = np.mean(centred * centred, axis=-1, keepdims=True, dtype=np.float32)
    step.values[operation.out] = centred / np.sqrt(variance + np.float32(operation.floats[0])) * tensors[0] + tensors[1]


def _gelu(operation: Operation, _tensors: list[FloatArray], step: StepValues) -> None:
    """Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, the exact form."""
    rows = step.values[operation.inputs[0]]
    error_function = _erf(rows / np.float32(math.sqrt(2))).astype(np.float32)
    step.values[operation.out] = rows * (1 + error_function) / 2


def _position_embed(operation: Operation, tensors: list[FloatArray], step: StepValues) -> None:
    step.values[operation.out] = tensors[0][step.positions.astype(np.int64)]  # [T, D]


def _encoder_attention(operation: Operation, _tensors: list[FloatArray], step: StepValues) -> None:
    num_heads, head_dim = operation.ints[:2]
    rows = step.values[operation.inputs[0]]
    queries, keys, values = rows.reshape(len(rows), 3, num_heads, head_dim).transpose(1, 2, 0, 3)  # each [H, T, Dh]
    result = np.empty((len(rows), num_heads, head_dim), np.float32)
    for first, num_tokens in step.spans:
        own = slice(first, first + num_tokens)
        for head in range(num_heads):
            scores = queries[head, own] @ keys[head, own].T * np.float32(operation.floats[0])
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            result[own, head] = weights @ values[head, own]
    step.values[operation.out] = result.reshape(len(rows), num_heads * head_dim)


def _mean_pool(operation: Operation, _tensors: list[FloatArray], step: StepValues) -> None:
    rows = step.values[operation.inputs[0]]
    means = [rows[first : first + num_tokens].mean(axis=0, dtype=np.float32) for first, num_tokens in step.spans]
    step.values[operation.out] = np.array(means, np.float32)  # [S, D]


def _l2_normalise(operation: Operation, _tensors: list[FloatArray], step: StepValues) -> None:
    rows = step.values[operation.inputs[0]]
    lengths: FloatArray = np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True, dtype=np.float32))
    step.values[operation.out] = np.divide(rows, np.maximum(lengths, operation.floats[0]), dtype=np.float32)


#: Operations that encoders brought with them; all but attention and pooling serve other programs as well.
ENCODER_FUNCTIONS: Mapping[Opcode, Callable[[Operation, list[FloatArray], StepValues], None]] = {
    Opcode.LAYER_NORM: _layer_norm,
    Opcode.GELU: _gelu,
    Opcode.POSITION_EMBED: _position_embed,
    Opcode.ENCODER_ATTENTION: _encoder_attention,
    Opcode.MEAN_POOL: _mean_pool,
    Opcode.L2_NORMALISE: _l2_normalise,
}
