"""Weight formats of a snapshot: bfloat16, float32, int8 and fp8 with a scale for each output channel, int4 with one for
each group of neighbouring weights, and GGUF's blocks as they are in the file."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from worker.build.source import FloatArray

INT8_MAX: Final = 127
FP8_MAX: Final = 448.0  # of e4m3. Source: Micikevicius et al. 2022, arXiv:2209.05433
INT4_GROUP: Final = 32


class WeightFormat(StrEnum):
    """How matrices are stored. Vectors (norms, biases, scales, frequencies) are float32 in every format."""

    BF16 = "bf16"
    F32 = "f32"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"
    GGUF = "gguf"


def round_to_bfloat16(values: FloatArray) -> npt.NDArray[ml_dtypes.bfloat16]:
    """Nearest bfloat16, ties to even. A copy."""
    return values.astype(ml_dtypes.bfloat16)


def quantize_rows(values: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Symmetric int8 of each row (one output channel) with its scale: ``values ~ int8 * scale[:, None]``.

    The scale maps the row's largest magnitude to 127, so the error of an element is at most half a scale. A row
    of zeros gets scale 1. Weight-only: activations are not touched here.

    Returns:
        Quantised rows ``[N, K]`` int8 and scales ``[N]`` float32.
    """
    scale = scale_rows(values)
    quantized = np.rint(values / scale[:, None])
    return np.clip(quantized, -INT8_MAX, INT8_MAX).astype(np.int8), scale


def scale_rows(values: FloatArray) -> FloatArray:
    """The scale ``[N]`` of each row ``[N, K]``: its largest magnitude is 127 of them; 1 for a row of zeros."""
    largest = np.abs(values).max(axis=1)
    return np.where(largest > 0, largest / np.float32(INT8_MAX), np.float32(1)).astype(np.float32)


def quantize_rows_to_fp8(values: FloatArray) -> tuple[npt.NDArray[ml_dtypes.float8_e4m3fn], FloatArray]:
    """fp8 (e4m3, no infinities) of each row with its scale: ``values ~ fp8 * scale[:, None]``.

    The scale maps the row's largest magnitude to 448; a row of zeros gets scale 1.

    Returns:
        Quantised rows ``[N, K]`` and scales ``[N]`` float32.
    """
    largest = np.abs(values).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1)).astype(np.float32)
    scaled = np.clip(values / scale[:, None], -FP8_MAX, FP8_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn), scale


def quantize_groups_to_int4(values: FloatArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """4 bits a weight with a float16 scale for each :data:`INT4_GROUP` neighbours of a row: ``(bits - 8) * scale``.

    The weight of largest magnitude becomes -8, so its sign is the scale's. Source: ``quantize_row_q4_0`` of ggml.
    Requires: the width is a multiple of the group.

    Returns:
        ``[N, K / 2]``, the earlier of two weights in the low half of a byte, and scales ``[N, K / INT4_GROUP]``.
    """
    groups = values.reshape(len(values), -1, INT4_GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)[..., 0]
    limits = np.finfo(np.float16)
    scale = np.clip(largest / np.float32(-8), limits.min, limits.max).astype(np.float16)
    steps = scale.astype(np.float32)
    per_step = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps != 0)
    codes = np.clip(np.rint(groups * per_step[..., None]) + np.float32(8), 0, 15).astype(np.uint8)
    pairs = codes.reshape(len(values), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << np.uint8(4), scale
