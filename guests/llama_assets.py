"""Assets of the ``llama`` guest: its configuration and its tokeniser, as the importers describe them.

:func:`pack_config` and :func:`pack_tokenizer` give the bytes that the guest reads at init under the asset names
:data:`CONFIG_ASSET` and :data:`TOKENIZER_ASSET`; the layouts are in ``guests/llama/assets.h``.
"""

from __future__ import annotations

import array
import itertools
import math
import struct
import sys
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Final

from guests.errors import GuestError

CONFIG_ASSET: Final = "config"
TOKENIZER_ASSET: Final = "tokenizer"
ASSET_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape of a Llama-family decoder. ``rope`` frequencies travel as the tensor ``rope.inv_freq`` [head_dim / 2]."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # tokens
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention output projection
    mlp_bias: bool = False  # biases of gate_up and down
    qk_norm: bool = False
    rope_scale: float = 1.0  # factor on rotated queries and keys (YaRN's attention factor)
    sliding_window: int = 0  # tokens; 0: none
    sliding_window_from_layer: int = 0  # layers before this one attend to everything


class TokenizerKind(IntEnum):
    """Algorithm of a tokeniser."""

    BYTE_LEVEL_BPE = 1
    SENTENCEPIECE_BPE = 2  # llama-2 style: scores or merges, U+2581 for spaces, byte fallback


class PreTokenizer(IntEnum):
    """How text is split before byte-level BPE."""

    NONE = 0
    GPT2 = 1
    SMOLLM = 2  # GPT-2 with every digit on its own (also StarCoder)
    LLAMA3 = 3
    QWEN2 = 4


class TokenKind(IntEnum):
    """Kind of a vocabulary entry."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: hidden in output, parsed in prompts
    USER_DEFINED = 4  # added token that is matched verbatim but is ordinary text
    UNUSED = 5
    BYTE = 6  # <0xNN> of byte fallback


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokeniser, independent of the file it came from.

    ``tokens[i]`` is the *text bytes* of token i: for byte-level BPE the real bytes (not the GPT-2 printable
    alphabet), for SentencePiece the UTF-8 piece with U+2581, for BYTE tokens the single byte. ``merges`` are pairs of
    token ids in rank order (``left, right``); a pair whose concatenation is no token is left out by the importer.
    """

    kind: TokenizerKind
    pre_tokenizer: PreTokenizer
    tokens: list[bytes]
    kinds: list[TokenKind]
    scores: list[float] = field(default_factory=list)  # SentencePiece; empty for byte-level
    merges: list[tuple[int, int]] = field(default_factory=list)
    bos_id: int = -1
    eos_ids: list[int] = field(default_factory=list)  # every token that ends a turn
    unk_id: int = -1
    add_bos: bool = False
    add_space_prefix: bool = False  # SentencePiece dummy prefix, before each stretch of ordinary text
    space_prefix_once: bool = False  # ... only at the start of the whole text (Metaspace's prepend_scheme "first")
    space_prefix_if_missing: bool = False  # ... only where no space stands already (Metaspace, not Prepend)
    ignore_merges: bool = False  # Llama-3: a piece that is a whole token is taken as it is
    nfc: bool = False  # Qwen: text between special tokens is put into normalisation form C; byte-level only


class AssetRefused(GuestError, ValueError):
    """A configuration or tokeniser that the guest could not use; the message names the field, its limit and value."""


def pack_config(config: LlamaConfig) -> bytes:
    """The ``config`` asset.

    Raises:
        AssetRefused: a size is zero or beyond its cap, or the sizes contradict each other.
    """
    for name, most in _MOST.items():
        _check_range(name, getattr(config, name), 1, most)
    _check_range("sliding_window", config.sliding_window, 0, config.context_length)
    _check_range("sliding_window_from_layer", config.sliding_window_from_layer, 0, config.num_layers)
    if config.num_heads % config.num_kv_heads:
        raise AssetRefused(f"num_heads={config.num_heads}: expected a multiple of num_kv_heads={config.num_kv_heads}")
    if config.head_dim % 2:
        raise AssetRefused(f"head_dim={config.head_dim}: expected an even number, rotary embeddings turn pairs")
    for name in ("rms_norm_eps", "rope_scale"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise AssetRefused(f"{name}={value}: expected a positive number")
    flags = (
        _ConfigFlag.TIE_EMBEDDINGS * config.tie_embeddings
        | _ConfigFlag.QKV_BIAS * config.qkv_bias
        | _ConfigFlag.OUTPUT_BIAS * config.output_bias
        | _ConfigFlag.MLP_BIAS * config.mlp_bias
        | _ConfigFlag.QK_NORM * config.qk_norm
    )
    return _CONFIG.pack(
        b"GLCF",
        ASSET_VERSION,
        config.num_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        config.context_length,
        flags,
        config.sliding_window,
        config.sliding_window_from_layer,
        config.rms_norm_eps,
        config.rope_scale,
    )


def pack_tokenizer(spec: TokenizerSpec) -> bytes:
    """The ``tokenizer`` asset. Linear in the vocabulary, about 0.1 s for 50,000 tokens.

    Merges whose result is a special token are left out: plain text must never become one.

    Raises:
        AssetRefused: lists of different lengths, ids out of range, sizes beyond their caps, or a tokeniser without
            what its kind needs.
    """
    _check_vocabulary(spec)
    _check_kind(spec)
    texts = [_guest_text(spec, token) for token in range(len(spec.tokens))]
    merges = _resolve_merges(spec, texts)
    by_score = spec.kind is TokenizerKind.SENTENCEPIECE_BPE and not spec.merges
    specials = sorted(
        (token for token, kind in enumerate(spec.kinds) if kind in _WRITTEN_OUT and texts[token]),
        key=lambda token: texts[token],
    )
    offsets = array.array("I", itertools.accumulate(map(len, texts), initial=0))
    flags = (
        _TokenizerFlag.ADD_BOS * (spec.add_bos and spec.bos_id >= 0)
        | _TokenizerFlag.ADD_SPACE_PREFIX * spec.add_space_prefix
        | _TokenizerFlag.SPACE_PREFIX_ONCE * spec.space_prefix_once
        | _TokenizerFlag.SPACE_PREFIX_IF_MISSING * spec.space_prefix_if_missing
        | _TokenizerFlag.IGNORE_MERGES * spec.ignore_merges
        | _TokenizerFlag.MERGES_BY_SCORE * by_score
        | _TokenizerFlag.NFC * spec.nfc
    )
    header = _TOKENIZER.pack(
        b"GLTK",
        ASSET_VERSION,
        spec.kind,
        spec.pre_tokenizer,
        flags,
        len(texts),
        len(merges) // 3,
        len(spec.eos_ids),
        len(specials),
        offsets[-1],
        spec.bos_id if spec.bos_id >= 0 else _NO_TOKEN,
        spec.unk_id if spec.unk_id >= 0 else _NO_TOKEN,
    )
    sections = [
        header,
        _little_endian(offsets),
        _little_endian(array.array("I", spec.eos_ids)),
        _little_endian(array.array("I", specials)),
        _little_endian(_priorities(spec.scores)) if by_score else b"",
        _little_endian(merges),
        bytes(spec.kinds),
        *texts,
    ]
    return b"".join(sections)


_NO_TOKEN: Final = 0xFFFF_FFFF
_SPACE_MARKER: Final = "\u2581".encode()
_CONFIG: Final = struct.Struct("<4s12I2f")
_TOKENIZER: Final = struct.Struct("<4s11I")
_MAX_TOKENS: Final = 1 << 21
_MAX_MERGES: Final = 1 << 22
_MAX_TOKEN_BYTES: Final = 1 << 16
_MAX_TEXT_BYTES: Final = 1 << 28
_MAX_STOP_TOKENS: Final = 256
_MOST: Final = {
    "num_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
    "vocab_size": _MAX_TOKENS,
    "context_length": 1 << 27,
}
_WRITTEN_OUT: Final = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED})
_ORDINARY: Final = frozenset({TokenKind.NORMAL, TokenKind.USER_DEFINED})


class _ConfigFlag(IntFlag):
    TIE_EMBEDDINGS = 1
    QKV_BIAS = 2
    OUTPUT_BIAS = 4
    MLP_BIAS = 8
    QK_NORM = 16


class _TokenizerFlag(IntFlag):
    ADD_BOS = 1
    ADD_SPACE_PREFIX = 2
    IGNORE_MERGES = 4
    MERGES_BY_SCORE = 8
    SPACE_PREFIX_ONCE = 16
    SPACE_PREFIX_IF_MISSING = 32
    NFC = 64


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise AssetRefused(f"{name}={value}: expected {least} to {most}")


def _check_vocabulary(spec: TokenizerSpec) -> None:
    num_tokens = len(spec.tokens)
    _check_range("number of tokens", num_tokens, 1, _MAX_TOKENS)
    _check_range("number of merges", len(spec.merges), 0, _MAX_MERGES)
    _check_range("number of eos_ids", len(spec.eos_ids), 0, _MAX_STOP_TOKENS)
    _check_range("bytes of all tokens", sum(map(len, spec.tokens)), 1, _MAX_TEXT_BYTES)
    if len(spec.kinds) != num_tokens:
        raise AssetRefused(f"{len(spec.kinds)} kinds for {num_tokens} tokens: expected one each")
    if spec.scores and len(spec.scores) != num_tokens:
        raise AssetRefused(f"{len(spec.scores)} scores for {num_tokens} tokens: expected one each, or none")
    for token, (text, kind) in enumerate(zip(spec.tokens, spec.kinds, strict=True)):
        if len(text) > _MAX_TOKEN_BYTES:
            raise AssetRefused(f"token {token} has {len(text)} bytes: expected at most {_MAX_TOKEN_BYTES}")
        if kind is TokenKind.BYTE and len(text) != 1:
            raise AssetRefused(f"byte token {token} has {len(text)} bytes: expected the single byte it stands for")
    for token in spec.eos_ids:
        _check_range("eos id", token, 0, num_tokens - 1)
    _check_range("bos_id", spec.bos_id, -1, num_tokens - 1)
    _check_range("unk_id", spec.unk_id, -1, num_tokens - 1)


def _check_kind(spec: TokenizerSpec) -> None:
    if spec.kind is TokenizerKind.SENTENCEPIECE_BPE:
        if not spec.merges and not spec.scores:
            raise AssetRefused("a SentencePiece tokenizer needs scores or merges: it has neither")
        if any(math.isnan(score) for score in spec.scores):
            raise AssetRefused("a score of the tokenizer is not a number: scores decide which merge comes first")
        if spec.pre_tokenizer is not PreTokenizer.NONE:
            raise AssetRefused(f"pre-tokenizer {spec.pre_tokenizer.name}: SentencePiece splits no words, expected NONE")
    elif spec.add_space_prefix:
        raise AssetRefused("add_space_prefix: only a SentencePiece tokenizer has a dummy prefix")


def _guest_text(spec: TokenizerSpec, token: int) -> bytes:
    """Text of a token as the guest holds it: spaces where SentencePiece writes U+2581."""
    text = spec.tokens[token]
    if spec.kind is TokenizerKind.SENTENCEPIECE_BPE and spec.kinds[token] in _ORDINARY:
        return text.replace(_SPACE_MARKER, b" ")
    return text


def _resolve_merges(spec: TokenizerSpec, texts: list[bytes]) -> array.array[int]:
    """Triples (left, right, merged) in rank order."""
    by_text: dict[bytes, int] = {}
    for token, (text, kind) in enumerate(zip(texts, spec.kinds, strict=True)):
        if kind in _ORDINARY:
            by_text.setdefault(text, token)
    triples = array.array("I")
    for rank, (left, right) in enumerate(spec.merges):
        if not (0 <= left < len(texts) and 0 <= right < len(texts)):
            raise AssetRefused(f"merge {rank} joins tokens {left} and {right}: expected 0 to {len(texts) - 1}")
        merged = by_text.get(texts[left] + texts[right])
        if merged is not None:
            triples.extend((left, right, merged))
    return triples


def _priorities(scores: list[float]) -> array.array[int]:
    """Rank of each score, the highest first; equal scores share one, because then the place in the text decides."""
    rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    return array.array("I", (rank_of[score] for score in scores))


def _little_endian(numbers: array.array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = array.array(numbers.typecode, numbers)
        numbers.byteswap()
    return numbers.tobytes()
