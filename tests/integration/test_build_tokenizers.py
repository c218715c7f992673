"""tokenizer.json through importer and guest: the same ids as the ``tokenizers`` package gives for the same file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.llama_fixtures import FRAGMENTS, guest_text, random_texts
from worker.build.hf_tokenizer import SPLIT_PATTERNS, SpecialIds, read_hf_tokenizer
from worker.build.vocabulary import BYTE_ALPHABET

NUM_TEXTS = 250
SPECIAL = ("<s>", "</s>", "<unk>", "<|im_end|>")
FAMILIES = (
    "gpt2", "smollm", "llama3", "qwen2", "llama2", "metaspace-first", "metaspace-always", "metaspace-never"
)  # fmt: skip
CORPUS = [*FRAGMENTS, *("the theory of the thing that they thought through " * 3).split(" "), *random_texts(1, 300)]
MARK_SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _byte_level(*before: Any, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(BYTE_ALPHABET), special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _sentencepiece(scheme: str | None) -> Tokenizer:
    """Trained word by word, then run as Llama 2's file does: the whole text at once, bytes as fallback. Spaces are
    marked by Metaspace with ``scheme``, or by a normaliser.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    content = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in sorted(content["vocab"], key=content["vocab"].get) if piece not in pieces]
    merges = [tuple(merge) for merge in content["merges"]]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = MARK_SPACES
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def _make(family: str) -> Tokenizer:
    llama3, qwen2, _ = SPLIT_PATTERNS
    makers = {
        "gpt2": lambda: _byte_level(use_regex=True),
        "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
        "llama3": lambda: _byte_level(_split(llama3), use_regex=False),
        "qwen2": lambda: _byte_level(_split(qwen2), use_regex=False),
        "llama2": lambda: _sentencepiece(None),
        "metaspace-first": lambda: _sentencepiece("first"),
        "metaspace-always": lambda: _sentencepiece("always"),
        "metaspace-never": lambda: _sentencepiece("never"),
    }
    return makers[family]()


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_tokenizers_give_the_ids_of_the_package(family: str) -> None:
    """Freshly trained files of every family, on texts from all Unicode planes."""
    peer = _make(family)
    size = peer.get_vocab_size()
    spec = read_hf_tokenizer(peer.to_str().encode(), SpecialIds(), size)
    with guest_text(spec) as text:
        for sample in random_texts(7, NUM_TEXTS):
            ours = text.tokenize(sample, add_special=False, parse_special=False)
            assert ours == peer.encode(sample, add_special_tokens=False).ids, ascii(sample)
            between = f"<s>{sample}</s> {sample}<|im_end|>"
            ours = text.tokenize(between, add_special=False, parse_special=True)
            assert ours == peer.encode(between, add_special_tokens=False).ids, ascii(between)


def test_a_template_puts_the_bos_before_prompts() -> None:
    """What the file's post-processor adds, ``add_special`` adds, once."""
    peer = _make("gpt2")
    bos_id = peer.token_to_id("<s>")
    peer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    spec = read_hf_tokenizer(peer.to_str().encode(), SpecialIds(), peer.get_vocab_size())
    with guest_text(spec) as text:
        ours = text.tokenize("Hello world", add_special=True, parse_special=True)
    assert ours == peer.encode("Hello world").ids
    assert ours[0] == bos_id
