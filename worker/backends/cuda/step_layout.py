"""What the kernels read of a step besides weights: one array of int32 that goes to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.backends.cuda.device import Place
from worker.backends.cuda_attention_kernels import list_prefill_tiles
from worker.backends.protocol import KV_BLOCK_TOKENS, BackendError, SequenceInput

IntArray = npt.NDArray[np.int32]

#: Rows that a decode graph may have: a step takes the next larger one, the rest is padding.
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MIN_TABLE_WIDTH: Final = 16


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts that decide grids and sizes; equal shapes can share a graph."""

    num_tokens: int  # T, padding included
    num_sequences: int  # S
    num_rows: int  # R, rows of logits
    table_width: int
    is_decode: bool  # one token in each sequence
    num_tiles: int = 0  # of prefill attention; a decode has none

    @property
    def num_ints(self) -> int:
        """Numbers in the step's array."""
        return sum(_counts(self))


@dataclass(frozen=True, slots=True)
class StepPlaces:
    """The parts of the step's array on the device, all int32."""

    token_ids: Place  # [T]
    positions: Place  # [T]
    slots: Place  # [T]
    sequence_of_row: Place  # [T]
    block_tables: Place  # [S, table_width]
    first_rows: Place  # [S]
    context_tokens: Place  # [S]
    num_queries: Place  # [S], tokens of each
    tiles: Place  # [num_tiles, 2]: see list_prefill_tiles
    logits_rows: Place  # [R]


def choose_shape(inputs: Sequence[SequenceInput]) -> StepShape:
    """The shape of a step: decodes are padded to a bucket, block tables to a power of two."""
    num_tokens = sum(len(item.token_ids) for item in inputs)
    num_rows = sum(item.num_logits for item in inputs)
    num_blocks = max(-(-(item.start + len(item.token_ids)) // KV_BLOCK_TOKENS) for item in inputs)
    width = max(_MIN_TABLE_WIDTH, 1 << (num_blocks - 1).bit_length())
    if num_tokens > len(inputs):
        num_tiles = len(list_prefill_tiles([len(item.token_ids) for item in inputs]))
        return StepShape(num_tokens, len(inputs), num_rows, width, False, num_tiles)
    bucket = next((size for size in BATCH_BUCKETS if size >= len(inputs)), len(inputs))
    return StepShape(bucket, bucket, bucket if num_rows else 0, width, True)


def fill_step(target: IntArray, shape: StepShape, inputs: Sequence[SequenceInput]) -> None:
    """Write the step's numbers to ``target [shape.num_ints]``; padding is what the kernels skip."""
    target[:] = 0
    tokens, positions, slots, owners, tables, first_rows, contexts, num_queries, tiles, logits_rows = _split(
        target, shape
    )
    slots[:] = -1
    owners[:] = -1
    row = num_rows = 0
    for index, item in enumerate(inputs):
        count = len(item.token_ids)
        end = item.start + count
        used = -(-end // KV_BLOCK_TOKENS)
        tables[index, :used] = item.block_table[:used]
        span = slice(row, row + count)
        tokens[span] = item.token_ids
        places = np.arange(item.start, end, dtype=np.int32)
        positions[span] = places
        slots[span] = tables[index, places // KV_BLOCK_TOKENS] * KV_BLOCK_TOKENS + places % KV_BLOCK_TOKENS
        owners[span] = index
        first_rows[index] = row
        contexts[index], num_queries[index] = end, count
        row += count
        logits_rows[num_rows : num_rows + item.num_logits] = np.arange(row - item.num_logits, row)
        num_rows += item.num_logits
    if shape.num_tiles:
        tiles[:] = list_prefill_tiles([len(item.token_ids) for item in inputs])
    if shape.is_decode:  # padding has rows of its own: what two sequences write to one row would race
        first_rows[len(inputs) :] = np.arange(len(inputs), shape.num_sequences)


def place_step(inputs: Place, shape: StepShape) -> StepPlaces:
    """Where the parts are, in an array that was filled by :func:`fill_step`."""
    places, start = [], 0
    for count in _counts(shape):
        places.append(inputs.part(4 * start, 4 * count))
        start += count
    return StepPlaces(*places)


def check_inputs(inputs: Sequence[SequenceInput], num_blocks: int, context_length: int) -> None:
    """Refuse a step that would read or write outside of its blocks.

    Raises:
        BackendError: no tokens, a block that does not exist, a table too short, or a sequence beyond the context.
    """
    for item in inputs:
        count, end = len(item.token_ids), item.start + len(item.token_ids)
        check_blocks(item.block_table, num_blocks)
        if not count or item.start < 0:
            raise BackendError(f"{count} tokens at position {item.start}")
        if end > context_length:
            raise BackendError(f"{end} tokens: the context is {context_length} tokens")
        check_room(item.block_table, end)


def check_blocks(block_table: Sequence[int], num_blocks: int) -> None:
    """Raises:
    BackendError: a block of the table does not exist.
    """
    for block in block_table:
        if not 0 <= block < num_blocks:
            raise BackendError(f"KV block {block}: there are {num_blocks}")


def check_room(block_table: Sequence[int], num_tokens: int) -> None:
    """Raises:
    BackendError: the table does not cover that many tokens.
    """
    room = len(block_table) * KV_BLOCK_TOKENS
    if not 0 < num_tokens <= room:
        raise BackendError(f"{num_tokens} tokens in blocks for {room}")


def _counts(shape: StepShape) -> tuple[int, ...]:
    sequences = shape.num_sequences
    tables, tiles = sequences * shape.table_width, 2 * shape.num_tiles
    return (*(shape.num_tokens,) * 4, tables, *(sequences,) * 3, tiles, shape.num_rows)


def _split(target: IntArray, shape: StepShape) -> tuple[IntArray, ...]:
    parts = np.split(target, np.cumsum(_counts(shape))[:-1])
    parts[4] = parts[4].reshape(shape.num_sequences, shape.table_width)
    parts[8] = parts[8].reshape(shape.num_tiles, 2)
    return tuple(parts)
