"""Attention of the CPU backend: float32 NumPy over KV blocks, one sequence at a time, in bounded memory.

Keys and values are read where they lie. A sequence's blocks are a few *runs* of neighbouring ones, usually one, and a
run is a plain matrix; scores are computed run by run into one buffer, there is one softmax, and values are summed run
by run. Nothing is gathered. Prompts are attended to in :mod:`~worker.backends.cpu_attention_prompts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from worker.backends.cpu_attention_prompts import attend_many
from worker.backends.cpu_attention_scratch import AttentionScratch, AttentionShape, SeenKeys, SequenceShare, StepRoles
from worker.backends.kv_blocks import KvBlocks, Runs, skip_tokens
from worker.backends.protocol import FloatArray

Call = Callable[[], None]

#: Beyond as many keys BLAS is faster at keys times queries than at queries times keys (3 to 4 times at 500 keys,
#: measured), also with the transposing copy that the softmax then needs.
_MANY_KEYS: Final = 256
#: Keys that a softmax over nine heads gets through in the time of the calls that a softmax of its own would cost.
_PADDED_KEYS_PER_SEQUENCE: Final = 256


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
                    np.copyto(planes[:, begin:end], both[:, first : first + end - begin])
                    first += end - begin

        return append_both

    keys = source[key_column : key_column + size].reshape(num_heads, head_dim, -1).transpose(0, 2, 1)
    values = source[value_column : value_column + size].reshape(num_heads, head_dim, -1).transpose(0, 2, 1)

    def append() -> None:
        planes = memory.layers[layer]
        for share in shares:
            first = share.first
            for begin, end in share.targets:
                np.copyto(planes[:num_heads, begin:end], keys[:, first : first + end - begin])
                np.copyto(planes[num_heads:, begin:end], values[:, first : first + end - begin])
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
    if num_tokens == 1:  # one sequence, and its column is the whole array
        query, out_one = query_heads[..., 0], out_heads[..., 0]
        kind = shape.window_tokens, shape.num_kv_heads, group

        def attend_one() -> None:
            np.multiply(source_queries, shape.score_scale, queries)
            seen = scratch.seen.get(kind)
            if seen is None:  # the same for all layers of that kind
                seen = scratch.seen[kind] = _see_keys(shares[0], shape, scratch)
            _attend_one(query, out_one, memory.layers[shape.layer], seen, scratch)

        return attend_one

    result = scratch.one_result(by_head[:3])
    result_column = result.reshape(width)

    def attend() -> None:
        np.multiply(source_queries, shape.score_scale, queries)
        planes = memory.layers[shape.layer]
        roles = scratch.roles.get(shape.window_tokens)
        if roles is None:
            roles = scratch.roles[shape.window_tokens] = _assign_roles(shares, shape.window_tokens)
        if roles.together:
            _attend_together(queries, out, planes, roles, shape, scratch)
        for share in roles.alone:
            _attend_one(query_heads[..., share.first], result, planes, _see_keys(share, shape, scratch), scratch)
            np.copyto(out[:, share.first], result_column)
        for share in roles.prompts:
            columns = slice(share.first, share.first + share.num_tokens)
            attend_many(query_heads[..., columns], out_heads[..., columns], planes, share, shape, scratch)
        if roles.num_used < num_tokens:
            out[:, roles.num_used :] = 0  # padding columns: finite, whatever the buffer held before

    return attend


def _assign_roles(shares: list[SequenceShare], window_tokens: int) -> StepRoles:
    """How the sequences of a step are attended to, in every layer with that window."""
    singles = [share for share in shares if share.num_tokens == 1]
    prompts = [share for share in shares if share.num_tokens > 1]
    num_used = max(share.first + share.num_tokens for share in shares)
    if len(singles) < 2 or not _is_even(singles):
        return StepRoles([], singles, prompts, num_used)
    first, last = singles[0].first, singles[-1].first
    is_stretch = last - first == len(singles) - 1  # the common case; fancy indexing takes several times as long
    columns = slice(first, last + 1) if is_stretch else [share.first for share in singles]
    return StepRoles([_see_window(share, window_tokens) for share in singles], [], prompts, num_used, columns)


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


def _attend_together(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    roles: StepRoles,
    shape: AttentionShape,
    scratch: AttentionScratch,
) -> None:
    """One query of each of several sequences: ``queries`` and ``out`` are ``[H * Dh, T]``. Two products a sequence, and
    everything between them once for all."""
    num_kv_heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    seen = roles.together
    num_queries = len(seen)
    most_keys = max(num_keys for _, num_keys in seen)
    flat_rows = scratch.one_result((1, num_queries, len(queries)))[0]
    np.copyto(flat_rows, queries[:, roles.columns].T)
    rows = flat_rows.reshape(num_queries, num_kv_heads, group, shape.head_dim)
    scores = scratch.scores(num_queries, shape.num_heads, most_keys)
    scores = scores.reshape(num_queries, num_kv_heads, group, most_keys)
    keys, values = planes[:num_kv_heads], planes[num_kv_heads:]
    matmul = np.matmul
    for query, own, (runs, num_keys) in zip(rows, scores, seen, strict=True):
        if num_keys < most_keys:
            own[:, :, num_keys:] = -np.inf
            own = own[:, :, :num_keys]
        _score_one(query, keys, runs, own, scratch)
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
    out[:, roles.columns] = flat_rows.T


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
    columns = np.array(queries.transpose(0, 2, 1))
    by_key = scratch.by_key(len(keys), num_keys, scores.shape[1])
    for begin, end in runs:
        np.matmul(keys[:, begin:end], columns, by_key[:, first : first + end - begin])
        first += end - begin
    np.copyto(scores, by_key.transpose(0, 2, 1))


def _see_keys(share: SequenceShare, shape: AttentionShape, scratch: AttentionScratch) -> SeenKeys:
    """What the one query of ``share`` sees, and where its scores go."""
    runs, num_keys = _see_window(share, shape.window_tokens)
    num_kv_heads = shape.num_kv_heads
    return SeenKeys(runs, scratch.scores(num_kv_heads, shape.num_heads // num_kv_heads, num_keys))


def _attend_one(
    queries: FloatArray, out: FloatArray, planes: FloatArray, seen: SeenKeys, scratch: AttentionScratch
) -> None:
    """One query of one sequence: ``queries`` and ``out`` are ``[Hkv, G, Dh]``."""
    runs, scores = seen.runs, seen.scores
    num_kv_heads = len(queries)
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
