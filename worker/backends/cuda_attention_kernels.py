"""How the attention kernels over the paged KV cache are launched; see :mod:`worker.backends.cuda_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.backends.cuda_kernels import KV_BLOCK_TOKENS, WARP_THREADS, Activation, Buffer, Launch
from worker.backends.protocol import BackendError

_DECODE_THREADS: Final = 128
_TOKEN_LANES: Final = 8
_MAX_HEAD_DIM: Final = 256

#: Query heads that one block of the decode kernel may take, by head_dim; the rest goes through row_attention.
_DECODE_HEADS: Final = {64: (1, 4), 80: (1,), 96: (1,), 128: (1, 2)}

#: Head sizes of the tensor-core prefill kernel.
_PREFILL_HEAD_DIMS: Final = (64, 80, 96, 128)
_PREFILL_TILE_ROWS: Final = 64
_PREFILL_SHARED_ROWS: Final = 2 * 32  # keys and values of 32 tokens
_ROW_PADDING: Final = 8


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """One layer's shape. ``row_stride``: elements of a row of queries (heads from column 0); ``block_stride``: elements
    from one KV block of the pool to the next; ``table_width``: columns of ``block_tables [S, table_width]`` int32."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    row_stride: int
    block_stride: int
    table_width: int
    window_tokens: int  # 0: no window
    scale: float

    def layer_elements(self) -> int:
        """Elements that a layer has in a KV block: ``[2][kv heads][16][head_dim]``."""
        return 2 * self.num_kv_heads * KV_BLOCK_TOKENS * self.head_dim


def has_decode_kernel(activation: Activation, head_dim: int) -> bool:
    """Whether decode of such heads is split over the context; otherwise use :func:`row_attention`."""
    return activation != "f32" and head_dim in _DECODE_HEADS


def has_prefill_kernel(activation: Activation, head_dim: int) -> bool:
    """Whether prefill of such heads runs on tensor cores; otherwise use :func:`row_attention`."""
    return activation != "f32" and head_dim in _PREFILL_HEAD_DIMS


def list_prefill_tiles(num_rows: Sequence[int]) -> npt.NDArray[np.int32]:
    """``[tiles, 2]``: sequence, and first of its ``num_rows[s]`` queries, of each tile of :func:`prefill_attention`."""
    tiles = [
        (sequence, first) for sequence, count in enumerate(num_rows) for first in range(0, count, _PREFILL_TILE_ROWS)
    ]
    return np.array(tiles, np.int32).reshape(-1, 2)


def choose_num_splits(num_sequences: int, num_kv_heads: int, longest_context_tokens: int, num_processors: int) -> int:
    """Splits that fill the device's multiprocessors twice without splits of less than four KV blocks."""
    wanted = -(-2 * num_processors // max(num_sequences * num_kv_heads, 1))
    return max(1, min(wanted, longest_context_tokens // (4 * KV_BLOCK_TOKENS), 64))


def decode_attention(
    activation: Activation,
    shape: PagedAttention,
    partial: Buffer,
    statistics: Buffer,
    queries: Buffer,
    kv_layer: Buffer,
    block_tables: Buffer,
    first_rows: Buffer,
    context_tokens: Buffer,
    *,
    num_sequences: int,
    num_splits: int,
) -> Launch:
    """Partial attention of one query a sequence: ``partial [S, heads, splits, head_dim]`` and ``statistics
    [S, heads, splits, 2]``, float32, which :func:`combine_splits` joins.

    ``first_rows [S]`` int32 is the query's row; ``context_tokens [S]`` int32 counts its keys (0: a row of padding).

    Raises:
        BackendError: no kernel for this type and head_dim, see :func:`has_decode_kernel`.
    """
    if not has_decode_kernel(activation, shape.head_dim):
        raise BackendError(f"decode attention of {activation} heads of {shape.head_dim}: no such kernel")
    group = shape.num_heads // shape.num_kv_heads
    choices = _DECODE_HEADS[shape.head_dim]
    heads = choices[-1] if group > 1 else 1
    sizes = (shape.row_stride, shape.table_width, shape.num_heads, shape.num_kv_heads, shape.window_tokens)
    return Launch(
        f"decode_attention_{activation}_d{shape.head_dim}_h{heads}",
        (shape.num_kv_heads * -(-group // heads), num_splits, num_sequences),
        (_DECODE_THREADS, 1, 1),
        4 * (_DECODE_THREADS // _TOKEN_LANES) * heads * (shape.head_dim + 2),
        (
            *(partial, statistics, queries, kv_layer, block_tables, first_rows, context_tokens),
            np.int64(shape.block_stride),
            *map(np.int32, sizes),
            np.float32(shape.scale),
        ),
    )


def prefill_attention(
    activation: Activation,
    shape: PagedAttention,
    out: Buffer,
    queries: Buffer,
    kv_layer: Buffer,
    block_tables: Buffer,
    tiles: Buffer,
    first_rows: Buffer,
    num_rows: Buffer,
    context_tokens: Buffer,
    *,
    num_tiles: int,
) -> Launch:
    """Causal attention of chunks: ``out [rows, heads * head_dim]``; keys of the chunk itself are in the cache already.

    ``tiles`` as :func:`list_prefill_tiles` gives them; sequence ``s`` has ``num_rows[s]`` queries from row
    ``first_rows[s]`` on, the last of which sees ``context_tokens[s]`` keys. All int32.

    Raises:
        BackendError: no kernel for this type and head_dim, see :func:`has_prefill_kernel`.
    """
    if not has_prefill_kernel(activation, shape.head_dim):
        raise BackendError(f"prefill attention of {activation} heads of {shape.head_dim}: no such kernel")
    sizes = (shape.row_stride, shape.table_width, shape.num_heads, shape.num_kv_heads, shape.window_tokens)
    buffers = (out, queries, kv_layer, block_tables, tiles, first_rows, num_rows, context_tokens)
    return Launch(
        f"prefill_attention_{activation}_d{shape.head_dim}",
        (num_tiles, shape.num_heads, 1),
        (128, 1, 1),
        2 * _PREFILL_SHARED_ROWS * (shape.head_dim + _ROW_PADDING),
        (*buffers, np.int64(shape.block_stride), *map(np.int32, sizes), np.float32(shape.scale)),
    )


def combine_splits(
    activation: Activation,
    shape: PagedAttention,
    out: Buffer,
    partial: Buffer,
    statistics: Buffer,
    first_rows: Buffer,
    *,
    num_sequences: int,
    num_splits: int,
) -> Launch:
    """``out [rows, heads * head_dim]`` of the activation type = the splits' results joined."""
    sizes = (num_splits, shape.num_heads, shape.head_dim)
    return Launch(
        f"combine_splits_{activation}",
        (shape.num_heads, num_sequences, 1),
        (min(128, -(-shape.head_dim // WARP_THREADS) * WARP_THREADS), 1, 1),
        0,
        (out, partial, statistics, first_rows, *map(np.int32, sizes)),
    )


def row_attention(
    activation: Activation,
    shape: PagedAttention,
    out: Buffer,
    queries: Buffer,
    kv_layer: Buffer,
    block_tables: Buffer,
    sequence_of_row: Buffer,
    positions: Buffer,
    *,
    num_rows: int,
) -> Launch:
    """Causal attention of rows of any sequences and positions; any head_dim up to 256. Plain, and slow.

    ``sequence_of_row [R]`` int32 (below 0: padding) picks the row of ``block_tables``; ``positions [R]`` int32.

    Raises:
        BackendError: head_dim is larger than the kernel's registers allow.
    """
    if shape.head_dim > _MAX_HEAD_DIM:
        raise BackendError(f"attention heads of {shape.head_dim}: the kernels take up to {_MAX_HEAD_DIM}")
    sizes = (num_rows, shape.row_stride, shape.table_width, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    return Launch(
        f"row_attention_{activation}",
        (max(-(-num_rows * shape.num_heads // 4), 1), 1, 1),
        (128, 1, 1),
        0,
        (
            *(out, queries, kv_layer, block_tables, sequence_of_row, positions, np.int64(shape.block_stride)),
            *map(np.int32, (*sizes, shape.window_tokens)),
            np.float32(shape.scale),
        ),
    )
