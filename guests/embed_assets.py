"""Assets of the ``embed`` guest: the encoder's configuration and its WordPiece tokeniser.

:func:`pack_encoder_config` and :func:`pack_wordpiece` give the bytes that the guest reads at init under the asset names
``config`` and ``tokenizer``; the layouts are in ``guests/embed/assets.h``.
"""

from __future__ import annotations

import array
import itertools
import math
import struct
import sys
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from guests.llama_assets import AssetRefused

ASSET_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Shape of a BERT-family encoder. ``context_length`` counts the special tokens around a text."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    num_positions: int
    context_length: int  # tokens
    layer_norm_eps: float
    normalise: bool  # vectors of length 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class WordPieceSpec:
    """A BERT tokeniser. ``tokens[i]`` is the text of token i, with ``##`` before pieces that continue a word;
    ``specials`` are tokens that a text may spell out, which words never become."""

    tokens: list[str]
    specials: list[int]
    first_id: int  # [CLS]
    last_id: int  # [SEP]
    unknown_id: int
    clean_text: bool = True
    space_cjk: bool = True
    strip_accents: bool = True
    lowercase: bool = True
    most_word_chars: int = 100  # longer words are unknown


def pack_encoder_config(config: EncoderConfig) -> bytes:
    """The ``config`` asset.

    Raises:
        AssetRefused: a size is zero or beyond its cap, or the sizes contradict each other.
    """
    for name, most in _MOST.items():
        _check_range(name, getattr(config, name), 1, most)
    _check_range("context_length", config.context_length, 2, config.num_positions)
    if config.hidden_size % config.num_heads:
        raise AssetRefused(f"hidden_size={config.hidden_size}: expected a multiple of num_heads={config.num_heads}")
    if not (math.isfinite(config.layer_norm_eps) and config.layer_norm_eps > 0):
        raise AssetRefused(f"layer_norm_eps={config.layer_norm_eps}: expected a positive number")
    return _CONFIG.pack(
        b"GECF",
        ASSET_VERSION,
        config.num_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.head_dim,
        config.vocab_size,
        config.num_positions,
        config.context_length,
        _ConfigFlag.NORMALISE * config.normalise,
        config.layer_norm_eps,
    )


def pack_wordpiece(spec: WordPieceSpec) -> bytes:
    """The ``tokenizer`` asset. Linear in the vocabulary.

    Raises:
        AssetRefused: ids out of range, or sizes beyond their caps.
    """
    _check_range("number of tokens", len(spec.tokens), 1, _MAX_TOKENS)
    _check_range("number of special tokens", len(spec.specials), 0, _MAX_SPECIALS)
    _check_range("most_word_chars", spec.most_word_chars, 1, _MAX_WORD_CHARS)
    for name, token in (("first_id", spec.first_id), ("last_id", spec.last_id), ("unknown_id", spec.unknown_id)):
        _check_range(name, token, 0, len(spec.tokens) - 1)
    for token in spec.specials:
        _check_range("special token", token, 0, len(spec.tokens) - 1)
        if not spec.tokens[token]:
            raise AssetRefused(f"special token {token} has no text")
    texts = [token.encode() for token in spec.tokens]
    offsets = array.array("I", itertools.accumulate(map(len, texts), initial=0))
    _check_range("bytes of all tokens", offsets[-1], 1, _MAX_TEXT_BYTES)
    flags = (
        _TokenizerFlag.CLEAN_TEXT * spec.clean_text
        | _TokenizerFlag.SPACE_CJK * spec.space_cjk
        | _TokenizerFlag.STRIP_ACCENTS * spec.strip_accents
        | _TokenizerFlag.LOWERCASE * spec.lowercase
    )
    header = _TOKENIZER.pack(
        b"GETK",
        ASSET_VERSION,
        flags,
        len(texts),
        len(spec.specials),
        offsets[-1],
        spec.first_id,
        spec.last_id,
        spec.unknown_id,
        spec.most_word_chars,
        0,
    )
    sections = [header, _little_endian(offsets), _little_endian(array.array("I", spec.specials)), *texts]
    return b"".join(sections)


_CONFIG: Final = struct.Struct("<4s10If")
_TOKENIZER: Final = struct.Struct("<4s10I")
_MAX_TOKENS: Final = 1 << 21
_MAX_SPECIALS: Final = 256
_MAX_WORD_CHARS: Final = 1024
_MAX_TEXT_BYTES: Final = 1 << 28
_MOST: Final = {
    "num_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_heads": 1024,
    "vocab_size": _MAX_TOKENS,
    "num_positions": 1 << 20,
}


class _ConfigFlag(IntFlag):
    NORMALISE = 1


class _TokenizerFlag(IntFlag):
    CLEAN_TEXT = 1
    SPACE_CJK = 2
    STRIP_ACCENTS = 4
    LOWERCASE = 8


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise AssetRefused(f"{name}={value}: expected {least} to {most}")


def _little_endian(numbers: array.array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = array.array(numbers.typecode, numbers)
        numbers.byteswap()
    return numbers.tobytes()
