"""Weight formats of a snapshot: bfloat16, float32, or int8 with a scale for each output channel."""

from __future__ import annotations

from enum import StrEnum

import ml_dtypes
import numpy as np
import numpy.typing as npt

from worker.build.source import FloatArray

INT8_MAX = 127


class WeightFormat(StrEnum):
    """How matrices are stored. Vectors (norms, biases, scales, frequencies) are float32 in every format."""

    BF16 = "bf16"
    F32 = "f32"
    INT8 = "int8"


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
