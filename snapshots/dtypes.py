"""NumPy types of the tensor types that a snapshot may hold one number after the other."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

from snapshots.block_types import BLOCK_TYPES, byte_shape

NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
}


def array_type(dtype: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """NumPy's type and shape of a tensor's bytes: those of a matrix in blocks are uint8 ``[N, bytes of a row]``.

    Raises:
        KeyError: an unknown type.
    """
    if dtype in BLOCK_TYPES:
        return NUMPY_DTYPES["U8"], byte_shape(dtype, shape)
    return NUMPY_DTYPES[dtype], shape
