"""Attention over the paged KV cache against float64 NumPy, from the CUDA sources on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from cuda_fixtures import DTYPES, TOLERANCE, Array, draw, poisoned, relative_error, run_in_every_order, seeded_rng

from worker.backends import cuda_attention_kernels as attention
from worker.backends.cuda_attention_kernels import PagedAttention
from worker.backends.cuda_kernels import Activation, Launch

Record = Callable[[str, object], None]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run of a seed."""
    return seeded_rng()


@dataclass(frozen=True)
class Cache:
    """A pool whose blocks lie in random order, with poison wherever no token was written."""

    shape: PagedAttention
    kv_layer: Array  # the pool from the layer's place on
    block_tables: Array
    keys: list[Array]  # of each sequence: [kv heads, tokens, head_dim] float64
    values: list[Array]


def make_cache(
    rng: np.random.Generator,
    activation: str,
    lengths: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int = 0,
) -> Cache:
    """Sequences of ``lengths`` tokens in the second of three layers."""
    per_sequence = [-(-length // 16) for length in lengths]
    order = rng.permutation(sum(per_sequence) + 2).astype(np.int32)
    tables = np.full((len(lengths), max(per_sequence) + 1), 2**30, np.int32)  # what is not used points far away
    pool = poisoned((len(order), 3, 2, num_kv_heads, 16, head_dim), DTYPES[activation])
    keys, values, used = [], [], 0
    for sequence, (length, num_blocks) in enumerate(zip(lengths, per_sequence, strict=True)):
        tables[sequence, :num_blocks] = order[used : used + num_blocks]
        used += num_blocks
        both = draw(rng, (2, num_kv_heads, length, head_dim), activation)
        for token in range(length):
            pool[tables[sequence, token // 16], 1, :, :, token % 16] = both[:, :, token]
        keys.append(both[0].astype(np.float64))
        values.append(both[1].astype(np.float64))
    shape = PagedAttention(
        num_heads, num_kv_heads, head_dim, (num_heads + 2 * num_kv_heads) * head_dim, pool[0].size, tables.shape[1],
        window, head_dim**-0.5,
    )  # fmt: skip
    return Cache(shape, pool.reshape(-1)[shape.layer_elements() :], tables, keys, values)


def attend(cache: Cache, sequence: int, position: int, queries: Array) -> Array:
    """Reference: ``[heads, head_dim]`` for one query at ``position``."""
    shape = cache.shape
    first = max(0, position + 1 - shape.window_tokens) if shape.window_tokens else 0
    result = np.empty((shape.num_heads, shape.head_dim))
    for head in range(shape.num_heads):
        kv_head = head * shape.num_kv_heads // shape.num_heads
        query = queries[head * shape.head_dim : (head + 1) * shape.head_dim].astype(np.float64)
        scores = cache.keys[sequence][kv_head, first : position + 1] @ query * shape.scale
        weights = np.exp(scores - scores.max())
        result[head] = weights / weights.sum() @ cache.values[sequence][kv_head, first : position + 1]
    return result.reshape(-1)


@pytest.mark.parametrize("activation", ["bf16", "f16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(2, 2, 64), (8, 2, 64), (7, 1, 64), (2, 2, 80), (2, 1, 96), (1, 1, 128), (4, 1, 128), (6, 2, 128)],
)
@pytest.mark.parametrize(("num_splits", "window"), [(1, 0), (3, 0), (2, 21), (5, 70)])
def test_decode_attention(
    rng: np.random.Generator,
    activation: Activation,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_splits: int,
    window: int,
    record_property: Record,
) -> None:
    """Split decode and its combination: groups of heads, ragged lengths, windows, a row of padding, empty splits."""
    lengths = [int(rng.integers(1, 150)), 1, int(rng.choice([15, 16, 17]))]
    cache = make_cache(
        rng, activation, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window
    )
    shape, dtype = cache.shape, DTYPES[activation]
    queries = draw(rng, (4, shape.row_stride), activation)
    first_rows = np.array([2, 0, 1, 3], np.int32)  # the fourth sequence is padding
    context_tokens = np.array([*lengths, 0], np.int32)
    tables = np.concatenate((cache.block_tables, np.full((1, shape.table_width), 2**30, np.int32)))

    def make_partial() -> tuple[Launch, tuple[Array, ...]]:
        partial = poisoned((4, num_heads, num_splits, head_dim))
        statistics = poisoned((4, num_heads, num_splits, 2))
        launch = attention.decode_attention(
            activation, shape, partial, statistics, queries, cache.kv_layer, tables, first_rows, context_tokens,
            num_sequences=4, num_splits=num_splits,
        )  # fmt: skip
        return launch, (partial, statistics)

    partial, statistics = run_in_every_order(make_partial)

    def make_combined() -> tuple[Launch, tuple[Array, ...]]:
        out = poisoned((4, num_heads * head_dim), dtype)
        launch = attention.combine_splits(
            activation, shape, out, partial, statistics, first_rows, num_sequences=4, num_splits=num_splits
        )
        return launch, (out,)

    (out,) = run_in_every_order(make_combined)
    expected = np.zeros(out.shape)
    for sequence, length in enumerate(lengths):
        row = first_rows[sequence]
        expected[row] = attend(cache, sequence, length - 1, queries[row])
    error = relative_error(out, expected)
    record_property("relative_error", error)
    assert error < TOLERANCE[activation]


@pytest.mark.parametrize("activation", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"), [(2, 1, 4, 0), (3, 3, 20, 5), (4, 2, 64, 0), (5, 1, 256, 30)]
)
def test_row_attention(
    rng: np.random.Generator,
    activation: Activation,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    record_property: Record,
) -> None:
    """Any head size and any mix: a chunk of prefill, a decode row and a row of padding in one launch."""
    lengths = [int(rng.integers(20, 60)), int(rng.integers(1, 40))]
    cache = make_cache(
        rng, activation, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window
    )
    shape = cache.shape
    positions = np.array([*range(lengths[0] - 6, lengths[0]), lengths[1] - 1, 7], np.int32)
    sequences = np.array([0] * 6 + [1, -1], np.int32)
    queries = draw(rng, (8, shape.row_stride), activation)

    def make() -> tuple[Launch, tuple[Array, ...]]:
        out = poisoned((8, num_heads * head_dim), DTYPES[activation])
        launch = attention.row_attention(
            activation, shape, out, queries, cache.kv_layer, cache.block_tables, sequences, positions, num_rows=8
        )
        return launch, (out,)

    (out,) = run_in_every_order(make)
    expected = np.zeros(out.shape)
    for row in range(7):
        expected[row] = attend(cache, sequences[row], positions[row], queries[row])
    error = relative_error(out, expected)
    record_property("relative_error", error)
    assert error < TOLERANCE[activation]


@pytest.mark.parametrize("activation", ["bf16", "f16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"),
    [(4, 2, 64, 0), (1, 1, 80, 0), (2, 2, 96, 40), (2, 1, 128, 0), (3, 1, 64, 9)],
)
def test_prefill_attention(
    rng: np.random.Generator,
    activation: Activation,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    record_property: Record,
) -> None:
    """Chunks on tensor cores: a whole prompt over several tiles, the tail of a long one, and a single row."""
    lengths = [int(rng.integers(65, 100)), int(rng.integers(40, 120)), int(rng.integers(1, 40))]
    num_rows = [lengths[0], int(rng.integers(2, 20)), 1]
    cache = make_cache(
        rng, activation, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window
    )
    shape = cache.shape
    first_rows = np.array([1, 1 + num_rows[0] + num_rows[2], 1 + num_rows[0]], np.int32)
    total = 1 + sum(num_rows)
    queries = draw(rng, (total, shape.row_stride), activation)
    tiles = attention.list_prefill_tiles(num_rows)

    def make() -> tuple[Launch, tuple[Array, ...]]:
        out = poisoned((total, num_heads * head_dim), DTYPES[activation])
        launch = attention.prefill_attention(
            activation, shape, out, queries, cache.kv_layer, cache.block_tables, tiles, first_rows,
            np.array(num_rows, np.int32), np.array(lengths, np.int32), num_tiles=len(tiles),
        )  # fmt: skip
        return launch, (out,)

    (out,) = run_in_every_order(make)
    assert (out[0].view(np.uint8) == 0xFF).all()  # a row of no sequence
    expected = np.zeros(out.shape)
    for sequence, (length, count) in enumerate(zip(lengths, num_rows, strict=True)):
        for offset in range(count):
            row = first_rows[sequence] + offset
            expected[row] = attend(cache, sequence, length - count + offset, queries[row])
    error = relative_error(out[1:], expected[1:])
    record_property("relative_error", error)
    assert error < TOLERANCE[activation]


def test_choice_of_splits() -> None:
    """Few long sequences are split, many or short ones are not."""
    assert attention.choose_num_splits(1, 8, 8192, 132) == 33
    assert attention.choose_num_splits(64, 8, 8192, 132) == 1
    assert attention.choose_num_splits(1, 1, 100_000, 132) == 64
    assert attention.choose_num_splits(1, 8, 20, 132) == 1
