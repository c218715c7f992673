"""Attention of long prompts in bf16 tiles, against a softmax in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from worker.backends import cpu_attention_prompts
from worker.backends.cpu_attention_prompts import attend_many
from worker.backends.cpu_attention_scratch import AttentionScratch, AttentionShape, SequenceShare
from worker.backends.kv_blocks import Runs
from worker.backends.protocol import FloatArray

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
GROUP = HEADS // KV_HEADS
NUM_ROWS = 1600
ONE_RUN: Runs = ((0, 1300),)
THREE_RUNS: Runs = ((1000, 1500), (16, 700), (720, 836))


def compute_exactly(
    queries: FloatArray, planes: FloatArray, share: SequenceShare, window_tokens: int
) -> npt.NDArray[Any]:
    """``[Hkv, G, Dh, T]`` in float64, one row of scores after the other."""
    rows = np.concatenate([np.arange(begin, end) for begin, end in share.runs])
    result = np.zeros(queries.shape)
    for token in range(share.num_tokens):
        position = share.start + token
        first = max(0, position + 1 - window_tokens) if window_tokens else 0
        seen = rows[first : position + 1]
        for head in range(KV_HEADS):
            scores = queries[head, :, :, token].astype(float) @ planes[head, seen].T.astype(float)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            result[head, :, :, token] = weights @ planes[KV_HEADS + head, seen].astype(float)
    return result


def attend(
    share: SequenceShare, *, window_tokens: int = 0, score_step: float = 0.0, num_threads: int = 1
) -> tuple[FloatArray, npt.NDArray[Any]]:
    """What the backend computes, and what is right. With a ``score_step`` every tenth of the keys scores as much higher
    than the one before, and nothing else counts."""
    rng = np.random.default_rng(7)
    planes = rng.standard_normal((2 * KV_HEADS, NUM_ROWS, HEAD_DIM), np.float32)
    queries = 0.1 * rng.standard_normal((KV_HEADS, GROUP, HEAD_DIM, share.num_tokens), np.float32)
    if score_step:
        order = np.concatenate([np.arange(begin, end) for begin, end in share.runs])
        planes[:KV_HEADS, order, 0] = np.arange(len(order)) * 10 // len(order)
        queries[...] = 0
        queries[:, :, 0] = score_step
    out = np.full_like(queries, np.nan)
    shape = AttentionShape(0, HEADS, KV_HEADS, HEAD_DIM, window_tokens, 1.0)
    scratch = AttentionScratch(num_threads, rounds_long=True)
    try:
        attend_many(queries, out, planes, share, shape, scratch)
    finally:
        scratch.close()
    return out, compute_exactly(queries, planes, share, window_tokens)


@pytest.mark.parametrize("runs", [ONE_RUN, THREE_RUNS])
@pytest.mark.parametrize("num_tokens", [64, 150])
def test_tiles_equal_a_whole_softmax(runs: Runs, num_tokens: int) -> None:
    """Scattered blocks, tiles that end within the prompt's own tokens, tasks of unequal size."""
    share = SequenceShare(runs, (), 0, num_tokens, 1300 - num_tokens)
    found, expected = attend(share)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_window() -> None:
    """Keys before each query's own window count for nothing."""
    found, expected = attend(SequenceShare(ONE_RUN, (), 0, 200, 1100), window_tokens=700)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_scores_that_outgrow_the_first_tile() -> None:
    """Scores more than 88 above the first tile's would overflow: the maximum is then followed."""
    found, expected = attend(SequenceShare(ONE_RUN, (), 0, 64, 1236), score_step=32.0)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_threads_share_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads compute the very same numbers as one."""
    monkeypatch.setattr(cpu_attention_prompts, "_SCORES_FOR_THREADS", 1)
    share = SequenceShare(ONE_RUN, (), 0, 150, 1150)
    alone, _ = attend(share, num_threads=1)
    together, _ = attend(share, num_threads=2)
    np.testing.assert_array_equal(together, alone)


def test_short_prompts_are_not_rounded() -> None:
    """Below 1,024 keys attention stays float32."""
    found, expected = attend(SequenceShare(ONE_RUN, (), 0, 100, 800))
    np.testing.assert_allclose(found, expected, atol=1e-5)
