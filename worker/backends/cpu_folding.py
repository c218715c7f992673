"""Products of few rows, folded: fewer and longer rows of the weight for more columns of the activation.

A weight ``[N, K]`` lies in memory as ``[N / F, F * K]`` does, ``F`` of its rows one after the other. Multiplied with
``F`` copies of an activation, each beside zeros in its own ``K`` columns, that gives ``[N / F, F]``, which lies in
memory as ``[N, 1]`` does: the same product (zeros add nothing). A matrix unit that computes 16 columns for the price of
one does the rest for nothing, and reads the weight in longer stretches: 64 bytes of each of 16 rows at a time, which
the processor fetches ahead well only where each row has pages of its own.
"""

from __future__ import annotations

from typing import Any, Final

import numkong
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from worker.backends.cpu_buffers import TILE_ROWS, wrap_array

_dots_pack: Final[Any] = numkong.dots_pack

#: Whether 16 columns cost what one does.
HAS_TILES: Final = bool(numkong.get_capabilities().get("sapphireamx"))
#: Rows longer than this gain nothing more, and packing the zeros costs.
_LONG_ROW_BYTES: Final = 5 * 1024
#: Of a weight this large packing costs next to nothing, and a little more is gained by yet longer rows.
_LARGE_WEIGHT_BYTES: Final = 8 * 1024 * 1024
_LONGEST_ROW_BYTES: Final = 10 * 1024
#: Fewer rows leave a thread with too few whole tiles.
_MIN_ROWS_PER_THREAD: Final = 48


def choose_fold(weight: npt.NDArray[Any], num_rows: int, max_threads: int) -> int:
    """How many rows of ``weight`` ``[N, K]`` to take as one, for an activation of ``num_rows`` rows; a power of two."""
    if not HAS_TILES:
        return 1
    num_outputs, width = weight.shape
    longest = _LONGEST_ROW_BYTES if weight.nbytes >= _LARGE_WEIGHT_BYTES else _LONG_ROW_BYTES
    fold = 1
    while (
        num_outputs % (2 * fold) == 0
        and 2 * fold * num_rows <= TILE_ROWS
        and 2 * fold * width * weight.itemsize <= longest
        and num_outputs >= 2 * fold * _MIN_ROWS_PER_THREAD * max_threads
    ):
        fold *= 2
    return fold


def fold_weight(weight: npt.NDArray[Any], fold: int) -> npt.NDArray[Any]:
    """``weight`` ``[N, K]`` as ``[N / fold, fold * K]``, where it lies."""
    num_outputs, width = weight.shape
    return weight.reshape(num_outputs // fold, fold * width)


class FoldedRows:
    """``rows`` ``[R, K]`` of an activation, to be written by the owner, and what packs them for a folded weight."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any], fold: int) -> None:
        num_rows, width = shape
        self.rows: npt.NDArray[Any] = np.empty(shape, dtype)
        self._source = wrap_array(self.rows)
        self._is_folded = fold > 1
        if fold == 1:
            return
        bits = np.dtype(f"u{dtype.itemsize}")
        spread = np.zeros((fold * num_rows, fold * width), bits)
        row_bytes = spread.strides[0]
        strides = (num_rows * row_bytes + width * bits.itemsize, row_bytes, bits.itemsize)
        self._diagonal = as_strided(spread, (fold, num_rows, width), strides)
        self._row_bits = self.rows.view(bits)
        self._source = wrap_array(spread.view(dtype))

    def pack(self) -> Any:
        """What ``rows`` hold now, as NumKong's right operand."""
        if self._is_folded:
            np.copyto(self._diagonal, self._row_bits)
        return _dots_pack(self._source)
