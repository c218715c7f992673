"""Matrix products of the CPU backend over weights where they lie in mapped memory.

NumKong's ``dots_packed(A, pack(B))`` is ``A @ B.T``. The weight is the left, unpacked operand: no copy of it is ever
made; what is packed is the small activation. bf16 weights take activations rounded to bf16 and accumulate in
float32; int8 weights take activations quantised to int8 with one scale a token and accumulate in int32; float32
weights go to BLAS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import ml_dtypes
import numkong
import numpy as np
import numpy.typing as npt

from worker.backends.cpu_buffers import transpose_into
from worker.backends.protocol import BackendError, FloatArray, WeightTensor

Call = Callable[[], None]

# Any: the stub of dots_packed lacks ``threads``, that of from_pointer wants literal dtype names.
_dots_packed: Final[Any] = numkong.dots_packed
_dots_pack: Final[Any] = numkong.dots_pack
_astype: Final[Any] = numkong.astype

_from_pointer: Final[Any] = numkong.from_pointer
_INT8_MAX: Final = 127.0


def wrap_array(array: npt.NDArray[Any]) -> Any:
    """A NumKong tensor over the memory of a contiguous ``array``, which it keeps alive."""
    return _from_pointer(array.ctypes.data, array.shape, array.dtype.name, owner=array)


class Operand(Protocol):
    """An activation prepared for products with one kind of weight; see :func:`make_operand`."""

    def stage(self) -> None:
        """Prepare what the producing operation wrote."""


class LinearWeight(Protocol):
    """A bound weight ``[N, K]``."""

    def make_operand(self, source: FloatArray, *, is_token_major: bool) -> Operand:
        """An operand over ``source`` (``[K, T]``, or ``[T, K]`` if token-major)."""

    def bind(self, operand: Any, out: FloatArray) -> Call:
        """A call that writes the product with the staged ``operand`` to ``out`` ``[N, T]``."""


def bind_weight(tensor: WeightTensor, num_threads: int) -> LinearWeight:
    """The product with ``tensor``, by its dtype.

    Raises:
        BackendError: a dtype or memory layout that cannot be used in place.
    """
    data = tensor.data
    if not data.flags.c_contiguous:
        raise BackendError(f"{tensor.name}: the weight's rows must lie one after the other")
    if data.dtype == ml_dtypes.bfloat16:
        return _Bfloat16Weight(data, num_threads)
    if data.dtype == np.int8:
        if tensor.scale is None or tensor.scale.shape != (data.shape[0],):
            raise BackendError(f"{tensor.name}: int8 weights need one float32 scale for each output channel")
        return _Int8Weight(data, tensor.scale, num_threads)
    if data.dtype == np.float32:
        return _Float32Weight(data)
    raise BackendError(f"{tensor.name}: dtype {data.dtype} (this backend runs bfloat16, int8 and float32)")


class _Float32Operand:
    def __init__(self, source: FloatArray, *, is_token_major: bool) -> None:
        self.columns = source.T if is_token_major else source  # [K, T]

    def stage(self) -> None:
        """Nothing to prepare."""


class _Float32Weight:
    def __init__(self, data: FloatArray) -> None:
        self._data = data

    def make_operand(self, source: FloatArray, *, is_token_major: bool) -> Operand:
        return _Float32Operand(source, is_token_major=is_token_major)

    def bind(self, operand: Any, out: FloatArray) -> Call:
        data, columns = self._data, operand.columns

        def multiply() -> None:
            np.matmul(data, columns, out)

        return multiply


class _Bfloat16Rows:
    """Token-major float32 activations ``[T, K]``, rounded to bf16 and packed."""

    def __init__(self, source: FloatArray) -> None:
        self.packed: Any = None
        self._source = wrap_array(source)
        self._rounded = wrap_array(np.empty(source.shape, ml_dtypes.bfloat16))

    def stage(self) -> None:
        """Round and pack what the source holds now."""
        _astype(self._source, "bfloat16", out=self._rounded)
        self.packed = _dots_pack(self._rounded)


class _Bfloat16Columns:
    """Feature-major float32 activations ``[K, T]``, rounded to bf16, transposed and packed."""

    def __init__(self, source: FloatArray) -> None:
        columns = np.empty(source.shape, ml_dtypes.bfloat16)
        rows = np.empty(source.shape[::-1], ml_dtypes.bfloat16)
        self.packed: Any = None
        self._source = wrap_array(source)
        self._columns = wrap_array(columns)
        self._rows = wrap_array(rows)
        self._column_bits = columns.view(np.uint16)
        self._row_bits = rows.view(np.uint16)

    def stage(self) -> None:
        """Round, transpose and pack what the source holds now."""
        _astype(self._source, "bfloat16", out=self._columns)
        transpose_into(self._row_bits, self._column_bits)
        self.packed = _dots_pack(self._rows)


class _Bfloat16Weight:
    def __init__(self, data: npt.NDArray[Any], num_threads: int) -> None:
        self._tensor = wrap_array(data)
        self._num_threads = num_threads

    def make_operand(self, source: FloatArray, *, is_token_major: bool) -> Operand:
        if is_token_major:
            return _Bfloat16Rows(source)
        if source.shape[1] == 1:  # one token: both layouts are the same memory
            return _Bfloat16Rows(source.reshape(1, -1))
        return _Bfloat16Columns(source)

    def bind(self, operand: Any, out: FloatArray) -> Call:
        tensor, out_tensor, num_threads = self._tensor, wrap_array(out), self._num_threads

        def multiply() -> None:
            _dots_packed(tensor, operand.packed, out=out_tensor, threads=num_threads)

        return multiply


class _Int8Operand:
    """Quantises each token to int8, symmetric, by its largest magnitude, and packs."""

    def __init__(self, source: FloatArray, *, is_token_major: bool) -> None:
        self._rows = source if is_token_major else source.T  # [T, K]
        num_tokens, width = self._rows.shape
        self.packed: Any = None
        self.scales = np.empty(num_tokens, np.float32)  # a token's value = quantised * scale
        self._scaled = np.empty((num_tokens, width), np.float32)
        self._scaled_tensor = wrap_array(self._scaled)
        self._quantised_tensor = wrap_array(np.empty((num_tokens, width), np.int8))
        self._factors = np.empty((num_tokens, 1), np.float32)

    def stage(self) -> None:
        """Quantise what the source holds now."""
        scaled, scales, factors = self._scaled, self.scales, self._factors
        np.abs(self._rows, scaled)
        np.maximum.reduce(scaled, 1, out=scales)
        np.maximum(scales, 1e-30, scales)  # a token of zeros stays zeros
        np.divide(_INT8_MAX, scales, factors[:, 0])
        np.multiply(scales, 1 / _INT8_MAX, scales)
        np.multiply(self._rows, factors, scaled)
        _astype(self._scaled_tensor, "int8", out=self._quantised_tensor)  # rounds half to even
        self.packed = _dots_pack(self._quantised_tensor)


class _Int8Weight:
    def __init__(self, data: npt.NDArray[np.int8], scale: FloatArray, num_threads: int) -> None:
        self._tensor = wrap_array(data)
        self._scale = np.ascontiguousarray(scale, np.float32)[:, None]  # [N, 1]
        self._num_threads = num_threads

    def make_operand(self, source: FloatArray, *, is_token_major: bool) -> Operand:
        return _Int8Operand(source, is_token_major=is_token_major)

    def bind(self, operand: Any, out: FloatArray) -> Call:
        tensor, num_threads, weight_scale = self._tensor, self._num_threads, self._scale
        # The accumulators share the memory of the result: both are four bytes an element.
        accumulators = out.view(np.int32)
        accumulator_tensor, token_scales = wrap_array(accumulators), operand.scales

        def multiply() -> None:
            _dots_packed(tensor, operand.packed, out=accumulator_tensor, threads=num_threads)
            np.copyto(out, accumulators, casting="unsafe")
            np.multiply(out, weight_scale, out)
            np.multiply(out, token_scales, out)

        return multiply
