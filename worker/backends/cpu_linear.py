"""Matrix products of the CPU backend over weights where they lie in mapped memory.

NumKong's ``dots_packed(A, pack(B))`` is ``A @ B.T``. The weight is the left, unpacked operand: no copy of it is ever
made; what is packed is the small activation. bf16 weights take activations rounded to bf16 and accumulate in
float32; int8 weights take activations quantised for each token and accumulate in int32; float32 weights go to BLAS.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import ml_dtypes
import numkong
import numpy as np
import numpy.typing as npt

from worker.backends.cpu_buffers import transpose_into
from worker.backends.protocol import BackendError, FloatArray, WeightTensor
from worker.backends.thread_governor import ThreadGovernor, compute_stall_ns

Call = Callable[[], None]

# Any: the stub of dots_packed lacks ``threads``, that of from_pointer wants literal dtype names.
_dots_packed: Final[Any] = numkong.dots_packed
_dots_pack: Final[Any] = numkong.dots_pack
_astype: Final[Any] = numkong.astype

_from_pointer: Final[Any] = numkong.from_pointer
_clock_ns: Final = time.perf_counter_ns
_INT8_MAX: Final = 127.0
_FINE_STEPS: Final = 254.0  # a coarse step's remainder lies in [-0.5, 0.5]
_TINY: Final = 1e-30


def wrap_array(array: npt.NDArray[Any]) -> Any:
    """A NumKong tensor over the memory of a contiguous ``array``, which it keeps alive."""
    return _from_pointer(array.ctypes.data, array.shape, array.dtype.name, owner=array)


class Operand(Protocol):
    """An activation prepared for products with one kind of weight; see :func:`make_operand`."""

    def stage(self) -> None:
        """Prepare what the producing operation wrote."""


class LinearWeight(Protocol):
    """A bound weight ``[N, K]``."""

    def make_operand(self, source: FloatArray) -> Operand:
        """An operand over ``source`` ``[K, T]``."""

    def bind(self, operand: Any, out: FloatArray) -> Call:
        """A call that writes the product with the staged ``operand`` to ``out`` ``[N, T]``."""


def bind_weight(tensor: WeightTensor, governor: ThreadGovernor) -> LinearWeight:
    """The product with ``tensor``, by its dtype.

    Raises:
        BackendError: a dtype or memory layout that cannot be used in place.
    """
    data = tensor.data
    if not data.flags.c_contiguous:
        raise BackendError(f"{tensor.name}: the weight's rows must lie one after the other")
    if data.dtype == ml_dtypes.bfloat16:
        return _Bfloat16Weight(data, governor)
    if data.dtype == np.int8:
        if tensor.scale is None or tensor.scale.shape != (data.shape[0],):
            raise BackendError(f"{tensor.name}: int8 weights need one float32 scale for each output channel")
        return _Int8Weight(data, tensor.scale, governor)
    if data.dtype == np.float32:
        return _Float32Weight(data)
    raise BackendError(f"{tensor.name}: dtype {data.dtype} (this backend runs bfloat16, int8 and float32)")


def _bind_product(weight: Any, operand: Any, out: Any, governor: ThreadGovernor) -> Call:
    """``out`` = ``weight`` times the packed operand (NumKong tensors), timed for the governor."""
    stall_ns = compute_stall_ns(weight.nbytes, out.shape[1])

    def multiply() -> None:
        begin_ns = _clock_ns()
        _dots_packed(weight, operand.packed, out=out, threads=governor.num_threads)
        governor.observe(_clock_ns() - begin_ns, stall_ns)

    return multiply


class _Float32Operand:
    def __init__(self, source: FloatArray) -> None:
        self.columns = source  # [K, T]

    def stage(self) -> None:
        """Nothing to prepare."""


class _Float32Weight:
    def __init__(self, data: FloatArray) -> None:
        self._data = data

    def make_operand(self, source: FloatArray) -> Operand:
        return _Float32Operand(source)

    def bind(self, operand: Any, out: FloatArray) -> Call:
        data, columns = self._data, operand.columns

        def multiply() -> None:
            np.matmul(data, columns, out)

        return multiply


class _Bfloat16Row:
    """Float32 activations of one token, ``[1, K]``, rounded to bf16 and packed."""

    def __init__(self, source: FloatArray) -> None:
        self.packed: Any = None
        self._source = wrap_array(source)
        self._rounded = wrap_array(np.empty(source.shape, ml_dtypes.bfloat16))

    def stage(self) -> None:
        """Round and pack what the source holds now."""
        _astype(self._source, "bfloat16", out=self._rounded)
        self.packed = _dots_pack(self._rounded)


class _Bfloat16Columns:
    """Float32 activations ``[K, T]`` of several tokens, rounded to bf16, transposed and packed."""

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
    def __init__(self, data: npt.NDArray[Any], governor: ThreadGovernor) -> None:
        self._tensor = wrap_array(data)
        self._governor = governor

    def make_operand(self, source: FloatArray) -> Operand:
        if source.shape[1] == 1:  # one token: both layouts are the same memory
            return _Bfloat16Row(source.reshape(1, -1))
        return _Bfloat16Columns(source)

    def bind(self, operand: Any, out: FloatArray) -> Call:
        return _bind_product(self._tensor, operand, wrap_array(out), self._governor)


class _Int8Operand:
    """Activations as two int8 numbers each: a coarse one, and one for what the coarse one leaves.

    Both parts of every token are rows of one packed matrix, so a single product serves them, and at few tokens the
    second costs nothing (the weight is what takes the time). With one part alone the activations' outliers take the
    resolution of all others: on SmolLM2-135M top-5 log-probabilities were then off by 0.31 on average; with two by
    0.11, which is what the int8 weights themselves cost.
    """

    def __init__(self, source: FloatArray) -> None:
        width, num_tokens = source.shape
        self._columns = source
        self._rows = np.empty((num_tokens, width), np.float32)
        self.packed: Any = None
        self.scales = np.empty((2, num_tokens), np.float32)  # value = coarse * scales[0] + fine * scales[1]
        self._parts = np.empty((2, num_tokens, width), np.float32)
        self._parts_tensor = wrap_array(self._parts.reshape(2 * num_tokens, width))
        self._quantised = wrap_array(np.empty((2 * num_tokens, width), np.int8))
        self._factors = np.empty((num_tokens, 1), np.float32)

    def stage(self) -> None:
        """Quantise what the source holds now."""
        coarse, fine = self._parts
        scales, factors = self.scales, self._factors
        transpose_into(self._rows, self._columns)
        np.abs(self._rows, coarse)
        np.maximum.reduce(coarse, 1, out=scales[0])
        np.maximum(scales[0], _TINY, out=scales[0])  # a token of zeros stays zeros
        np.multiply(scales[0], 1 / _INT8_MAX, scales[0])
        np.multiply(scales[0], 1 / _FINE_STEPS, scales[1])
        np.reciprocal(scales[0], factors[:, 0])
        np.multiply(self._rows, factors, fine)
        np.rint(fine, coarse)
        np.subtract(fine, coarse, fine)
        np.multiply(fine, _FINE_STEPS, fine)
        _astype(self._parts_tensor, "int8", out=self._quantised)  # rounds half to even
        self.packed = _dots_pack(self._quantised)


class _Int8Weight:
    def __init__(self, data: npt.NDArray[np.int8], scale: FloatArray, governor: ThreadGovernor) -> None:
        self._tensor = wrap_array(data)
        self._scale = np.ascontiguousarray(scale, np.float32)[:, None]  # [N, 1]
        self._governor = governor

    def make_operand(self, source: FloatArray) -> Operand:
        return _Int8Operand(source)

    def bind(self, operand: Any, out: FloatArray) -> Call:
        weight_scale = self._scale
        num_outputs, num_tokens = out.shape
        accumulators = np.empty((num_outputs, 2 * num_tokens), np.int32)
        accumulate = _bind_product(self._tensor, operand, wrap_array(accumulators), self._governor)
        products = np.empty((num_outputs, 2 * num_tokens), np.float32)
        coarse, fine = products[:, :num_tokens], products[:, num_tokens:]
        token_scales = operand.scales.reshape(2 * num_tokens)

        def multiply() -> None:
            accumulate()
            np.copyto(products, accumulators, casting="unsafe")
            np.multiply(products, token_scales, products)
            np.add(coarse, fine, out)
            np.multiply(out, weight_scale, out)

        return multiply
