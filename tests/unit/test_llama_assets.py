"""pack_config and pack_tokenizer: the layout that the guest reads, and what is refused with which words."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from guests.errors import GuestError
from guests.llama_assets import (
    AssetRefused,
    LlamaConfig,
    PreTokenizer,
    TokenizerKind,
    TokenizerSpec,
    TokenKind,
    pack_config,
    pack_tokenizer,
)

CONFIG = LlamaConfig(
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=96,
    context_length=128,
    rms_norm_eps=0.5,
    tie_embeddings=True,
    mlp_bias=True,
    qk_norm=True,
    rope_scale=2.0,
    sliding_window=16,
    sliding_window_from_layer=1,
)
SPEC = TokenizerSpec(
    kind=TokenizerKind.BYTE_LEVEL_BPE,
    pre_tokenizer=PreTokenizer.QWEN2,
    tokens=[b"a", b"b", b"ab", b"<z>", b"<e>"],
    kinds=[TokenKind.NORMAL, TokenKind.NORMAL, TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.CONTROL],
    merges=[(0, 1), (0, 0)],
    eos_ids=[4],
)
SENTENCEPIECE = TokenizerSpec(
    kind=TokenizerKind.SENTENCEPIECE_BPE,
    pre_tokenizer=PreTokenizer.NONE,
    tokens=[b"<unk>", b"\x07", "\u2581a".encode(), "<\u2581>".encode()],
    kinds=[TokenKind.UNKNOWN, TokenKind.BYTE, TokenKind.NORMAL, TokenKind.CONTROL],
    scores=[0.0, 0.0, -1.5, 3.0],
    unk_id=0,
    add_space_prefix=True,
)


def test_config_layout_is_golden() -> None:
    """The config asset's 60 bytes, field by field; another order or size needs a new version."""
    flags = 1 | 8 | 16
    expected = struct.pack("<4s12I2f", b"GLCF", 1, 2, 32, 48, 4, 2, 8, 96, 128, flags, 16, 1, 0.5, 2.0)
    assert pack_config(CONFIG) == expected
    assert len(expected) == 60


def test_byte_level_layout_is_golden() -> None:
    """Header, offsets, stop tokens, sorted special tokens, resolved merges, kinds, text; a merge to nothing is gone."""
    header = struct.pack("<4s11I", b"GLTK", 1, 1, 4, 0, 5, 1, 1, 2, 10, 0xFFFF_FFFF, 0xFFFF_FFFF)
    numbers = struct.pack("<6I1I2I3I", 0, 1, 2, 4, 7, 10, 4, 4, 3, 0, 1, 2)
    assert pack_tokenizer(SPEC) == header + numbers + bytes([1, 1, 1, 4, 3]) + b"abab<z><e>"


def test_sentencepiece_layout_is_golden() -> None:
    """Scores become ranks, the highest first, and U+2581 becomes a space in ordinary tokens only."""
    header = struct.pack("<4s11I", b"GLTK", 1, 2, 0, 2 | 8, 4, 0, 0, 2, 13, 0xFFFF_FFFF, 0)
    numbers = struct.pack("<5I2I4I", 0, 5, 6, 8, 13, 0, 3, 1, 1, 2, 0)
    expected = header + numbers + bytes([2, 6, 1, 3]) + b"<unk>\x07 a" + "<\u2581>".encode()
    assert pack_tokenizer(SENTENCEPIECE) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0: expected 1 to 1024"),
        ({"num_layers": 1025}, "num_layers=1025"),
        ({"vocab_size": 1 << 22}, "vocab_size=4194304"),
        ({"head_dim": 7}, "head_dim=7: expected an even number"),
        ({"num_kv_heads": 3}, "num_heads=4: expected a multiple of num_kv_heads=3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: expected a positive number"),
        ({"rope_scale": 0.0}, "rope_scale=0.0"),
        ({"sliding_window": -1}, "sliding_window=-1: expected 0 to 128"),
        ({"sliding_window_from_layer": 3}, "sliding_window_from_layer=3: expected 0 to 2"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    """Each refusal names the field, what it may be and what it is."""
    with pytest.raises(AssetRefused, match=message):
        pack_config(replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [], "kinds": []}, "number of tokens=0"),
        ({"kinds": [TokenKind.NORMAL]}, "1 kinds for 5 tokens"),
        ({"scores": [0.0]}, "1 scores for 5 tokens"),
        ({"eos_ids": [5]}, "eos id=5: expected 0 to 4"),
        ({"eos_ids": [0] * 257}, "number of eos_ids=257"),
        ({"bos_id": 5}, "bos_id=5: expected -1 to 4"),
        ({"unk_id": -2}, "unk_id=-2"),
        ({"merges": [(0, 5)]}, "merge 0 joins tokens 0 and 5"),
        ({"kinds": [TokenKind.NORMAL] * 4 + [TokenKind.BYTE]}, "byte token 4 has 3 bytes"),
        ({"tokens": [b"a", b"b", b"x" * 65_537, b"", b""]}, "token 2 has 65537 bytes"),
        ({"add_space_prefix": True}, "only a SentencePiece tokenizer"),
        ({"kind": TokenizerKind.SENTENCEPIECE_BPE}, "pre-tokenizer QWEN2"),
    ],
)
def test_impossible_tokenizers_are_refused(change: dict[str, Any], message: str) -> None:
    """Each refusal says what does not fit; nothing reaches the guest that it would have to refuse."""
    with pytest.raises(AssetRefused, match=message):
        pack_tokenizer(replace(SPEC, **change))


def test_sentencepiece_needs_an_order_of_merges() -> None:
    """Without scores and merges, or with a score that is no number, there is no order to merge in."""
    with pytest.raises(AssetRefused, match="needs scores or merges"):
        pack_tokenizer(replace(SENTENCEPIECE, scores=[]))
    with pytest.raises(AssetRefused, match="not a number"):
        pack_tokenizer(replace(SENTENCEPIECE, scores=[0.0, 0.0, float("nan"), 0.0]))


def test_a_refusal_is_a_guest_error_and_a_value_error() -> None:
    """Callers of the package catch its base; callers who passed a bad value may catch ValueError."""
    assert issubclass(AssetRefused, GuestError)
    assert issubclass(AssetRefused, ValueError)
