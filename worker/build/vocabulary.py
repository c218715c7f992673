"""What all vocabularies share: the byte-level alphabet, merges by id, end-of-turn tokens, padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from guests.llama_assets import TokenizerSpec, TokenKind
from worker.build.errors import MalformedModelError

log = structlog.get_logger()

#: Texts of tokens that end a turn in the supported model families, beside the one a file names as its EOS.
END_OF_TURN_TEXTS: Final = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<|endofturn|>",
        "</s>",
    }
)
#: Kinds that no ordinary text is merged into.
SPECIAL_KINDS: Final = frozenset({TokenKind.CONTROL, TokenKind.USER_DEFINED})


def _make_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: each of 256 bytes is one character, itself where that is visible.

    Source: OpenAI's GPT-2 encoder.py, ``bytes_to_unicode``.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


BYTE_ALPHABET: Final = _make_alphabet()


def decode_byte_level(text: str) -> bytes:
    """Real bytes of a byte-level token; its UTF-8 where it has characters outside the alphabet (added tokens)."""
    try:
        return bytes([BYTE_ALPHABET[character] for character in text])
    except KeyError:
        return text.encode()


def decode_byte_token(text: str) -> bytes:
    """The byte of a byte-fallback token ``<0xNN>``.

    Raises:
        MalformedModelError: any other text.
    """
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    raise MalformedModelError(f"byte token {text[:40]!r}: expected the form <0x0A>")


def resolve_merges(pairs: Iterable[tuple[str, str]], ids: dict[str, int]) -> list[tuple[int, int]]:
    """Merges as pairs of token ids, in rank order; pairs that make no token are left out."""
    return [(ids[left], ids[right]) for left, right in pairs if left in ids and right in ids and left + right in ids]


def collect_end_ids(preferred: Iterable[int], texts: Sequence[str], kinds: Sequence[TokenKind]) -> list[int]:
    """Every token that ends a turn: the ids a model names, in order, then special tokens of known text.

    Raises:
        MalformedModelError: a named id is no token.
    """
    ordered: dict[int, None] = {}
    for token_id in preferred:
        if not 0 <= token_id < len(texts):
            raise MalformedModelError(f"end-of-sequence id {token_id}: the vocabulary has {len(texts)} tokens")
        ordered[token_id] = None
    for token_id, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind in SPECIAL_KINDS and text in END_OF_TURN_TEXTS:
            ordered[token_id] = None
    return list(ordered)


def fit_to_vocabulary(spec: TokenizerSpec, vocab_size: int) -> TokenizerSpec:
    """``spec`` with exactly ``vocab_size`` tokens: rows of the embedding without a token become UNUSED.

    Special tokens beyond the embedding (added to a tokeniser but never trained) are dropped with a warning.

    Raises:
        MalformedModelError: ordinary tokens without a row, a begin-of-sequence id that is no token, or none
            where the model adds one.
    """
    num_tokens = len(spec.tokens)
    if any(kind not in SPECIAL_KINDS for kind in spec.kinds[vocab_size:]):
        raise MalformedModelError(f"the tokeniser has {num_tokens} tokens, the embedding {vocab_size} rows")
    if num_tokens > vocab_size:
        log.warning("special tokens without an embedding are left out", count=num_tokens - vocab_size)
    if spec.add_bos and spec.bos_id < 0:
        raise MalformedModelError("the tokeniser adds a begin-of-sequence token but names none")
    if spec.bos_id >= vocab_size or spec.unk_id >= vocab_size:
        raise MalformedModelError(
            f"begin-of-sequence id {spec.bos_id}, unknown id {spec.unk_id}: the vocabulary has {vocab_size} tokens"
        )
    missing = max(vocab_size - num_tokens, 0)
    return replace(
        spec,
        tokens=spec.tokens[:vocab_size] + [b""] * missing,
        kinds=spec.kinds[:vocab_size] + [TokenKind.UNUSED] * missing,
        scores=spec.scores[:vocab_size] + [0.0] * missing if spec.scores else [],
        eos_ids=[token_id for token_id in spec.eos_ids if token_id < vocab_size],
    )
