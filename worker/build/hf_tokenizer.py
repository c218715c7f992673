"""Tokeniser of a Hugging Face folder: ``tokenizer.json`` as a :class:`TokenizerSpec`.

Two families are read: byte-level BPE (GPT-2, SmolLM, Llama-3 and Qwen2 splits) and SentencePiece-style BPE with byte
fallback (Llama 2, Mistral). What the file asks of normaliser, pre-tokeniser and post-processor is compared with the
shapes those families have; anything else is refused by name, since a near miss would tokenise silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from guests.llama_assets import PreTokenizer, TokenizerKind, TokenizerSpec, TokenKind
from worker.build.errors import MalformedModelError, UnsupportedModelError
from worker.build.vocabulary import (
    collect_end_ids,
    decode_byte_level,
    decode_byte_token,
    fit_to_vocabulary,
    resolve_merges,
)

log = structlog.get_logger()

MAX_VOCABULARY_ENTRIES: Final = 4_000_000
SPACE_MARK: Final = "\u2581"
PREPEND_SCHEMES: Final = ("first", "always", "never")  # of Metaspace

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Splitting patterns as the model families' files write them.
SPLIT_PATTERNS: Final = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL: PreTokenizer.LLAMA3,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL: PreTokenizer.QWEN2,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": PreTokenizer.GPT2,
}
SUPPORTED: Final = (
    "byte-level BPE with the GPT-2, SmolLM, Llama-3 or Qwen2 split, and SentencePiece-style BPE with byte fallback"
)


class AddedToken(msgspec.Struct, frozen=True):
    """An entry of ``added_tokens``."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _ModelType(msgspec.Struct, frozen=True):
    type: str = "BPE"  # files from before the field existed are BPE


class _BpeModel(msgspec.Struct, frozen=True):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    byte_fallback: bool = False
    ignore_merges: bool = False
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _TokenizerFile(msgspec.Struct, frozen=True):
    model: msgspec.Raw
    added_tokens: list[AddedToken] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """What the folder's other files say about special tokens: texts win over ids where both are given."""

    bos_text: str | None = None
    bos_id: int = -1
    eos_texts: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _SpacePrefix:
    """Where SentencePiece-style text gets a space in front; see the fields of ``TokenizerSpec``."""

    add: bool = False
    once: bool = False
    if_missing: bool = False


@dataclass(frozen=True, slots=True)
class _Algorithm:
    """How text becomes pieces, as normaliser and pre-tokeniser spell it."""

    kind: TokenizerKind
    pre_tokenizer: PreTokenizer
    space_prefix: _SpacePrefix = _SpacePrefix()
    nfc: bool = False


def read_hf_tokenizer(data: bytes, special: SpecialIds, vocab_size: int) -> TokenizerSpec:
    """The tokeniser in ``data`` (a tokenizer.json), with one token for each of ``vocab_size`` embedding rows.

    Raises:
        UnsupportedModelError: a model, normaliser, pre-tokeniser or post-processor that the guest does not have.
        MalformedModelError: not such a file, or ids that contradict each other.
    """
    try:
        file = msgspec.json.decode(data, type=_TokenizerFile)
        model_type = msgspec.json.decode(file.model, type=_ModelType).type
        if model_type != "BPE":
            raise UnsupportedModelError(f"tokeniser model {model_type!r}: supported are {SUPPORTED}")
        model = msgspec.json.decode(file.model, type=_BpeModel)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedModelError(f"tokenizer.json: {error}") from error
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise UnsupportedModelError(f"BPE with subword prefixes or suffixes: supported are {SUPPORTED}")
    algorithm = _identify_algorithm(file, model)
    texts, kinds = _list_tokens(file, model, algorithm)
    _warn_about_stripping(file.added_tokens)
    prompt_start = _prompt_start(file.post_processor)
    ids = {text: token_id for token_id, text in enumerate(texts) if text}
    bos_id = ids.get(prompt_start or special.bos_text or "", special.bos_id)
    preferred = [*(ids[text] for text in special.eos_texts if text in ids), *special.eos_ids]
    pairs = (merge if isinstance(merge, tuple) else _split_merge(merge) for merge in model.merges)
    spec = TokenizerSpec(
        kind=algorithm.kind,
        pre_tokenizer=algorithm.pre_tokenizer,
        tokens=_token_bytes(texts, kinds, algorithm.kind),
        kinds=kinds,
        merges=resolve_merges(pairs, model.vocab),
        bos_id=bos_id,
        eos_ids=collect_end_ids(preferred, texts, kinds),
        unk_id=ids.get(model.unk_token or "", -1),
        add_bos=prompt_start is not None,
        add_space_prefix=algorithm.space_prefix.add,
        space_prefix_once=algorithm.space_prefix.once,
        space_prefix_if_missing=algorithm.space_prefix.if_missing,
        ignore_merges=model.ignore_merges,
        nfc=algorithm.nfc,
    )
    return fit_to_vocabulary(spec, vocab_size)


def _split_merge(text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not space or not left or not right:
        raise MalformedModelError(f"tokenizer.json: merge {text[:80]!r}: expected two texts and a space")
    return left, right


def _list_tokens(file: _TokenizerFile, model: _BpeModel, algorithm: _Algorithm) -> tuple[list[str], list[TokenKind]]:
    """Text and kind by id; ids that no entry has are UNUSED."""
    top = max([*model.vocab.values(), *(token.id for token in file.added_tokens)], default=-1)
    lowest = min([*model.vocab.values(), *(token.id for token in file.added_tokens)], default=0)
    if lowest < 0 or not 0 <= top < MAX_VOCABULARY_ENTRIES:
        raise MalformedModelError(f"tokenizer.json: token ids from {lowest} to {top}")
    texts, kinds = [""] * (top + 1), [TokenKind.UNUSED] * (top + 1)
    has_bytes = algorithm.kind is TokenizerKind.SENTENCEPIECE_BPE and model.byte_fallback
    for text, token_id in model.vocab.items():
        if kinds[token_id] is not TokenKind.UNUSED:
            raise MalformedModelError(f"tokenizer.json: two tokens have the id {token_id}")
        is_byte = has_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        texts[token_id] = text
        kinds[token_id] = TokenKind.BYTE if is_byte else TokenKind.NORMAL
    for token in file.added_tokens:
        if texts[token.id] not in ("", token.content):
            raise MalformedModelError(
                f"tokenizer.json: id {token.id} is both {texts[token.id]!r} and {token.content!r}"
            )
        texts[token.id] = token.content
        kinds[token.id] = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
    return texts, kinds


def _token_bytes(texts: Sequence[str], kinds: Sequence[TokenKind], kind: TokenizerKind) -> list[bytes]:
    tokens = []
    for text, token_kind in zip(texts, kinds, strict=True):
        if token_kind is TokenKind.BYTE:
            tokens.append(decode_byte_token(text))
        elif token_kind is TokenKind.NORMAL and kind is TokenizerKind.BYTE_LEVEL_BPE:
            tokens.append(decode_byte_level(text))
        else:
            tokens.append(text.encode())
    return tokens


def _warn_about_stripping(added: Iterable[AddedToken]) -> None:
    stripping = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    if stripping:
        log.warning("added tokens are matched verbatim, without stripping", tokens=stripping[:5])


def _steps(component: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """A component as a flat list of steps, ``Sequence`` unpacked."""
    if component is None:
        return []
    if component.get("type") != "Sequence":
        return [component]
    nested = component.get(children)
    if not isinstance(nested, list) or not all(isinstance(step, dict) for step in nested):
        raise MalformedModelError(f"tokenizer.json: a Sequence without its list {children!r}")
    return [step for child in nested for step in _steps(child, children)]


def _describe(steps: Sequence[dict[str, Any]]) -> str:
    return " + ".join(str(msgspec.json.encode(step), "utf-8", "replace")[:160] for step in steps) or "none"


def _identify_algorithm(file: _TokenizerFile, model: _BpeModel) -> _Algorithm:
    normalizers = _steps(file.normalizer, "normalizers")
    splitters = _steps(file.pre_tokenizer, "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in splitters):
        return _Algorithm(TokenizerKind.BYTE_LEVEL_BPE, _identify_split(splitters), nfc=_wants_nfc(normalizers))
    if not model.byte_fallback:
        raise UnsupportedModelError(
            f"BPE with pre-tokeniser {_describe(splitters)} and no byte fallback: supported are {SUPPORTED}"
        )
    return _Algorithm(
        TokenizerKind.SENTENCEPIECE_BPE, PreTokenizer.NONE, _identify_space_prefix(normalizers, splitters)
    )


def _wants_nfc(normalizers: Sequence[dict[str, Any]]) -> bool:
    if normalizers and [step.get("type") for step in normalizers] != ["NFC"]:
        raise UnsupportedModelError(
            f"normaliser {_describe(normalizers)} before byte-level BPE: supported are none and NFC"
        )
    return bool(normalizers)


def _identify_split(splitters: Sequence[dict[str, Any]]) -> PreTokenizer:
    """The split before byte-level BPE.

    Raises:
        UnsupportedModelError: none of the known ones.
    """
    *before, byte_level = splitters
    plain = byte_level.get("type") == "ByteLevel" and not byte_level.get("add_prefix_space", False)
    uses_regex = byte_level.get("use_regex", True)
    if plain and uses_regex and not before:
        return PreTokenizer.GPT2
    if plain and len(before) == 1:
        step = before[0]
        if uses_regex and step.get("type") == "Digits" and step.get("individual_digits") is True:
            return PreTokenizer.SMOLLM
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        isolated = step.get("behavior") == "Isolated" and not step.get("invert", False)
        if not uses_regex and step.get("type") == "Split" and isolated and regex in SPLIT_PATTERNS:
            return SPLIT_PATTERNS[regex]
    raise UnsupportedModelError(f"pre-tokeniser {_describe(splitters)}: supported are {SUPPORTED}")


def _identify_space_prefix(normalizers: Sequence[dict[str, Any]], splitters: Sequence[dict[str, Any]]) -> _SpacePrefix:
    """Where SentencePiece-style text gets a space in front.

    Raises:
        UnsupportedModelError: spaces are marked in neither of the two known ways.
    """
    kinds = [step.get("type") for step in normalizers]
    replaces = bool(normalizers) and (
        normalizers[-1].get("pattern") == {"String": " "} and normalizers[-1].get("content") == SPACE_MARK
    )
    if not splitters and kinds == ["Prepend", "Replace"] and replaces and normalizers[0].get("prepend") == SPACE_MARK:
        return _SpacePrefix(add=True)
    if not splitters and kinds == ["Replace"] and replaces:
        return _SpacePrefix()
    if not normalizers and [step.get("type") for step in splitters] == ["Metaspace"]:
        step = splitters[0]
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if step.get("replacement") == SPACE_MARK and step.get("split", True) is False and scheme in PREPEND_SCHEMES:
            add = scheme in ("first", "always")
            return _SpacePrefix(add=add, once=scheme == "first", if_missing=add)
    raise UnsupportedModelError(
        f"normaliser {_describe(normalizers)} with pre-tokeniser {_describe(splitters)}: supported are {SUPPORTED}"
    )


def _prompt_start(post_processor: dict[str, Any] | None) -> str | None:
    """Text of the token that the post-processor puts before a prompt, if any.

    Raises:
        UnsupportedModelError: a post-processor that does more.
    """
    templates = []
    for step in _steps(post_processor, "processors"):
        if step.get("type") == "TemplateProcessing":
            templates.append(step)
        elif step.get("type") != "ByteLevel":  # only trims offsets
            raise UnsupportedModelError(
                f"post-processor {_describe([step])}: supported are TemplateProcessing and ByteLevel"
            )
    if not templates:
        return None
    single = templates[-1].get("single")
    before: list[str] = []
    after: list[str] = []
    place = before
    for item in single if isinstance(single, list) else []:
        if isinstance(item, dict) and "SpecialToken" in item:
            place.append(str(item["SpecialToken"].get("id")))
        else:
            place = after
    if len(before) > 1:
        raise UnsupportedModelError(f"post-processor that puts {before} before a prompt: one token is supported")
    if after:
        log.warning("tokens that the post-processor appends are left out of prompts", tokens=after)
    return before[0] if before else None
