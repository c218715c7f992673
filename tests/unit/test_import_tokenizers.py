"""tokenizer.json files of every supported family, and the near misses that must be refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guests.llama_assets import PreTokenizer, TokenizerKind, TokenizerSpec, TokenKind
from worker.build.errors import BuildError, MalformedModelError, UnsupportedModelError
from worker.build.hf_tokenizer import SpecialIds, read_hf_tokenizer
from worker.build.vocabulary import BYTE_ALPHABET, decode_byte_level

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTE_LEVEL, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
NO_MERGES: dict[str, Any] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


def _split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _read(vocab_size: int = 3, special: SpecialIds | None = None, **fields: Any) -> TokenizerSpec:
    content = {"model": NO_MERGES, "pre_tokenizer": BYTE_LEVEL, **fields}
    return read_hf_tokenizer(json.dumps(content).encode(), special or SpecialIds(), vocab_size)


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        (BYTE_LEVEL, PreTokenizer.GPT2),
        (_sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), PreTokenizer.SMOLLM),
        (_sequence(_split(LLAMA3_SPLIT), BYTES_ONLY), PreTokenizer.LLAMA3),
        (_sequence(_split(QWEN2_SPLIT), BYTES_ONLY), PreTokenizer.QWEN2),
    ],
)
def test_known_splits_are_recognised(pre_tokenizer: dict[str, Any], expected: PreTokenizer) -> None:
    """The splits of GPT-2, SmolLM, Llama 3 and Qwen2, as their files spell them."""
    spec = _read(pre_tokenizer=pre_tokenizer)
    assert spec.kind is TokenizerKind.BYTE_LEVEL_BPE
    assert spec.pre_tokenizer is expected


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_tokenizer": _sequence(_split(LLAMA3_SPLIT + "|x"), BYTES_ONLY)},
        {"pre_tokenizer": _sequence(_split(LLAMA3_SPLIT, behavior="Removed"), BYTES_ONLY)},
        {"pre_tokenizer": _sequence(_split(LLAMA3_SPLIT, invert=True), BYTES_ONLY)},
        {"pre_tokenizer": _sequence(_split(LLAMA3_SPLIT), BYTE_LEVEL)},
        {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
        {"pre_tokenizer": _sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
        {"model": {**NO_MERGES, "end_of_word_suffix": "</w>"}},
    ],
)
def test_near_misses_are_refused(fields: dict[str, Any]) -> None:
    """What would tokenise differently is refused, with the list of what is supported."""
    with pytest.raises(UnsupportedModelError, match="supported are"):
        _read(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 1 << 50}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}},
        {"model": {"type": "BPE", "merges": []}},
        {"added_tokens": [{"id": 0, "content": "other"}]},
        {"pre_tokenizer": {"type": "Sequence"}},
    ],
)
def test_malformed_files_are_refused(fields: dict[str, Any]) -> None:
    """Contradictions inside the file are our own error."""
    with pytest.raises(MalformedModelError):
        _read(**fields)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b'{"model": ' * 3000])
def test_what_is_no_tokenizer_json_is_refused(data: bytes) -> None:
    """Neither parser errors nor recursion limits get out."""
    with pytest.raises(BuildError):
        read_hf_tokenizer(data, SpecialIds(), 3)


def test_merges_are_read_in_both_spellings_and_unknown_ones_left_out() -> None:
    """Merges as "a b" or ["a", "b"]; a pair that makes no token is dropped."""
    assert _read(model={**NO_MERGES, "merges": ["a b", "b a"]}).merges == [(0, 1)]
    assert _read(model={**NO_MERGES, "merges": [["a", "b"]]}).merges == [(0, 1)]


def test_prompts_start_with_what_the_post_processor_puts_there() -> None:
    """A template that puts one token before the text sets the BOS; ByteLevel beside it has no effect."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
    }
    added = [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "<tool>", "special": False}]
    processors = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    spec = _read(5, added_tokens=added, post_processor=processors, special=SpecialIds(bos_text="<tool>"))
    assert spec.add_bos
    assert spec.bos_id == 3
    assert spec.kinds[3:] == [TokenKind.CONTROL, TokenKind.USER_DEFINED]
    assert not _read(5, added_tokens=added).add_bos


def _sentencepiece(**fields: Any) -> TokenizerSpec:
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "▁a"]
    model = {
        "type": "BPE", "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": ["▁ a"],
        "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True,
    }  # fmt: skip
    added = [{"id": index, "content": pieces[index], "special": True} for index in range(3)]
    return _read(7, **{"model": model, "added_tokens": added, "pre_tokenizer": None, **fields})


@pytest.mark.parametrize(
    ("fields", "prefix"),  # prefix: added at all, only once, only where there is no space
    [
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": "▁"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                    ],
                }
            },
            (True, False, False),
        ),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, (False, False, False)),
        ({"pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}}, (True, True, True)),
        ({"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}}, (True, False, True)),
        ({"pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}}, (False, False, False)),
    ],
)
def test_sentencepiece_style_files_are_recognised(fields: dict[str, Any], prefix: tuple[bool, bool, bool]) -> None:
    """Llama-2 style BPE: spaces marked by normaliser or Metaspace, bytes as fallback."""
    spec = _sentencepiece(**fields)
    assert spec.kind is TokenizerKind.SENTENCEPIECE_BPE
    assert (spec.add_space_prefix, spec.space_prefix_once, spec.space_prefix_if_missing) == prefix
    assert spec.tokens[3] == b"\n"
    assert spec.kinds[3] is TokenKind.BYTE
    assert spec.merges == [(4, 5)]
    assert spec.unk_id == 0


def test_spaces_marked_in_no_known_way_are_refused() -> None:
    """Byte fallback alone does not make a file SentencePiece-style."""
    with pytest.raises(UnsupportedModelError, match="normaliser none with pre-tokeniser none"):
        _sentencepiece()


def test_vocabulary_and_embedding_may_differ_in_size() -> None:
    """Missing tokens become unused; surplus special tokens are dropped; surplus ordinary ones are refused."""
    assert _read(5).kinds[3:] == [TokenKind.UNUSED] * 2
    assert len(_read(3, added_tokens=[{"id": 3, "content": "<pad>", "special": True}]).tokens) == 3
    with pytest.raises(MalformedModelError, match="3 tokens, the embedding 2 rows"):
        _read(2)


def test_the_byte_alphabet_is_gpt2s() -> None:
    """256 characters for 256 bytes; the space is U+0120, the newline U+010A."""
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))
    assert decode_byte_level("Ġhello") == b" hello"
    assert decode_byte_level("Ċ") == b"\n"
    assert decode_byte_level("âĤ¬") == "€".encode()
    assert decode_byte_level("<日本>") == "<日本>".encode()
