"""Assets of the ``llama`` guest: its configuration and its tokeniser, as the importers describe them.

:func:`pack_config` and :func:`pack_tokenizer` give the bytes that the guest reads at init under the asset names
:data:`CONFIG_ASSET` and :data:`TOKENIZER_ASSET`; the layouts are in ``guests/llama/assets.h``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

CONFIG_ASSET: Final = "config"
TOKENIZER_ASSET: Final = "tokenizer"


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
    add_space_prefix: bool = False  # SentencePiece dummy prefix
    ignore_merges: bool = False  # Llama-3: a piece that is a whole token is taken as it is
