"""How each CUDA kernel of :mod:`worker.backends.kernels` is launched: grid, block, shared memory, arguments in order.

The one definition for the GPU backend and for the emulation on the CPU; imports no CUDA library. A *buffer* is
whatever the caller's device gives: a CuPy array or pointer there, a NumPy array in the emulation. Shapes, layouts and
dtypes are in the kernels' DESIGN.md; ``activation`` names the element type of what flows between matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from worker.backends.protocol import BackendError

Activation = Literal["f32", "bf16", "f16"]
Buffer = Any  # see above
Argument = Any  # a buffer, or an np.int32, np.int64 or np.float32
Grid = tuple[int, int, int]

KV_BLOCK_TOKENS: Final = 16
WARP_THREADS: Final = 32

#: Codes of small tables (norm weights, biases) by dtype name.
TABLE_TYPES: Final = {"float32": 0, "bfloat16": 1, "float16": 2}

#: One row of ``sample_rows``; mirrors ``struct SamplingRow`` of sampling.cu.
SAMPLING_ROW: Final = np.dtype(
    [
        *((name, np.float64) for name in ("uniform", "top_p")),
        *(
            (name, np.float32)
            for name in ("temperature", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        ),
        *((name, np.int32) for name in ("logits_row", "top_k", "mask_row", "seen_begin", "seen_end")),
        *((name, np.int32) for name in ("counted_begin", "counted_end", "bias_begin", "bias_end")),
    ]
)

_SELECTION_THREADS: Final = 1024
_SELECTION_SHARED_BYTES: Final = 8 * (256 + 32 + 2)  # struct SelectionScratch
_REDUCTION_SHARED_BYTES: Final = 4 * WARP_THREADS  # block_sum
_GEMV_WARPS: Final = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything that its launch needs."""

    kernel: str
    grid: Grid
    block: Grid
    shared_bytes: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a weight matrix is stored. ``width_multiple``: what the width must be a multiple of; ``block_weights`` and
    ``block_bytes``: a row is that many bytes for each block of weights."""

    width_multiple: int
    block_weights: int
    block_bytes: int
    is_quantised: bool = True

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` weights, scales of other arrays not counted."""
        return width // self.block_weights * self.block_bytes


#: Formats that gemv and gather_rows read. int8 and e4m3 have float32 scales ``[N]``, int4 has float16 scales
#: ``[N, K / group]``; the GGUF blocks hold their own.
FORMATS: Final = {
    "f32": StoredFormat(1, 1, 4, is_quantised=False),
    "bf16": StoredFormat(1, 1, 2, is_quantised=False),
    "f16": StoredFormat(1, 1, 2, is_quantised=False),
    "int8": StoredFormat(8, 1, 1),
    "e4m3": StoredFormat(8, 1, 1),
    "int4": StoredFormat(32, 2, 1),
    "q8_0": StoredFormat(32, 32, 34),
    "q4_0": StoredFormat(32, 32, 18),
    "q4_1": StoredFormat(32, 32, 20),
    "q4_k": StoredFormat(256, 256, 144),
    "q6_k": StoredFormat(256, 256, 210),
}

#: Where gemv writes: the activation type, float32, or added to a float32 residual.
OUTPUT_MODES: Final = {"activation": 0, "float32": 1, "add": 2}


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _line(kernel: str, num_threads: int, threads: int, *arguments: Argument) -> Launch:
    """``num_threads`` threads in one dimension, in blocks of ``threads``."""
    return Launch(kernel, (max(_ceil_div(num_threads, threads), 1), 1, 1), (threads, 1, 1), 0, arguments)


def _norm_threads(width: int) -> int:
    return min(512, max(32, _ceil_div(width, 4 * 32) * 32))


def rms_norm(
    activation: Activation,
    out: Buffer,
    source: Buffer,
    weight: Buffer,
    *,
    weight_type: int,
    num_rows: int,
    width: int,
    epsilon: float,
) -> Launch:
    """``out [R, W]`` of the activation type = RMS norm of float32 ``source [R, W]``."""
    arguments = (out, source, weight, np.int32(weight_type), np.int32(width), np.float32(epsilon))
    return Launch(
        f"rms_norm_{activation}", (num_rows, 1, 1), (_norm_threads(width), 1, 1), _REDUCTION_SHARED_BYTES, arguments
    )


def add_rms_norm(
    activation: Activation,
    out: Buffer,
    residual: Buffer,
    delta: Buffer,
    weight: Buffer,
    *,
    weight_type: int,
    num_rows: int,
    width: int,
    epsilon: float,
) -> Launch:
    """``residual [R, W]`` float32 += ``delta``; ``out`` = its RMS norm."""
    arguments = (out, residual, delta, weight, np.int32(weight_type), np.int32(width), np.float32(epsilon))
    return Launch(
        f"add_rms_norm_{activation}", (num_rows, 1, 1), (_norm_threads(width), 1, 1), _REDUCTION_SHARED_BYTES, arguments
    )


def head_rms_norm(
    activation: Activation,
    rows: Buffer,
    weight: Buffer,
    *,
    weight_type: int,
    num_rows: int,
    row_stride: int,
    column: int,
    num_heads: int,
    head_dim: int,
    epsilon: float,
) -> Launch:
    """RMS norm, in place, of ``num_heads`` heads from ``column`` on of each row."""
    sizes = (weight_type, num_rows, row_stride, column, num_heads, head_dim)
    arguments = (rows, weight, *map(np.int32, sizes), np.float32(epsilon))
    return _line(f"head_rms_norm_{activation}", num_rows * num_heads * WARP_THREADS, 128, *arguments)


def layer_norm(
    activation: Activation,
    out: Buffer,
    source: Buffer,
    weight: Buffer,
    bias: Buffer,
    *,
    table_type: int,
    num_rows: int,
    width: int,
    epsilon: float,
) -> Launch:
    """``out [R, W]`` = layer norm of float32 ``source``; weight and bias of one dtype."""
    arguments = (out, source, weight, bias, np.int32(table_type), np.int32(width), np.float32(epsilon))
    return Launch(
        f"layer_norm_{activation}", (num_rows, 1, 1), (_norm_threads(width), 1, 1), _REDUCTION_SHARED_BYTES, arguments
    )


def rope_table(
    table: Buffer, positions: Buffer, inverse_frequencies: Buffer, *, num_rows: int, half: int, scale: float
) -> Launch:
    """``table [R, 2, half]`` float32: cosines and sines of the step's positions ``[R]`` int32, times ``scale``."""
    arguments = (table, positions, inverse_frequencies, np.int32(num_rows), np.int32(half), np.float32(scale))
    return _line("rope_table", num_rows * half, 256, *arguments)


def rope(
    activation: Activation,
    rows: Buffer,
    table: Buffer,
    *,
    num_rows: int,
    row_stride: int,
    column: int,
    num_heads: int,
    half: int,
) -> Launch:
    """Rotate, in place, ``num_heads`` heads of ``2 * half`` from ``column`` on of each row."""
    sizes = (num_rows, row_stride, column, num_heads, half)
    return _line(f"rope_{activation}", num_rows * num_heads * half, 256, rows, table, *map(np.int32, sizes))


def kv_append(
    activation: Activation,
    kv_layer: Buffer,
    rows: Buffer,
    slots: Buffer,
    *,
    block_stride: int,
    num_rows: int,
    row_stride: int,
    key_column: int,
    value_column: int,
    num_kv_heads: int,
    head_dim: int,
) -> Launch:
    """Copy each row's keys and values to KV slot ``slots [R]`` int32 (block * 16 + offset; below 0: padding).

    ``kv_layer`` is the pool from this layer's place in block 0 on; ``block_stride`` counts elements.
    """
    sizes = (num_rows, row_stride, key_column, value_column, num_kv_heads, head_dim)
    arguments = (kv_layer, rows, slots, np.int64(block_stride), *map(np.int32, sizes))
    return _line(f"kv_append_{activation}", num_rows * num_kv_heads * head_dim, 256, *arguments)


def silu_mul(activation: Activation, out: Buffer, source: Buffer, *, num_rows: int, width: int) -> Launch:
    """``out [R, W] = silu(source[:, :W]) * source[:, W:]``."""
    elements, suffix = (4, "x4_") if width % 4 == 0 else (1, "")
    arguments = (out, source, np.int32(num_rows), np.int32(width))
    return _line(f"silu_mul_{suffix}{activation}", num_rows * width // elements, 256, *arguments)


def add(activation: Activation, residual: Buffer, delta: Buffer, *, count: int) -> Launch:
    """``residual`` float32 += ``delta`` of the activation type."""
    return _line(f"add_{activation}", count, 256, residual, delta, np.int64(count))


def bias_add(
    activation: Activation, rows: Buffer, bias: Buffer, *, bias_type: int, num_rows: int, width: int
) -> Launch:
    """Add ``bias [W]`` to each row, in place."""
    count = num_rows * width
    arguments = (rows, bias, np.int32(bias_type), np.int64(count), np.int32(width))
    return _line(f"bias_add_{activation}", count, 256, *arguments)


def gelu(activation: Activation, rows: Buffer, *, count: int) -> Launch:
    """Exact GELU in place."""
    return _line(f"gelu_{activation}", count, 256, rows, np.int64(count))


def narrow(activation: Activation, out: Buffer, source: Buffer, *, count: int) -> Launch:
    """float32 to the activation type, to nearest."""
    return _line(f"narrow_{activation}", count, 256, out, source, np.int64(count))


def widen(activation: Activation, out: Buffer, source: Buffer, *, count: int) -> Launch:
    """The activation type to float32."""
    return _line(f"widen_{activation}", count, 256, out, source, np.int64(count))


def select_rows(
    activation: Activation, out: Buffer, source: Buffer, row_indices: Buffer, *, num_rows: int, width: int
) -> Launch:
    """``out[s] = source[row_indices[s]]`` for ``num_rows`` results."""
    threads = min(1024, _ceil_div(width, 32) * 32)
    grid = (num_rows, _ceil_div(width, threads), 1)
    return Launch(f"select_rows_{activation}", grid, (threads, 1, 1), 0, (out, source, row_indices, np.int32(width)))


def mean_pool(
    out: Buffer, source: Buffer, first_rows: Buffer, num_rows: Buffer, *, num_sequences: int, width: int
) -> Launch:
    """``out[s]`` = mean of the float32 rows of sequence ``s``."""
    grid = (num_sequences, _ceil_div(width, 256), 1)
    return Launch("mean_pool", grid, (256, 1, 1), 0, (out, source, first_rows, num_rows, np.int32(width)))


def l2_normalise(rows: Buffer, *, num_rows: int, width: int, lowest_length: float) -> Launch:
    """Each float32 row divided by its length, in place."""
    arguments = (rows, np.int32(width), np.float32(lowest_length))
    return Launch("l2_normalise", (num_rows, 1, 1), (256, 1, 1), _REDUCTION_SHARED_BYTES, arguments)


def _format_of(name: str, width: int, group_size: int) -> StoredFormat:
    found = FORMATS.get(name)
    if found is None:
        raise BackendError(f"weight format {name}: the kernels read {', '.join(FORMATS)}")
    if width % found.width_multiple != 0:
        raise BackendError(f"{name} weights of width {width}: it must be a multiple of {found.width_multiple}")
    if name == "int4" and (group_size <= 0 or group_size % 32 or width % group_size):
        raise BackendError(f"int4 groups of {group_size} weights in rows of {width}: expected a multiple of 32")
    return found


def gather_rows(
    format_name: str,
    activation: Activation,
    out: Buffer,
    table: Buffer,
    scales: Buffer,
    row_indices: Buffer,
    *,
    num_rows: int,
    num_table_rows: int,
    width: int,
    group_size: int = 0,
) -> Launch:
    """``out [num_rows, W]`` = rows of a stored matrix as the activation type; ``row_indices`` 0 (null): rows in order.

    Raises:
        BackendError: the format does not exist, or not for this activation type or width.
    """
    stored = _format_of(format_name, width, group_size)
    if activation not in (("bf16", "f32") if stored.is_quantised else ("f32",)):
        raise BackendError(f"{format_name} rows as {activation}: no such kernel")
    sizes = (num_table_rows, width, group_size)
    arguments = (out, table, scales, row_indices, *map(np.int32, sizes))
    return Launch(f"gather_rows_{format_name}_{activation}", (num_rows, 1, 1), (128, 1, 1), 0, arguments)


def gemv(
    format_name: str,
    activation: Activation,
    out: Buffer,
    x: Buffer,
    weights: Buffer,
    scales: Buffer,
    bias: Buffer,
    *,
    bias_type: int,
    num_rows: int,
    num_outputs: int,
    width: int,
    group_size: int = 0,
    mode: int = 0,
) -> Launch:
    """``out [R, N] = x [R, K] @ weights.T (+ bias)``; ``bias`` and ``scales`` may be 0 (null).

    Meant for up to 8 rows; right for any number. Weights are read once for every 4 rows.

    Raises:
        BackendError: the format does not exist, or not for this activation type or width.
    """
    stored = _format_of(format_name, width, group_size)
    if activation not in (("bf16", "f32") if stored.is_quantised else (format_name,)):
        raise BackendError(f"{format_name} weights with {activation} activations: no such kernel")
    batch = 4 if num_rows > 1 and not (stored.is_quantised and activation == "f32") else 1
    sizes = (bias_type, num_rows, num_outputs, width, group_size, mode)
    return Launch(
        f"gemv_{format_name}_{activation}_x{batch}",
        (_ceil_div(num_outputs, _GEMV_WARPS), _ceil_div(num_rows, batch), 1),
        (_GEMV_WARPS * WARP_THREADS, 1, 1),
        0,
        (out, x, weights, scales, bias, *map(np.int32, sizes)),
    )


def sample_rows(
    tokens: Buffer,
    scratch_scores: Buffer,
    logits: Buffer,
    row_table: Buffer,
    ids: Buffer,
    values: Buffer,
    masks: Buffer,
    *,
    num_rows: int,
    vocab_size: int,
) -> Launch:
    """``tokens [R]`` int32 drawn from float32 ``logits [.., V]`` by ``row_table [R]`` of :data:`SAMPLING_ROW`."""
    arguments = (tokens, scratch_scores, logits, row_table, ids, values, masks, np.int32(vocab_size))
    return Launch("sample_rows", (num_rows, 1, 1), (_SELECTION_THREADS, 1, 1), _SELECTION_SHARED_BYTES, arguments)


def argmax_rows(tokens: Buffer, logits: Buffer, row_indices: Buffer, *, num_rows: int, vocab_size: int) -> Launch:
    """``tokens [R]`` int32: the best id of each row, or -1 where it is not finite."""
    arguments = (tokens, logits, row_indices, np.int32(vocab_size))
    return Launch("argmax_rows", (num_rows, 1, 1), (_SELECTION_THREADS, 1, 1), _SELECTION_SHARED_BYTES, arguments)


def top_logprobs(
    chosen: Buffer,
    top_ids: Buffer,
    top_values: Buffer,
    logits: Buffer,
    row_indices: Buffer,
    tokens: Buffer,
    *,
    num_rows: int,
    vocab_size: int,
    num_top: int,
) -> Launch:
    """Log-softmax at ``tokens [R]`` and at each row's ``num_top`` best ids."""
    arguments = (chosen, top_ids, top_values, logits, row_indices, tokens, np.int32(vocab_size), np.int32(num_top))
    return Launch("top_logprobs", (num_rows, 1, 1), (_SELECTION_THREADS, 1, 1), _SELECTION_SHARED_BYTES, arguments)
