"""From logits in host memory to tokens, for backends that compute on the CPU: NumPy, one row after the other.

A row's token depends on its own logits and its own :class:`SamplingRow` alone, bit for bit: no sum, no maximum and no
draw spans rows, so whatever else is in the batch changes nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.backends.sampling_rows import NO_CHOICE, Logprobs, SampledToken, SamplingRow

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

#: Weights are summed in blocks of so many: the draw finds its block first and walks only that one.
BLOCK_WEIGHTS: Final = 256


def sample_rows(logits: FloatArray, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """One token for each of ``rows``, in order, out of ``logits`` ``[R, V]`` (not changed).

    Where no token can be chosen, ``token_id`` is :data:`NO_CHOICE`. Cost: greedy rows that change nothing share one
    pass over the logits; any other row is one to three passes of its own.
    """
    best = _choose_best(logits, [row.row for row in rows if _is_plain_greedy(row)])
    sampled = []
    for row in rows:
        row_logits = logits[row.row]
        token_id = best[row.row] if _is_plain_greedy(row) else _choose(row_logits, row)
        logprobs = None
        if row.num_top_logprobs is not None and token_id != NO_CHOICE:
            logprobs = compute_logprobs(row_logits, token_id, row.num_top_logprobs)
        sampled.append(SampledToken(token_id, logprobs))
    return sampled


def adjust_scores(logits: FloatArray, row: SamplingRow) -> FloatArray:
    """``logits`` ``[V]`` after penalties and bias: a copy, or ``logits`` itself where neither changes anything."""
    has_counted = len(row.counted_ids) > 0 and (row.frequency_penalty != 0 or row.presence_penalty != 0)
    has_seen = len(row.seen_ids) > 0 and row.repetition_penalty != 1
    if not (has_counted or has_seen or len(row.bias_ids)):
        return logits
    scores = logits.copy()
    if has_seen:
        # Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; prompt tokens count too.
        values = scores[row.seen_ids]
        penalty = np.float32(row.repetition_penalty)
        scores[row.seen_ids] = np.where(values > 0, values / penalty, values * penalty)
    if has_counted:
        scores[row.counted_ids] -= row.frequency_penalty * row.counts + np.float32(row.presence_penalty)
    if len(row.bias_ids):
        scores[row.bias_ids] += row.bias_values
    return scores


def choose_candidates(scores: FloatArray, row: SamplingRow) -> tuple[IdArray | None, FloatArray]:
    """Token ids that may be drawn, with unnormalised probabilities; ids None means every token in order.

    No weight at all means that no token can be chosen.
    """
    ids: IdArray | None = None
    if row.allowed is not None:
        ids = list_allowed(row.allowed, len(scores))
        scores = scores[ids]
    best = float(scores.max()) if len(scores) else -math.inf
    if not math.isfinite(best):
        return ids, scores[:0]
    if 0 < row.top_k < len(scores):
        kept = np.sort(np.argpartition(scores, len(scores) - row.top_k)[-row.top_k :])
        ids, scores = (kept if ids is None else ids[kept]), scores[kept]
    # Subtracting before dividing keeps a tiny temperature from overflowing.
    weights = scores - np.float32(best)
    if row.temperature != 1:
        weights /= np.float32(row.temperature)
    np.exp(weights, out=weights)
    if row.top_p < 1:
        kept = choose_nucleus(weights, row.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if row.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(row.min_p) * weights.max())
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def choose_nucleus(weights: FloatArray, top_p: float) -> IdArray:
    """Indices of the fewest largest ``weights`` that hold at least ``top_p`` of their sum, largest first.

    Only entries above ``(1 - top_p) * sum / len`` are sorted: all that lie below hold less than ``1 - top_p``
    together, so the nucleus is above. Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    total = float(weights.sum(dtype=np.float64))
    threshold = max(1.0 - top_p, 0.0) * total / len(weights)
    possible = np.flatnonzero(weights >= threshold)
    order = possible[np.argsort(-weights[possible], kind="stable")]
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    num_kept = int(np.searchsorted(cumulative, top_p * total, side="left")) + 1
    return order[:num_kept]


def draw_index(weights: FloatArray, uniform: float) -> int:
    """The index whose stretch of the cumulative ``weights`` holds ``uniform`` of their sum: inverse CDF.

    An index of weight 0 is never drawn. Requires: a positive, finite sum.
    """
    num_whole = len(weights) - len(weights) % BLOCK_WEIGHTS
    sums = np.zeros(num_whole // BLOCK_WEIGHTS + 1, np.float32)
    # A sum over the last axis by `sum` takes three times as long, and one by BLAS may start threads.
    np.einsum("ij->i", weights[:num_whole].reshape(-1, BLOCK_WEIGHTS), out=sums[:-1])
    sums[-1] = weights[num_whole:].sum()
    cumulative = sums.cumsum(dtype=np.float64)
    target = uniform * float(cumulative[-1])
    block = _find_stretch(cumulative, target)
    inside = weights[block * BLOCK_WEIGHTS : (block + 1) * BLOCK_WEIGHTS].cumsum(dtype=np.float64)
    # The block's float32 sum may exceed its float64 one by a rounding: then the last weight that counts is meant.
    return block * BLOCK_WEIGHTS + _find_stretch(inside, target - (float(cumulative[block - 1]) if block else 0.0))


def compute_logprobs(logits: FloatArray, token_id: int, num_top: int) -> Logprobs:
    """Natural-log softmax of ``logits`` ``[V]`` at ``token_id`` and at the ``num_top`` best tokens."""
    best = float(logits.max())
    log_total = best + math.log(float(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    chosen = float(logits[token_id]) - log_total
    if num_top <= 0:
        return Logprobs(chosen, ())
    num_top = min(num_top, len(logits))
    candidates = np.argpartition(logits, len(logits) - num_top)[-num_top:]
    ordered = candidates[np.lexsort((candidates, -logits[candidates]))]
    return Logprobs(chosen, tuple((int(token), float(logits[token]) - log_total) for token in ordered))


def list_allowed(allowed: npt.NDArray[np.uint32], vocab_size: int) -> IdArray:
    """The token ids whose bit is set, ascending."""
    return np.flatnonzero(np.unpackbits(allowed.view(np.uint8), count=vocab_size, bitorder="little"))


def _find_stretch(cumulative: npt.NDArray[np.float64], target: float) -> int:
    """The index whose stretch holds ``target``; beyond all, the last one that is not empty."""
    index = int(cumulative.searchsorted(target, side="right"))
    return index if index < len(cumulative) else int(cumulative.searchsorted(cumulative[-1]))


def _is_plain_greedy(row: SamplingRow) -> bool:
    """The token is the argmax of the logits as they are."""
    return (
        row.temperature <= 0
        and row.allowed is None
        and not len(row.bias_ids)
        and (row.repetition_penalty == 1 or not len(row.seen_ids))
        and not len(row.counted_ids)
    )


def _choose_best(logits: FloatArray, rows: list[int]) -> dict[int, int]:
    """The best token of each of ``rows``, in one pass."""
    if not rows:
        return {}
    chosen = logits if rows == list(range(len(logits))) else logits[rows]
    tokens = chosen.argmax(axis=1)
    finite = np.isfinite(chosen[np.arange(len(rows)), tokens])
    return {
        row: int(token) if is_finite else NO_CHOICE for row, token, is_finite in zip(rows, tokens, finite, strict=True)
    }


def _choose(logits: FloatArray, row: SamplingRow) -> int:
    scores = adjust_scores(logits, row)
    if row.temperature <= 0:
        return _choose_greedily(scores, row)
    ids, weights = choose_candidates(scores, row)
    if not len(weights):
        return NO_CHOICE
    index = draw_index(weights, row.uniform)
    return int(index if ids is None else ids[index])


def _choose_greedily(scores: FloatArray, row: SamplingRow) -> int:
    ids = None
    if row.allowed is not None:
        ids = list_allowed(row.allowed, len(scores))
        scores = scores[ids]
    if not len(scores):
        return NO_CHOICE
    index = int(scores.argmax())
    if not math.isfinite(float(scores[index])):
        return NO_CHOICE
    return int(index if ids is None else ids[index])
