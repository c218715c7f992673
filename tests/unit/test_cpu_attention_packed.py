"""Attention of small portions of a long prompt over packed keys, against a softmax in float64, and what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.test_cpu_attention_tiles import (
    GROUP,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NUM_ROWS,
    ONE_RUN,
    THREE_RUNS,
    compute_exactly,
)
from worker.backends import cpu_attention_packed, cpu_attention_prompts
from worker.backends.cpu_attention_packed import PACKED_KEYS, PackedPrompts
from worker.backends.cpu_attention_prompts import attend_many
from worker.backends.cpu_attention_scratch import AttentionScratch, AttentionShape, SequenceShare
from worker.backends.kv_blocks import Runs
from worker.backends.protocol import FloatArray

TILE_BYTES = 2 * KV_HEADS * 2 * PACKED_KEYS * HEAD_DIM  # at the least: rows may be padded


def make_planes(seed: int = 7) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((2 * KV_HEADS, NUM_ROWS, HEAD_DIM), np.float32)


def make_queries(num_tokens: int) -> FloatArray:
    rng = np.random.default_rng(8)
    return 0.1 * rng.standard_normal((KV_HEADS, GROUP, HEAD_DIM, num_tokens), np.float32)


def attend(
    scratch: AttentionScratch, planes: FloatArray, share: SequenceShare, *, layer: int = 0, window_tokens: int = 0
) -> tuple[FloatArray, npt.NDArray[Any]]:
    """What the backend computes, and what is right."""
    queries = make_queries(share.num_tokens)
    out = np.full_like(queries, np.nan)
    shape = AttentionShape(layer, HEADS, KV_HEADS, HEAD_DIM, window_tokens, 1.0)
    attend_many(queries, out, planes, share, shape, scratch)
    return out, compute_exactly(queries, planes, share, window_tokens)


@pytest.fixture
def scratch() -> AttentionScratch:
    return AttentionScratch(rounds_long=True)


@pytest.mark.parametrize("runs", [ONE_RUN, THREE_RUNS])
@pytest.mark.parametrize("num_tokens", [2, 8, 63])
@pytest.mark.parametrize("start", [512, 767, 1024])
def test_packed_keys_equal_a_whole_softmax(scratch: AttentionScratch, runs: Runs, num_tokens: int, start: int) -> None:
    """Scattered blocks, starts on and off the edge of a tile, portions of several stretches."""
    kept = [(begin, end) for begin, end in runs]
    total = sum(end - begin for begin, end in kept)
    kept[-1] = (kept[-1][0], kept[-1][1] - (total - start - num_tokens))
    share = SequenceShare(tuple(kept), (), 0, num_tokens, start, block_table=(1, 2))
    found, expected = attend(scratch, make_planes(), share)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert scratch.packed.num_bytes >= start // PACKED_KEYS * TILE_BYTES


def test_stretches_give_the_same(scratch: AttentionScratch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens at a time, with more keys for each stretch than for the one before."""
    share = SequenceShare(((0, 1040),), (), 0, 40, 1000, block_table=(1, 2))
    whole, _ = attend(scratch, make_planes(), share)
    monkeypatch.setattr(cpu_attention_prompts, "_PACKED_SCORES", 1)
    by_token, expected = attend(scratch, make_planes(), share)
    np.testing.assert_allclose(by_token, whole, atol=1e-5)
    np.testing.assert_allclose(by_token, expected, atol=0.01)


def test_portions_of_a_prompt_pack_each_key_once(scratch: AttentionScratch) -> None:
    """Portion by portion, in two layers: what was packed stays, and is added to."""
    planes, table = [make_planes(0), make_planes(1)], tuple(range(80))
    before: list[Any] = []
    for start in range(600, 1100, 50):
        share = SequenceShare(((0, start + 50),), (), 0, 50, start, block_table=table)
        for layer in range(2):
            found, expected = attend(scratch, planes[layer], share, layer=layer)
            np.testing.assert_allclose(found, expected, atol=0.01)
        tiles = scratch.packed.find(table, start, 0, planes[0], share.runs)
        assert len(tiles) == start // PACKED_KEYS
        assert all(tile is known for tile, known in zip(tiles, before, strict=False))
        before = list(tiles)


def test_keys_that_are_written_anew_are_packed_anew(scratch: AttentionScratch) -> None:
    """A step that goes back behind the last tile sees what it wrote, not what was packed."""
    planes, table = make_planes(), (1, 2)
    attend(scratch, planes, SequenceShare(((0, 1100),), (), 0, 8, 1092, block_table=table))
    planes[:, 600:] = make_planes(9)[:, 600:]
    attend(scratch, planes, SequenceShare(((0, 608),), (), 0, 8, 600, block_table=table))
    found, expected = attend(scratch, planes, SequenceShare(((0, 1100),), (), 0, 8, 1092, block_table=table))
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_an_equal_table_is_another_sequence(scratch: AttentionScratch) -> None:
    """Identity counts: the blocks of a sequence that ended may hold another one's keys."""
    first, second = tuple(range(70)), tuple(range(70))
    assert first is not second
    attend(scratch, make_planes(0), SequenceShare(((0, 1100),), (), 0, 8, 1092, block_table=first))
    found, expected = attend(scratch, make_planes(1), SequenceShare(((0, 1100),), (), 0, 8, 1092, block_table=second))
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize(
    "share",
    [
        SequenceShare(((0, 1100),), (), 0, 8, 1092),  # guesses that are verified: no block table
        SequenceShare(((0, 508),), (), 0, 8, 500, block_table=(1, 2)),
    ],
)
def test_others_stay_float32(scratch: AttentionScratch, share: SequenceShare) -> None:
    """Nothing is packed, or rounded, for few keys or for other things than prompts."""
    found, expected = attend(scratch, make_planes(), share)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scratch.packed.num_bytes == 0


def test_a_window_is_kept(scratch: AttentionScratch) -> None:
    """Keys before each query's own window count for nothing."""
    share = SequenceShare(((0, 1100),), (), 0, 8, 1092, block_table=(1, 2))
    found, expected = attend(scratch, make_planes(), share, window_tokens=700)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_packed_bytes_are_bounded() -> None:
    """The prompt that was used longest ago goes first; one alone is packed as far as there is room."""
    planes, tables = make_planes(), [(1,), (2,), (3,)]
    one = PackedPrompts()
    one.find(tables[0], PACKED_KEYS, 0, planes, ONE_RUN)
    prompts = PackedPrompts(max_bytes=4 * one.num_bytes)
    for table in tables[:2]:
        assert len(prompts.find(table, 2 * PACKED_KEYS, 0, planes, ONE_RUN)) == 2
    assert len(prompts.find(tables[2], PACKED_KEYS, 0, planes, ONE_RUN)) == 1
    assert prompts.num_bytes == 3 * one.num_bytes  # the first one's went
    assert len(prompts.find(tables[2], 5 * PACKED_KEYS, 0, planes, ONE_RUN)) == 4
    assert prompts.num_bytes == 4 * one.num_bytes


def test_nothing_is_packed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that has all the room there is costs no packing in the portions that follow."""
    planes, table = make_planes(), (1,)
    one = PackedPrompts()
    one.find(table, PACKED_KEYS, 0, planes, ONE_RUN)
    prompts = PackedPrompts(max_bytes=2 * one.num_bytes)
    assert len(prompts.find(table, 3 * PACKED_KEYS, 0, planes, ONE_RUN)) == 2
    monkeypatch.setattr(cpu_attention_packed, "_pack", None)
    assert len(prompts.find(table, 4 * PACKED_KEYS, 0, planes, ONE_RUN)) == 2
    assert prompts.find(table, 4 * PACKED_KEYS, 1, planes, ONE_RUN) == []


def test_what_ended_is_forgotten() -> None:
    """A sequence whose blocks are given back, or that is a prompt no more, keeps no memory."""
    planes, tables = make_planes(), [(1, 2), (3, 4), (5, 6)]
    prompts = PackedPrompts()
    for table in tables:
        prompts.find(table, PACKED_KEYS, 0, planes, ONE_RUN)
    each = prompts.num_bytes // 3
    prompts.forget_blocks([4, 9])
    assert prompts.num_bytes == 2 * each
    prompts.forget(tables[0])
    prompts.forget(tables[0])
    assert prompts.num_bytes == each
    prompts.clear()
    assert prompts.num_bytes == 0


def test_attention_over_the_longest_score_row(scratch: AttentionScratch) -> None:
    """One key that outweighs all others by far, in a tile and behind the tiles: no overflow, no loss."""
    for winner in (100, 1095):
        planes = make_planes()
        planes[:KV_HEADS, winner] *= 1e4
        share = SequenceShare(((0, 1100),), (), 0, 2, 1098, block_table=(winner,))
        found, expected = attend(scratch, planes, share)
        np.testing.assert_allclose(found, expected, atol=0.02)
