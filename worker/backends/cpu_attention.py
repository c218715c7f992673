"""Attention of the CPU backend: float32 NumPy over KV blocks, one sequence at a time, in bounded memory.

Keys and values are read where they lie. A sequence's blocks are a few *runs* of neighbouring ones, usually one, and a
run is a plain matrix; scores are computed run by run into one buffer, there is one softmax, and values are summed run
by run. Nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.backends.kv_blocks import KvBlocks, Runs, cut_runs, skip_tokens
from worker.backends.protocol import FloatArray

Call = Callable[[], None]

_QUERY_ROWS: Final = 64
#: Scores held at once; long contexts take fewer query rows a block.
_MAX_SCORES: Final = 4 * 1024 * 1024
#: From as many scores on, prompts are attended to by all threads.
_SCORES_FOR_THREADS: Final = 1024 * 1024
#: Beyond as many keys BLAS is faster at keys times queries than at queries times keys (3 to 4 times at 500 keys,
#: measured), also with the transposing copy that the softmax then needs.
_MANY_KEYS: Final = 256
#: Keys that a softmax over nine heads gets through in the time of the calls that a softmax of its own would cost.
_PADDED_KEYS_PER_SEQUENCE: Final = 256


@dataclass(slots=True)
class SequenceShare:
    """Tokens ``first`` to ``first + num_tokens`` of the step belong to one sequence, at positions ``start`` on.
    ``runs`` of KV memory hold all its tokens, those of the step included; ``targets`` those of the step alone."""

    runs: Runs
    targets: Runs
    first: int
    num_tokens: int
    start: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Immediate operands of an ATTENTION operation."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int  # 0: none
    score_scale: float


class AttentionScratch:
    """Buffers that all attention operations of a model share; grown on demand.

    Long prompts are attended to by ``num_threads`` threads, each with buffers of its own, as BLAS has one (NumPy lets
    go of the interpreter's lock in its loops). The threads start with the first long prompt, never before a fork.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self._others = [AttentionScratch() for _ in range(num_threads - 1)]
        self._executor: ThreadPoolExecutor | None = None
        self._flat: FloatArray = np.empty(0, np.float32)
        self._flat_by_key: FloatArray = np.empty(0, np.float32)
        self._results: dict[tuple[int, int, int], FloatArray] = {}  # of one token, by shape
        # Key j is later than query i where j > i: below the diagonal of [keys, queries].
        self.below_diagonal: FloatArray = np.zeros((_QUERY_ROWS, _QUERY_ROWS), np.float32)
        self.below_diagonal[np.tril_indices(_QUERY_ROWS, k=-1)] = -np.inf

    def one_result(self, shape: tuple[int, int, int]) -> FloatArray:
        """An uninitialised array of that shape, one for all layers and steps: it lasts for one call."""
        found = self._results.get(shape)
        if found is None:
            found = self._results[shape] = np.empty(shape, np.float32)
        return found

    def scores(self, num_heads: int, num_rows: int, num_keys: int) -> FloatArray:
        """An uninitialised array of that shape; the previous one is overwritten."""
        num_elements = num_heads * num_rows * num_keys
        if num_elements > len(self._flat):
            self._flat = np.empty(1 << (num_elements - 1).bit_length(), np.float32)
        return self._flat[:num_elements].reshape(num_heads, num_rows, num_keys)

    def run_parts(self, attend: Callable[[slice, AttentionScratch], None], parts: list[slice]) -> None:
        """Call ``attend`` with each part and buffers of its own, on all threads."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(len(self._others), thread_name_prefix="attention")

        def attend_every(first: int, scratch: AttentionScratch) -> None:
            for part in parts[first :: len(self._others) + 1]:
                attend(part, scratch)

        futures = [self._executor.submit(attend_every, i + 1, other) for i, other in enumerate(self._others)]
        try:
            attend_every(0, self)
        finally:
            wait(futures)  # nobody writes to the buffers after an error here
        for future in futures:
            future.result()

    @property
    def num_threads(self) -> int:
        return 1 + len(self._others)

    def close(self) -> None:
        """End the threads. Idempotent."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def by_key(self, num_heads: int, num_keys: int, group: int) -> FloatArray:
        """An uninitialised array of that shape; the previous one is overwritten."""
        num_elements = num_heads * num_keys * group
        if num_elements > len(self._flat_by_key):
            self._flat_by_key = np.empty(1 << (num_elements - 1).bit_length(), np.float32)
        return self._flat_by_key[:num_elements].reshape(num_heads, num_keys, group)


def bind_kv_append(
    source: FloatArray,
    memory: KvBlocks,
    shares: list[SequenceShare],
    layer: int,
    columns: tuple[int, int],
    heads: tuple[int, int],
) -> Call:
    """Store keys and values of ``source`` ``[N, T]`` (from ``columns``, ``heads`` = number and width) in the blocks."""
    num_heads, head_dim = heads
    key_column, value_column = columns
    size = num_heads * head_dim
    if value_column == key_column + size:  # one copy for both
        both = source[key_column : key_column + 2 * size].reshape(2 * num_heads, head_dim, -1).transpose(0, 2, 1)

        def append_both() -> None:
            planes = memory.layers[layer]
            for share in shares:
                first = share.first
                for begin, end in share.targets:
                    planes[:, begin:end] = both[:, first : first + end - begin]
                    first += end - begin

        return append_both

    keys = source[key_column : key_column + size].reshape(num_heads, head_dim, -1).transpose(0, 2, 1)
    values = source[value_column : value_column + size].reshape(num_heads, head_dim, -1).transpose(0, 2, 1)

    def append() -> None:
        planes = memory.layers[layer]
        for share in shares:
            first = share.first
            for begin, end in share.targets:
                planes[:num_heads, begin:end] = keys[:, first : first + end - begin]
                planes[num_heads:, begin:end] = values[:, first : first + end - begin]
                first += end - begin

    return append


def bind_attention(
    source: FloatArray,
    out: FloatArray,
    queries: FloatArray,
    memory: KvBlocks,
    shares: list[SequenceShare],
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> Call:
    """Causal attention of the queries in ``source`` ``[N, T]``; ``out`` is ``[H * Dh, T]``, ``queries`` scratch of that
    shape.
    """
    width, num_tokens = out.shape
    group = shape.num_heads // shape.num_kv_heads
    by_head = (shape.num_kv_heads, group, shape.head_dim, num_tokens)
    query_heads, out_heads = queries.reshape(by_head), out.reshape(by_head)
    source_queries = source[:width]
    result = scratch.one_result(by_head[:3])
    result_column = result.reshape(width)

    def attend() -> None:
        np.multiply(source_queries, shape.score_scale, queries)
        planes = memory.layers[shape.layer]
        singles = [share for share in shares if share.num_tokens == 1]
        if len(singles) > 1 and _is_even(singles):
            _attend_singles(queries, out, planes, singles, shape, scratch)
            singles = []
        for share in singles:
            _attend_one(query_heads[..., share.first], result, planes, share, shape, scratch)
            out[:, share.first] = result_column
        num_used = 0
        for share in shares:
            first, num_used = share.first, share.first + share.num_tokens
            if share.num_tokens > 1:
                columns = slice(first, num_used)
                _attend_many(query_heads[..., columns], out_heads[..., columns], planes, share, shape, scratch)
        if num_used < num_tokens:
            out[:, num_used:] = 0  # padding columns: finite, whatever the buffer held before

    return attend


def _is_even(singles: list[SequenceShare]) -> bool:
    """Whether a common softmax, padded to the longest sequence, costs less than one for each."""
    lengths = [share.start + 1 for share in singles]
    padding = len(lengths) * max(lengths) - sum(lengths)
    return padding < _PADDED_KEYS_PER_SEQUENCE * len(lengths)


def _see_window(share: SequenceShare, window_tokens: int) -> tuple[Runs, int]:
    """Runs of the keys that a share of one token sees, and their number."""
    num_keys = share.start + 1
    if 0 < window_tokens < num_keys:
        return skip_tokens(share.runs, num_keys - window_tokens), window_tokens
    return share.runs, num_keys


def _attend_singles(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    singles: list[SequenceShare],
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """One query of each of several sequences: ``queries`` and ``out`` are ``[H * Dh, T]``. Two products a sequence, and
    everything between them once for all."""
    num_kv_heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    columns = [share.first for share in singles]
    rows: FloatArray = queries[:, columns].T.copy().reshape(len(singles), num_kv_heads, group, shape.head_dim)
    seen = [_see_window(share, shape.window_tokens) for share in singles]
    most_keys = max(num_keys for _, num_keys in seen)
    scores = scratch.scores(len(singles), shape.num_heads, most_keys)
    scores = scores.reshape(len(singles), num_kv_heads, group, most_keys)
    keys, values = planes[:num_kv_heads], planes[num_kv_heads:]
    matmul = np.matmul
    for query, own, (runs, num_keys) in zip(rows, scores, seen, strict=True):
        _score_one(query, keys, runs, own[:, :, :num_keys], scratch)
        if num_keys < most_keys:
            own[:, :, num_keys:] = -np.inf
    np.subtract(scores, np.maximum.reduce(scores, -1, keepdims=True), scores)
    np.exp(scores, scores)
    sums = np.add.reduce(scores, -1, keepdims=True)
    results = rows  # the queries are done with
    for result, own, (runs, _) in zip(results, scores, seen, strict=True):
        first = 0
        for begin, end in runs:
            weights = own[:, :, first : first + end - begin]
            if first:
                np.add(result, matmul(weights, values[:, begin:end]), result)
            else:
                matmul(weights, values[:, begin:end], result)
            first += end - begin
    np.divide(results, sums, results)
    out[:, columns] = results.reshape(len(singles), -1).T


def _score_one(
    queries: FloatArray, keys: FloatArray, runs: Runs, scores: FloatArray, scratch: AttentionScratch
) -> None:
    """``scores`` ``[Hkv, G, keys]`` of one token's ``queries`` ``[Hkv, G, Dh]`` with ``keys`` ``[Hkv, rows, Dh]``."""
    num_keys = scores.shape[2]
    first = 0
    if num_keys <= _MANY_KEYS:
        for begin, end in runs:
            np.matmul(queries, keys[:, begin:end].transpose(0, 2, 1), scores[..., first : first + end - begin])
            first += end - begin
        return
    columns = queries.transpose(0, 2, 1).copy()
    by_key = scratch.by_key(len(keys), num_keys, scores.shape[1])
    for begin, end in runs:
        np.matmul(keys[:, begin:end], columns, by_key[:, first : first + end - begin])
        first += end - begin
    scores[...] = by_key.transpose(0, 2, 1)


def _attend_one(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    share: SequenceShare,
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """One query of one sequence: ``queries`` and ``out`` are ``[Hkv, G, Dh]``."""
    runs, num_keys = _see_window(share, shape.window_tokens)
    num_kv_heads = shape.num_kv_heads
    scores = scratch.scores(num_kv_heads, shape.num_heads // num_kv_heads, num_keys)
    _score_one(queries, planes[:num_kv_heads], runs, scores, scratch)
    np.subtract(scores, np.maximum.reduce(scores, -1, keepdims=True), scores)
    np.exp(scores, scores)
    first = 0
    for begin, end in runs:
        last = first + end - begin
        if first:
            np.add(out, np.matmul(scores[..., first:last], planes[num_kv_heads:, begin:end]), out)
        else:
            np.matmul(scores[..., :last], planes[num_kv_heads:, begin:end], out)
        first = last
    np.divide(out, np.add.reduce(scores, -1, keepdims=True), out)


def _attend_many(
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
    block_rows = max(1, min(_QUERY_ROWS, _MAX_SCORES // (shape.num_heads * total)))
    uses_threads = scratch.num_threads > 1 and shape.num_heads * total * share.num_tokens >= _SCORES_FOR_THREADS
    if uses_threads:
        block_rows = min(block_rows, -(-share.num_tokens // scratch.num_threads))
    starts = range(0, share.num_tokens, block_rows)
    blocks = [slice(first, min(first + block_rows, share.num_tokens)) for first in starts]

    def attend(block: slice, own: AttentionScratch) -> None:
        _attend_block(queries[..., block], out[..., block], planes, share, block.start, shape, own)

    if uses_threads:
        scratch.run_parts(attend, blocks)
    else:
        for block in blocks:
            attend(block, scratch)


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
    np.subtract(scores, np.maximum.reduce(scores, 1, keepdims=True), scores)
    np.exp(scores, scores)
    sums = np.matmul(np.ones((1, num_keys), np.float32), scores)  # [Hkv, 1, G * queries]
    weighted = _sum_values(planes[num_kv_heads:], scores, runs)
    np.divide(weighted, sums, weighted)
    out[...] = weighted.reshape(num_kv_heads, head_dim, group, num_rows).swapaxes(1, 2)


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
