"""Activations of the CPU backend: which buffer a program value lives in, and views of it for a number of rows.

Activations are *feature-major*, ``[width, rows]`` float32 and contiguous for the rows of the step, because the
matmul kernel takes the weight ``[N, K]`` as it lies in the file and writes ``[N, rows]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import numkong
import numpy as np
import numpy.typing as npt

from guests.abi import NO_VALUE, Opcode
from guests.program import Program
from worker.backends.program_shapes import Rows, ValueShape
from worker.backends.protocol import FloatArray

#: Up to this many rows are computed as they are; beyond, in whole tiles: the kernels are faster so (AMX on an odd
#: remainder takes 1.4 times as long as on the next multiple), and few shapes need binding.
TILE_ROWS: Final = 16
_MANY_ROWS: Final = 512
_BIG_TILE_ROWS: Final = 128
_TRANSPOSE_COLUMNS: Final = 64

_from_pointer: Final[Any] = numkong.from_pointer  # Any: its stub wants literal dtype names
_astype: Final[Any] = numkong.astype


def pad_rows(num_rows: int) -> int:
    """Rows to compute for ``num_rows`` wanted ones."""
    if num_rows <= TILE_ROWS:
        return num_rows
    tile = TILE_ROWS if num_rows <= _MANY_ROWS else _BIG_TILE_ROWS
    return -(-num_rows // tile) * tile


class RowBuffers:
    """Flat float32 buffers of fixed widths, grown to the most rows seen and cut into contiguous views."""

    def __init__(self, widths: list[int]) -> None:
        self._widths = widths
        self._capacity_rows = 0
        self._flat: list[FloatArray] = []

    def ensure_rows(self, num_rows: int) -> bool:
        """Make room for ``num_rows``; True if the buffers moved, so that views of them are stale."""
        if num_rows <= self._capacity_rows:
            return False
        self._capacity_rows = 1 << (num_rows - 1).bit_length()
        self._flat = [np.zeros(width * self._capacity_rows, np.float32) for width in self._widths]
        return True

    def view(self, buffer: int, num_rows: int) -> FloatArray:
        """View ``[width, num_rows]``."""
        width = self._widths[buffer]
        return self._flat[buffer][: width * num_rows].reshape(width, num_rows)


def assign_buffers(program: Program, shapes: Mapping[int, ValueShape], rows: Rows) -> tuple[dict[int, int], list[int]]:
    """Buffer number of every value with ``rows``, and the buffers' widths.

    A buffer is reused after the last use of its value. ADD may write over an input that dies with it; every other
    operation gets a buffer that none of its inputs lives in.
    """
    last_use: dict[int, int] = {}
    for index, operation in enumerate(program.operations):
        for value in (*operation.inputs, operation.out):
            last_use[value] = index
    buffer_of: dict[int, int] = {}
    widths: list[int] = []
    free: list[int] = []
    for index, operation in enumerate(program.operations):
        dying = {
            buffer_of[value]
            for value in operation.inputs
            if value in buffer_of and last_use[value] == index and value != operation.out
        }
        if operation.opcode is Opcode.ADD:
            free += dying
        out = operation.out
        if out != NO_VALUE and out not in buffer_of and shapes[out].rows is rows:
            width = shapes[out].width
            found = next((buffer for buffer in free if widths[buffer] == width), None)
            if found is None:
                found = len(widths)
                widths.append(width)
            else:
                free.remove(found)
            buffer_of[out] = found
        if operation.opcode is not Opcode.ADD:
            free += dying
    return buffer_of, widths


def transpose_into(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """``target`` = ``source.T``, in column blocks, which keeps both sides in cache."""
    num_columns = target.shape[1]
    if target.shape[0] <= TILE_ROWS * 4 and num_columns <= 2048:
        np.copyto(target, source.T)
        return
    for begin in range(0, num_columns, _TRANSPOSE_COLUMNS):
        end = begin + _TRANSPOSE_COLUMNS
        np.copyto(target[:, begin:end], source[begin:end].T)


def round_into(target: npt.NDArray[Any], source: FloatArray) -> npt.NDArray[Any]:
    """``target``, contiguous, with ``source`` rounded to bf16."""
    _astype(wrap_array(np.ascontiguousarray(source)), "bfloat16", out=wrap_array(target))
    return target


class TensorMemo:
    """NumKong tensors over arrays, one for each memory and shape: one takes 1 KiB, and products share results."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, tuple[int, ...], str], Any] = {}

    def wrap(self, array: npt.NDArray[Any]) -> Any:
        """As :func:`wrap_array`."""
        key = (array.ctypes.data, array.shape, array.dtype.str)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = wrap_array(array)
        return found


def wrap_array(array: npt.NDArray[Any]) -> Any:
    """A NumKong tensor over the memory of a contiguous ``array``, which it keeps alive."""
    return _from_pointer(array.ctypes.data, array.shape, _name_dtype(array.dtype), owner=array)


@cache
def _name_dtype(dtype: np.dtype[Any]) -> str:
    return dtype.name  # NumPy puts the name together anew each time
