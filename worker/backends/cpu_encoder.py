"""Operations that encoders bring to the CPU backend, bound to the buffers of one step shape; see cpu_operations.

Arrays are feature-major ``[width, T]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from worker.backends.encoder_protocol import TokenSpan
from worker.backends.protocol import FloatArray

Call = Callable[[], None]

#: Elements that an elementwise chain works on at a time: its arrays then stay in the core's own cache.
_BLOCK_ELEMENTS: Final = 16_384
#: Attention scores held at once; long sequences take fewer queries a block.
_MAX_SCORES: Final = 4 * 1024 * 1024

# Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erfc(z) = P(t) exp(-z^2) with
# t = 1 / (1 + p z), z >= 0, to within 1.5e-7.
_P: Final = 0.3275911 / math.sqrt(2)  # for z = x / sqrt(2)
_COEFFICIENTS: Final = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def bind_layer_norm(source: FloatArray, weight: FloatArray, bias: FloatArray, epsilon: float, out: FloatArray) -> Call:
    """Layer norm of each column of ``source`` ``[D, T]``; ``out`` is another buffer."""
    width, num_tokens = source.shape
    scale, shift = weight[:, None], bias[:, None]
    averaging = np.full((1, width), 1 / width, np.float32)
    means = np.empty((1, num_tokens), np.float32)
    squares = np.empty(source.shape, np.float32)

    def normalise() -> None:
        np.matmul(averaging, source, means)  # means over the columns; BLAS is faster at it than a reduction
        np.subtract(source, means, out)
        np.multiply(out, out, squares)
        np.matmul(averaging, squares, means)
        np.add(means, epsilon, means)
        np.sqrt(means, means)
        np.divide(out, means, out)
        np.multiply(out, scale, out)
        np.add(out, shift, out)

    return normalise


def bind_gelu(source: FloatArray, out: FloatArray) -> Call:
    """``out = x * Phi(x)``, the exact GELU, as ``max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2``."""
    flat_source, flat_out = source.reshape(-1), out.reshape(-1)
    size = min(_BLOCK_ELEMENTS, flat_source.size)
    magnitude, ratio, tail = (np.empty(size, np.float32) for _ in range(3))
    blocks = [slice(begin, min(begin + size, flat_source.size)) for begin in range(0, flat_source.size, size)]

    def activate() -> None:
        for block in blocks:
            x, result = flat_source[block], flat_out[block]
            a, t, p = magnitude[: len(x)], ratio[: len(x)], tail[: len(x)]
            np.abs(x, a)
            np.multiply(a, _P, t)
            np.add(t, 1.0, t)
            np.reciprocal(t, t)
            np.multiply(t, _COEFFICIENTS[0], p)
            for coefficient in _COEFFICIENTS[1:]:
                np.add(p, coefficient, p)
                np.multiply(p, t, p)
            np.multiply(x, x, t)
            np.multiply(t, -0.5, t)
            np.exp(t, t)
            np.multiply(p, t, p)
            np.multiply(p, a, p)
            np.multiply(p, 0.5, p)
            np.maximum(x, 0.0, out=result)
            np.subtract(result, p, result)

    return activate


def bind_encoder_attention(
    source: FloatArray, out: FloatArray, spans: list[TokenSpan], num_heads: int, score_scale: float
) -> Call:
    """Attention of every token to its own sequence; ``source`` ``[3 * H * Dh, T]`` holds queries, keys, values."""
    num_tokens = out.shape[1]
    queries, keys, values = source.reshape(3, num_heads, -1, num_tokens)  # each [H, Dh, T]
    result = out.reshape(num_heads, -1, num_tokens)

    def attend() -> None:
        for first, length in spans:
            own = slice(first, first + length)
            keys_by_token = keys[:, :, own].transpose(0, 2, 1)  # [H, keys, Dh]
            block_size = max(1, _MAX_SCORES // (num_heads * length))
            for begin in range(first, own.stop, block_size):
                block = slice(begin, min(begin + block_size, own.stop))
                scores = keys_by_token @ queries[:, :, block]  # [H, keys, queries]
                np.multiply(scores, score_scale, scores)
                np.subtract(scores, scores.max(axis=1, keepdims=True), scores)
                np.exp(scores, scores)
                np.divide(scores, scores.sum(axis=1, keepdims=True), scores)
                result[:, :, block] = values[:, :, own] @ scores

    return attend


def bind_l2_normalise(source: FloatArray, smallest_length: float, out: FloatArray) -> Call:
    """Each column of ``source`` ``[D, S]`` divided by its length, or by ``smallest_length`` where it is shorter."""
    lengths = np.empty((1, source.shape[1]), np.float32)

    def normalise() -> None:
        np.multiply(source, source, out)
        np.add.reduce(out, 0, out=lengths, keepdims=True)
        np.sqrt(lengths, lengths)
        np.maximum(lengths, smallest_length, out=lengths)
        np.divide(source, lengths, out)

    return normalise


def mean_pool(source: FloatArray, spans: list[TokenSpan], out: FloatArray) -> None:
    """Column s of ``out`` ``[D, S]`` = mean of the columns of ``source`` ``[D, T]`` that are sequence s."""
    for column, (first, num_tokens) in enumerate(spans):
        np.mean(source[:, first : first + num_tokens], axis=1, out=out[:, column])
