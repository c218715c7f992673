"""Matrix products of the CPU backend over weights where they lie in mapped memory.

NumKong's ``dots_packed(A, pack(B))`` is ``A @ B.T``. The weight is the left, unpacked operand: no copy of it is ever
made; what is packed is the small activation. bf16 weights take activations rounded to bf16 and accumulate in
float32; int8 weights take activations quantised for each token and accumulate in int32; float32 weights go to BLAS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, Final, Protocol

import ml_dtypes
import numkong
import numpy as np
import numpy.typing as npt

from worker.backends.cpu_buffers import TensorMemo, transpose_into, wrap_array
from worker.backends.cpu_folding import FoldedRows, choose_fold, fold_weight
from worker.backends.protocol import BackendError, FloatArray, WeightTensor
from worker.backends.thread_governor import ThreadGovernor, compute_stall_ns

Call = Callable[[], None]

# Any: the stub of dots_packed lacks ``threads``.
_dots_packed: Final[Any] = numkong.dots_packed
_astype: Final[Any] = numkong.astype
_minmax: Final[Any] = numkong.minmax

_clock_ns: Final = time.perf_counter_ns
_INT8_MAX: Final = 127.0
_FINE_STEPS: Final = 254.0  # a coarse step's remainder lies in [-0.5, 0.5]
_TINY: Final = 1e-30
#: Elements that a chain of passes works on at a time: its arrays then stay in the core's own cache.
_BLOCK_ELEMENTS: Final = 32_768
#: Up to this many tokens the parts of int8 products are put together by a matrix product.
_RECOMBINED_TOKENS: Final = 8


class Staging(Protocol):
    """Where activations of one shape are prepared for products with one kind of weight.

    It holds one activation at a time: the call of the latest :meth:`bind_stage` that ran. All layers share it, so
    that a first step touches (and a later one keeps in cache) the memory of one layer, not of all.
    """

    def bind_stage(self, source: FloatArray) -> Call:
        """A call that prepares what ``source`` ``[K, T]`` holds then."""


class LinearWeight(Protocol):
    """A bound weight ``[N, K]``."""

    def describe_staging(self, num_tokens: int) -> Hashable:
        """Equal for weights of equal ``K`` that can share a staging of that many tokens."""

    def make_staging(self, shape: tuple[int, int]) -> Staging:
        """For activations of ``shape`` ``[K, T]``; see :meth:`describe_staging` for which weights it serves."""

    def bind(self, staging: Any, out: FloatArray) -> Call:
        """A call that writes the product with what is staged to ``out`` ``[N, T]``."""


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
    if data.dtype in (np.uint8, ml_dtypes.float8_e4m3fn):
        stored = tensor.block_type or ("int4" if tensor.is_int4 else "fp8")
        raise BackendError(
            f"{tensor.name}: {stored} weights are for GPUs (GLOWPLUG_BACKEND=cuda); this "
            "backend runs bfloat16, int8 and float32: build the snapshot with --quantize int8"
        )
    raise BackendError(f"{tensor.name}: dtype {data.dtype} (this backend runs bfloat16, int8 and float32)")


class _FoldedWeight:
    """A weight as a left operand, folded as the number of rows wants it; each fold is wrapped once."""

    def __init__(self, data: npt.NDArray[Any], governor: ThreadGovernor) -> None:
        self.data = data
        self._governor = governor
        self._tensors = TensorMemo()

    def choose_fold(self, num_rows: int) -> int:
        """See :func:`~worker.backends.cpu_folding.choose_fold`."""
        return choose_fold(self.data, num_rows, self._governor.max_threads)

    def bind_product(self, staging: Any, out: npt.NDArray[Any], num_rows: int) -> Call:
        """``out`` = the weight times the packed activation, of so many rows, timed for the governor."""
        stall_ns = compute_stall_ns(self.data.nbytes, num_rows)
        left = self._tensors.wrap(fold_weight(self.data, self.choose_fold(num_rows)))
        result = staging.tensors.wrap(out.reshape(len(left), -1))
        return _bind_timed(left, staging, result, stall_ns, self._governor)


def _bind_timed(left: Any, staging: Any, result: Any, stall_ns: int, governor: ThreadGovernor) -> Call:
    def multiply() -> None:
        begin_ns = _clock_ns()
        _dots_packed(left, staging.packed, out=result, threads=governor.num_threads)
        governor.observe(_clock_ns() - begin_ns, stall_ns)

    return multiply


class _Float32Staging:
    def __init__(self) -> None:
        self.columns: Any = None  # [K, T]

    def bind_stage(self, source: FloatArray) -> Call:
        def stage() -> None:
            self.columns = source

        return stage


class _Float32Weight:
    def __init__(self, data: FloatArray) -> None:
        self._data = data

    def describe_staging(self, num_tokens: int) -> Hashable:
        return "float32"

    def make_staging(self, shape: tuple[int, int]) -> Staging:
        return _Float32Staging()

    def bind(self, staging: Any, out: FloatArray) -> Call:
        data = self._data

        def multiply() -> None:
            np.matmul(data, staging.columns, out)

        return multiply


class _Bfloat16Row:
    """Float32 activations of one token, rounded to bf16 and packed."""

    def __init__(self, width: int, fold: int) -> None:
        self.tensors = TensorMemo()  # of what products write
        self.packed: Any = None
        self._folded = FoldedRows((1, width), np.dtype(ml_dtypes.bfloat16), fold)
        self._rounded = wrap_array(self._folded.rows)

    def bind_stage(self, source: FloatArray) -> Call:
        row = wrap_array(source.reshape(1, -1))  # one token: both layouts are the same memory
        rounded, pack = self._rounded, self._folded.pack

        def stage() -> None:
            _astype(row, "bfloat16", out=rounded)
            self.packed = pack()

        return stage


class _Bfloat16Columns:
    """Float32 activations ``[K, T]`` of several tokens, rounded to bf16, transposed and packed."""

    def __init__(self, shape: tuple[int, int], fold: int) -> None:
        columns = np.empty(shape, ml_dtypes.bfloat16)
        self.tensors = TensorMemo()  # of what products write
        self.packed: Any = None
        self._folded = FoldedRows(shape[::-1], np.dtype(ml_dtypes.bfloat16), fold)
        self._columns = wrap_array(columns)
        self._column_bits = columns.view(np.uint16)
        self._row_bits = self._folded.rows.view(np.uint16)

    def bind_stage(self, source: FloatArray) -> Call:
        source_tensor = wrap_array(source)

        def stage() -> None:
            _astype(source_tensor, "bfloat16", out=self._columns)
            transpose_into(self._row_bits, self._column_bits)
            self.packed = self._folded.pack()

        return stage


class _Bfloat16Weight:
    def __init__(self, data: npt.NDArray[Any], governor: ThreadGovernor) -> None:
        self._weight = _FoldedWeight(data, governor)

    def describe_staging(self, num_tokens: int) -> Hashable:
        return "bfloat16", self._weight.choose_fold(num_tokens)

    def make_staging(self, shape: tuple[int, int]) -> Staging:
        fold = self._weight.choose_fold(shape[1])
        return _Bfloat16Row(shape[0], fold) if shape[1] == 1 else _Bfloat16Columns(shape, fold)

    def bind(self, staging: Any, out: FloatArray) -> Call:
        return self._weight.bind_product(staging, out, out.shape[1])


class _Int8Row:
    """One token's activations as two int8 numbers each (see :class:`_Int8Columns`), in the fewest calls."""

    def __init__(self, width: int, fold: int) -> None:
        self.tensors = TensorMemo()  # of what products write
        self.packed: Any = None
        self.part_scales: FloatArray = np.zeros(2, np.float32)  # value = coarse * [0] + fine * [1]
        self._parts = np.empty((2, width), np.float32)
        self._parts_tensor = wrap_array(self._parts)
        self._folded = FoldedRows((2, width), np.dtype(np.int8), fold)
        self._quantised = wrap_array(self._folded.rows)
        self._fine_steps = np.float32(_FINE_STEPS)
        self._results: dict[int, tuple[npt.NDArray[np.int32], FloatArray]] = {}

    def results(self, num_outputs: int) -> tuple[npt.NDArray[np.int32], FloatArray]:
        """Accumulators and scaled products ``[N, 2]`` that all weights of that many rows share."""
        return _take_results(self._results, (num_outputs, 2))

    def bind_stage(self, source: FloatArray) -> Call:
        vector = source.reshape(-1)
        vector_tensor = wrap_array(vector)
        coarse, fine = self._parts
        part_scales = self.part_scales
        fine_steps = self._fine_steps

        def stage() -> None:
            smallest, _, largest, _ = _minmax(vector_tensor)
            scale = max(largest, -smallest, _TINY) / _INT8_MAX
            part_scales[0] = scale
            part_scales[1] = scale / _FINE_STEPS
            np.multiply(vector, 1 / scale, fine)
            np.rint(fine, coarse)
            np.subtract(fine, coarse, fine)
            np.multiply(fine, fine_steps, fine)
            _astype(self._parts_tensor, "int8", out=self._quantised)  # rounds half to even
            self.packed = self._folded.pack()

        return stage


class _Int8Columns:
    """Activations of several tokens as two int8 numbers each: a coarse one, and one for what the coarse one leaves.

    Both parts of every token are rows of one packed matrix, so a single product serves them, and at few tokens the
    second costs nothing (the weight is what takes the time). With one part alone the activations' outliers take the
    resolution of all others: on SmolLM2-135M top-5 log-probabilities were then off by 0.31 on average; with two by
    0.11, which is what the int8 weights themselves cost.
    """

    def __init__(self, shape: tuple[int, int], fold: int) -> None:
        width, num_tokens = shape
        self.tensors = TensorMemo()  # of what products write
        self.packed: Any = None
        self.scales = np.empty((2, num_tokens), np.float32)  # value = coarse * scales[0] + fine * scales[1]
        self._parts = np.empty((2, num_tokens, width), np.float32)
        self._parts_tensor = wrap_array(self._parts.reshape(2 * num_tokens, width))
        self._folded = FoldedRows((2 * num_tokens, width), np.dtype(np.int8), fold)
        self._quantised = wrap_array(self._folded.rows)
        block_tokens = max(1, _BLOCK_ELEMENTS // width)
        self._blocks = [slice(begin, begin + block_tokens) for begin in range(0, num_tokens, block_tokens)]
        self._factors = np.empty((num_tokens, 1), np.float32)
        self._results: dict[int, tuple[npt.NDArray[np.int32], FloatArray]] = {}
        # [2 * T, T]: products with it are the sums of both parts, scaled for each token.
        self.recombination: FloatArray = np.zeros((2 * num_tokens, num_tokens), np.float32)
        diagonal = np.arange(num_tokens)
        self._both_diagonals = (np.arange(2 * num_tokens), np.concatenate((diagonal, diagonal)))

    def results(self, num_outputs: int) -> tuple[npt.NDArray[np.int32], FloatArray]:
        """Accumulators and scaled products ``[N, 2 * T]`` that all weights of that many rows share."""
        return _take_results(self._results, (num_outputs, 2 * self._factors.size))

    def bind_stage(self, source: FloatArray) -> Call:
        def stage() -> None:
            self._quantise(source)

        return stage

    def _quantise(self, source: FloatArray) -> None:
        scales, all_factors = self.scales, self._factors
        transpose_into(self._parts[1], source)
        for block in self._blocks:
            coarse, fine = self._parts[:, block]
            largest, factors = scales[0, block], all_factors[block]
            np.abs(fine, coarse)
            np.maximum.reduce(coarse, 1, out=largest)
            np.maximum(largest, _TINY, out=largest)  # a token of zeros stays zeros
            np.divide(_INT8_MAX, largest, factors[:, 0])
            np.multiply(fine, factors, fine)
            np.rint(fine, coarse)
            np.subtract(fine, coarse, fine)
            np.multiply(fine, _FINE_STEPS, fine)
        np.multiply(scales[0], 1 / _INT8_MAX, scales[0])
        np.multiply(scales[0], 1 / _FINE_STEPS, scales[1])
        if scales.size <= 2 * _RECOMBINED_TOKENS:
            self.recombination[self._both_diagonals] = scales.reshape(-1)
        _astype(self._parts_tensor, "int8", out=self._quantised)  # rounds half to even
        self.packed = self._folded.pack()


def _take_results(
    results: dict[int, tuple[npt.NDArray[np.int32], FloatArray]], shape: tuple[int, int]
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    found = results.get(shape[0])
    if found is None:
        found = results[shape[0]] = np.empty(shape, np.int32), np.empty(shape, np.float32)
    return found


class _Int8Weight:
    def __init__(self, data: npt.NDArray[np.int8], scale: FloatArray, governor: ThreadGovernor) -> None:
        self._weight = _FoldedWeight(data, governor)
        self._scale = np.ascontiguousarray(scale, np.float32)

    def describe_staging(self, num_tokens: int) -> Hashable:
        return "int8", self._weight.choose_fold(2 * num_tokens)

    def make_staging(self, shape: tuple[int, int]) -> Staging:
        fold = self._weight.choose_fold(2 * shape[1])
        return _Int8Row(shape[0], fold) if shape[1] == 1 else _Int8Columns(shape, fold)

    def bind(self, staging: Any, out: FloatArray) -> Call:
        accumulators, _ = staging.results(len(out))
        accumulate = self._weight.bind_product(staging, accumulators, 2 * out.shape[1])
        if out.shape[1] == 1:
            return self._bind_row(staging, out[:, 0], accumulate)
        if out.shape[1] <= _RECOMBINED_TOKENS:
            return self._bind_few(staging, out, accumulate)
        return self._bind_many(staging, out, accumulate)

    def _bind_row(self, staging: _Int8Row, out: FloatArray, accumulate: Call) -> Call:
        accumulators, products = staging.results(len(out))
        weight_scale, part_scales = self._scale, staging.part_scales

        def multiply() -> None:
            accumulate()
            np.copyto(products, accumulators, casting="unsafe")
            np.matmul(products, part_scales, out)
            np.multiply(out, weight_scale, out)

        return multiply

    def _bind_few(self, staging: _Int8Columns, out: FloatArray, accumulate: Call) -> Call:
        accumulators, products = staging.results(len(out))
        weight_scale, recombination = self._scale[:, None], staging.recombination

        def multiply() -> None:
            accumulate()
            np.copyto(products, accumulators, casting="unsafe")
            np.matmul(products, recombination, out)  # NumPy's loops over so short rows take three times as long
            np.multiply(out, weight_scale, out)

        return multiply

    def _bind_many(self, staging: _Int8Columns, out: FloatArray, accumulate: Call) -> Call:
        accumulators, products = staging.results(len(out))
        num_outputs, num_tokens = out.shape
        token_scales = staging.scales.reshape(2 * num_tokens)
        block_rows = max(1, _BLOCK_ELEMENTS // (2 * num_tokens))
        blocks = []
        for begin in range(0, num_outputs, block_rows):
            block = slice(begin, min(begin + block_rows, num_outputs))
            part = products[: block.stop - begin]  # one part's memory for all of them: it stays in cache
            blocks.append((accumulators[block], part, out[block], self._scale[block, None]))

        def multiply() -> None:
            accumulate()
            for accumulated, part, result, weight_scale in blocks:
                np.copyto(part, accumulated, casting="unsafe")
                np.multiply(part, token_scales, part)
                np.add(part[:, :num_tokens], part[:, num_tokens:], result)
                np.multiply(result, weight_scale, result)

        return multiply
