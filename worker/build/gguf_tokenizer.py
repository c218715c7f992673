"""Tokeniser of a GGUF file: the ``tokenizer.ggml.*`` metadata as a :class:`TokenizerSpec`."""

from __future__ import annotations

from typing import Final

from guests.llama_assets import PreTokenizer, TokenizerKind, TokenizerSpec, TokenKind
from worker.build.errors import MalformedModelError, UnsupportedModelError
from worker.build.gguf_file import GgufFile
from worker.build.vocabulary import (
    collect_end_ids,
    decode_byte_level,
    decode_byte_token,
    fit_to_vocabulary,
    resolve_merges,
)

#: ``tokenizer.ggml.pre`` values, grouped by the split that llama.cpp applies for them.
PRE_TOKENIZERS: Final = {
    "gpt-2": PreTokenizer.GPT2,
    "gpt2": PreTokenizer.GPT2,
    "phi-2": PreTokenizer.GPT2,
    "mpt": PreTokenizer.GPT2,
    "olmo": PreTokenizer.GPT2,
    "smollm": PreTokenizer.SMOLLM,
    "starcoder": PreTokenizer.SMOLLM,
    "refact": PreTokenizer.SMOLLM,
    "codeshell": PreTokenizer.SMOLLM,
    "llama-bpe": PreTokenizer.LLAMA3,
    "llama3": PreTokenizer.LLAMA3,
    "llama-v3": PreTokenizer.LLAMA3,
    "dbrx": PreTokenizer.LLAMA3,
    "smaug-bpe": PreTokenizer.LLAMA3,
    "qwen2": PreTokenizer.QWEN2,
    "deepseek-r1-qwen": PreTokenizer.QWEN2,
}
#: Of those, the ones whose whole-piece tokens win over merges and whose prompts start with a BOS by default.
LLAMA3_NAMES: Final = frozenset({"llama-bpe", "llama3", "llama-v3"})

PREFIX: Final = "tokenizer.ggml."


def read_gguf_tokenizer(file: GgufFile, vocab_size: int) -> TokenizerSpec:
    """The file's tokeniser, with one token for each of ``vocab_size`` embedding rows.

    Raises:
        UnsupportedModelError: another tokeniser model or pre-tokeniser than the supported ones.
        MalformedModelError: lists of unequal length, ids out of range.
    """
    model = file.value(PREFIX + "model", str)
    texts = _texts(file)
    kinds = _kinds(file, len(texts))
    if model == "gpt2":
        spec = _byte_level(file, texts, kinds)
    elif model == "llama":
        spec = _sentencepiece(file, texts, kinds)
    else:
        raise UnsupportedModelError(
            f"tokeniser model {model!r}: supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
        )
    return fit_to_vocabulary(spec, vocab_size)


def _texts(file: GgufFile) -> list[str]:
    texts: list[str] = file.value(PREFIX + "tokens", list)
    if not texts or not isinstance(texts[0], str):
        raise MalformedModelError(f"metadata {PREFIX}tokens is not a list of texts")
    return texts


def _kinds(file: GgufFile, num_tokens: int) -> list[TokenKind]:
    numbers: list[int] = file.value(PREFIX + "token_type", list, [TokenKind.NORMAL] * num_tokens)
    if len(numbers) != num_tokens:
        raise MalformedModelError(f"{len(numbers)} token types for {num_tokens} tokens")
    try:
        return [TokenKind(number) for number in numbers]
    except ValueError as error:
        raise MalformedModelError(f"metadata {PREFIX}token_type: {error}") from error


def _end_ids(file: GgufFile, texts: list[str], kinds: list[TokenKind], default: int) -> list[int]:
    named = [file.value(f"{PREFIX}{role}_token_id", int, -1) for role in ("eos", "eot", "eom")]
    preferred = [token_id for token_id in named if token_id >= 0]
    if not preferred and default >= 0:
        preferred = [default]
    return collect_end_ids(preferred, texts, kinds)


def _byte_level(file: GgufFile, texts: list[str], kinds: list[TokenKind]) -> TokenizerSpec:
    pre = file.value(PREFIX + "pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(f"pre-tokeniser {pre!r} ({PREFIX}pre): supported are {', '.join(PRE_TOKENIZERS)}")
    merges: list[str] = file.value(PREFIX + "merges", list)
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not space or not left or not right:
            raise MalformedModelError(f"metadata {PREFIX}merges holds {merge!r}: expected two texts and a space")
        pairs.append((left, right))
    ids = {text: token_id for token_id, text in enumerate(texts)}
    return TokenizerSpec(
        kind=TokenizerKind.BYTE_LEVEL_BPE,
        pre_tokenizer=PRE_TOKENIZERS[pre],
        tokens=[
            decode_byte_level(text) if kind is TokenKind.NORMAL else text.encode()
            for text, kind in zip(texts, kinds, strict=True)
        ],
        kinds=kinds,
        merges=resolve_merges(pairs, ids),
        bos_id=file.value(PREFIX + "bos_token_id", int, -1),
        eos_ids=_end_ids(file, texts, kinds, default=-1),
        unk_id=file.value(PREFIX + "unknown_token_id", int, -1),
        add_bos=file.value(PREFIX + "add_bos_token", bool, pre in LLAMA3_NAMES),
        ignore_merges=pre in LLAMA3_NAMES,
    )


def _sentencepiece(file: GgufFile, texts: list[str], kinds: list[TokenKind]) -> TokenizerSpec:
    scores: list[float] = file.value(PREFIX + "scores", list)
    if len(scores) != len(texts):
        raise MalformedModelError(f"{len(scores)} token scores for {len(texts)} tokens")
    return TokenizerSpec(
        kind=TokenizerKind.SENTENCEPIECE_BPE,
        pre_tokenizer=PreTokenizer.NONE,
        tokens=[
            decode_byte_token(text) if kind is TokenKind.BYTE else text.encode()
            for text, kind in zip(texts, kinds, strict=True)
        ],
        kinds=kinds,
        scores=scores,
        bos_id=file.value(PREFIX + "bos_token_id", int, 1),
        eos_ids=_end_ids(file, texts, kinds, default=2),
        unk_id=file.value(PREFIX + "unknown_token_id", int, 0),
        add_bos=file.value(PREFIX + "add_bos_token", bool, True),
        add_space_prefix=file.value(PREFIX + "add_space_prefix", bool, True),
    )
