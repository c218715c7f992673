"""Attention of prompts on the CPU backend: several queries of one sequence, in bounded memory, on all threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.backends.cpu_attention_packed import attend_packed
from worker.backends.cpu_attention_scratch import (
    QUERY_ROWS,
    AttentionScratch,
    AttentionShape,
    SequenceShare,
    Task,
)
from worker.backends.cpu_attention_tiles import TASK_TOKENS, attend_tiles
from worker.backends.kv_blocks import Runs, cut_runs
from worker.backends.protocol import FloatArray

#: Scores held at once; long contexts take fewer query rows a block.
_MAX_SCORES: Final = 4 * 1024 * 1024
#: From as many scores on, prompts are attended to by all threads.
_SCORES_FOR_THREADS: Final = 1024 * 1024
#: From as many keys and tokens on, tiles in bf16 pay: keys and values are rounded anew in each step.
_TILED_KEYS: Final = 1024
_TILED_TOKENS: Final = 64
#: Keys whose scores are compared in one go.
_JOINED_ROWS: Final = 16
#: From as many keys before a portion on, fewer tokens than those are attended to with packed keys.
_PACKED_START: Final = 512
#: Scores of packed keys held at once: they stay in the core's own cache.
_PACKED_SCORES: Final = 512 * 1024


def attend_many(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    share: SequenceShare,
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """Several queries of one sequence, in blocks: ``queries`` and ``out`` are ``[Hkv, G, Dh, T]``.

    The queries of a group lie side by side, so that a key or value is read once for all of them. Scores are
    ``[Hkv, keys, G * queries]``: the softmax then runs along rows, which vectorises.
    """
    total = share.start + share.num_tokens
    num_scores = shape.num_heads * total * share.num_tokens
    if scratch.rounds_long and total >= _TILED_KEYS and share.num_tokens >= _TILED_TOKENS:
        tasks = _list_tile_tasks(queries, out, planes, share, shape)
    elif (
        scratch.rounds_long
        and share.block_table is not None
        and share.start >= _PACKED_START
        and not (0 < shape.window_tokens < total)
    ):
        _attend_packed(queries, out, planes, share, share.block_table, shape, scratch)
        return
    else:
        block_rows = max(1, min(QUERY_ROWS, _MAX_SCORES // (shape.num_heads * total)))
        if num_scores >= _SCORES_FOR_THREADS:
            block_rows = min(block_rows, -(-share.num_tokens // scratch.num_threads))
        blocks = _cut_tokens(share.num_tokens, block_rows)
        tasks = [partial(_attend_block, queries[..., b], out[..., b], planes, share, b.start, shape) for b in blocks]
    if scratch.num_threads > 1 and num_scores >= _SCORES_FOR_THREADS:
        scratch.run_tasks(tasks)
        return
    for task in tasks:
        task(scratch)


def _attend_packed(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    share: SequenceShare,
    block_table: Sequence[int],
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """A portion of a prompt, in stretches of tokens whose scores are few; arrays as in :func:`attend_many`."""
    total = share.start + share.num_tokens
    tiles = scratch.packed.find(block_table, share.start, shape.layer, planes, share.runs)
    num_stretches = -(-share.num_tokens * shape.num_heads * total // _PACKED_SCORES)
    for tokens in _cut_tokens(share.num_tokens, -(-share.num_tokens // num_stretches)):
        own = queries[..., tokens]
        desk = scratch.desk(shape.num_kv_heads, own.shape[1] * own.shape[3], shape.head_dim)
        runs = cut_runs(share.runs, 0, share.start + tokens.stop)
        attend_packed(own, out[..., tokens], planes, runs, tiles, desk, scratch.below_diagonal)


def _cut_tokens(num_tokens: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size)]


def _list_tile_tasks(
    queries: FloatArray, out: FloatArray, planes: FloatArray, share: SequenceShare, shape: AttentionShape
) -> list[Task]:
    """One for each head and stretch of tokens; the last stretch of a prompt first, which has the most keys."""
    return [
        partial(_attend_head, queries[head, ..., tokens], out[head, ..., tokens], planes, share, (head, tokens), shape)
        for tokens in reversed(_cut_tokens(share.num_tokens, TASK_TOKENS))
        for head in range(shape.num_kv_heads)
    ]


def _attend_head(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    share: SequenceShare,
    part: tuple[int, slice],
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """The queries ``[G, Dh, T]`` of one key-value head and one stretch of a share's tokens, which are ``part``."""
    head, tokens = part
    num_tokens = queries.shape[2]
    position = share.start + tokens.start
    end = position + num_tokens
    begin = max(0, position + 1 - shape.window_tokens) if shape.window_tokens else 0

    def mask(tile: FloatArray, first: int, last: int) -> None:
        if last > position + 1:
            late = max(first, position)  # from here on some query must not see the key
            is_late = np.arange(late, last) > np.arange(position, end)[:, None]
            tile[..., late - first :] += np.where(is_late, np.float32(-np.inf), np.float32(0))
        if shape.window_tokens and first <= end - 1 - shape.window_tokens:
            tile += _mask_before_window(position, num_tokens, first, last, shape.window_tokens).T

    keys_values = planes[head], planes[shape.num_kv_heads + head]
    attend_tiles(queries, out, keys_values, cut_runs(share.runs, begin, end), begin, mask, scratch.tiles)


def _attend_block(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    share: SequenceShare,
    first: int,
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """The queries of a share from its token ``first`` on; arrays as in :func:`_attend_many`."""
    num_kv_heads, group, head_dim, num_rows = queries.shape
    position = share.start + first
    end = position + num_rows
    begin = max(0, position + 1 - shape.window_tokens) if shape.window_tokens else 0
    num_keys = end - begin
    runs = cut_runs(share.runs, begin, end)
    grouped: FloatArray = queries.swapaxes(1, 2).reshape(num_kv_heads, head_dim, group * num_rows)
    scores = scratch.scores(num_kv_heads, num_keys, group * num_rows)
    _multiply_keys(planes[:num_kv_heads], grouped, runs, scores)
    by_query = scores.reshape(num_kv_heads, num_keys, group, num_rows)
    by_query[:, num_keys - num_rows :] += scratch.below_diagonal[:num_rows, None, :num_rows]
    if shape.window_tokens:
        by_query += _mask_before_window(position, num_rows, begin, end, shape.window_tokens)[:, None]
    np.subtract(scores, _find_largest(scores), scores)
    np.exp(scores, scores)
    sums = np.matmul(np.ones((1, num_keys), np.float32), scores)  # [Hkv, 1, G * queries]
    weighted = _sum_values(planes[num_kv_heads:], scores, runs)
    np.divide(weighted, sums, weighted)
    out[...] = weighted.reshape(num_kv_heads, head_dim, group, num_rows).swapaxes(1, 2)


def _find_largest(scores: FloatArray) -> FloatArray:
    """``[Hkv, 1, Q]`` of ``[Hkv, keys, Q]``. Rows are joined to long ones first: few columns would not vectorise."""
    num_heads, num_keys, num_queries = scores.shape
    num_joined = num_keys // _JOINED_ROWS
    if num_joined < 2:
        return np.maximum.reduce(scores, 1, keepdims=True)
    joined = scores[:, : num_joined * _JOINED_ROWS].reshape(num_heads, num_joined, -1)
    largest = np.maximum.reduce(joined, 1).reshape(num_heads, _JOINED_ROWS, num_queries)
    rest = scores[:, num_joined * _JOINED_ROWS :]
    return np.maximum.reduce(np.concatenate((largest, rest), 1), 1, keepdims=True)


def _multiply_keys(keys: FloatArray, queries: FloatArray, runs: Runs, scores: FloatArray) -> None:
    """``scores`` ``[Hkv, keys, Q]`` of ``queries`` ``[Hkv, Dh, Q]`` with ``keys`` ``[Hkv, rows, Dh]``."""
    first = 0
    for begin, end in runs:
        np.matmul(keys[:, begin:end], queries, scores[:, first : first + end - begin])
        first += end - begin


def _sum_values(values: FloatArray, scores: FloatArray, runs: Runs) -> FloatArray:
    """``[Hkv, Dh, Q]``: ``values`` ``[Hkv, rows, Dh]`` weighted with ``scores`` ``[Hkv, keys, Q]``."""
    weighted: FloatArray | None = None
    first = 0
    for begin, end in runs:
        part: FloatArray = np.matmul(values[:, begin:end].swapaxes(1, 2), scores[:, first : first + end - begin])
        weighted = part if weighted is None else np.add(weighted, part, weighted)
        first += end - begin
    if weighted is None:
        raise RuntimeError("attention over no keys")
    return weighted


def _mask_before_window(
    position: int, num_rows: int, begin: int, end: int, window_tokens: int
) -> npt.NDArray[np.float32]:
    """``[end - begin, num_rows]``: -inf where a key lies before the query's window."""
    query_positions = np.arange(position, position + num_rows)
    is_outside = np.arange(begin, end)[:, None] <= query_positions - window_tokens
    return np.where(is_outside, np.float32(-np.inf), np.float32(0))
