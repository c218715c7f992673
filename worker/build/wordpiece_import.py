"""``tokenizer.json`` of a BERT-family encoder: what the embed guest needs of it, or why it cannot run it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from guests.embed_assets import WordPieceSpec
from worker.build.errors import MalformedModelError, UnsupportedModelError

CONTINUING_PREFIX: Final = "##"


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class _Normalizer(msgspec.Struct, frozen=True):
    type: str
    clean_text: bool = True
    handle_chinese_chars: bool = True
    strip_accents: bool | None = None
    lowercase: bool = True


class _Typed(msgspec.Struct, frozen=True):
    type: str


class _Model(msgspec.Struct, frozen=True):
    vocab: dict[str, int]
    type: str = "WordPiece"
    unk_token: str = "[UNK]"
    continuing_subword_prefix: str = CONTINUING_PREFIX
    max_input_chars_per_word: int = 100


class _TokenizerFile(msgspec.Struct, frozen=True):
    model: _Model
    normalizer: _Normalizer
    pre_tokenizer: _Typed
    post_processor: dict[str, Any]
    added_tokens: list[_AddedToken] = []


def read_wordpiece(data: bytes, vocab_size: int) -> WordPieceSpec:
    """The tokeniser of a tokenizer.json file. Its truncation and padding are left out: a text that is too long is an
    error here, and batches need no padding.

    Raises:
        MalformedModelError: damaged, or ids that contradict each other.
        UnsupportedModelError: another tokeniser than BERT's.
    """
    try:
        file = msgspec.json.decode(data, type=_TokenizerFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedModelError(f"tokenizer.json: {error}") from error
    model, normalizer = file.model, file.normalizer
    seen = (model.type, normalizer.type, file.pre_tokenizer.type)
    if seen != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        raise UnsupportedModelError(
            f"tokenizer.json: {', '.join(seen)}: expected WordPiece, BertNormalizer, BertPreTokenizer"
        )
    if model.continuing_subword_prefix != CONTINUING_PREFIX:
        raise UnsupportedModelError(f"pieces continue with {model.continuing_subword_prefix!r}: expected ##")
    tokens = _list_tokens(model.vocab, vocab_size)
    specials = _read_added(file.added_tokens, tokens)
    first, last = _read_template(file.post_processor)
    return WordPieceSpec(
        tokens=tokens,
        specials=specials,
        first_id=_id_of(first, model.vocab),
        last_id=_id_of(last, model.vocab),
        unknown_id=_id_of(model.unk_token, model.vocab),
        clean_text=normalizer.clean_text,
        space_cjk=normalizer.handle_chinese_chars,
        strip_accents=normalizer.lowercase if normalizer.strip_accents is None else normalizer.strip_accents,
        lowercase=normalizer.lowercase,
        most_word_chars=model.max_input_chars_per_word,
    )


def _list_tokens(vocab: dict[str, int], vocab_size: int) -> list[str]:
    tokens: list[str | None] = [None] * len(vocab)
    for text, token in vocab.items():
        if not 0 <= token < len(vocab) or tokens[token] is not None:
            raise MalformedModelError(f"tokenizer.json: token id {token} is out of range or given twice")
        tokens[token] = text
    if not 0 < len(tokens) <= vocab_size:
        raise MalformedModelError(f"tokenizer.json has {len(tokens)} tokens, config.json's vocab_size is {vocab_size}")
    return [token or "" for token in tokens]


def _read_added(added: list[_AddedToken], tokens: list[str]) -> list[int]:
    """Ids of special tokens.

    Raises:
        UnsupportedModelError: added tokens that are matched in another way than word for word.
        MalformedModelError: one that the vocabulary has not.
    """
    for token in added:
        if not token.special or token.single_word or token.lstrip or token.rstrip:
            raise UnsupportedModelError(
                f"added token {token.content!r}: only special tokens that are matched exactly are supported"
            )
        if not (0 <= token.id < len(tokens) and tokens[token.id] == token.content):
            raise MalformedModelError(f"added token {token.content!r} is not token {token.id} of the vocabulary")
    return [token.id for token in added]


def _read_template(post_processor: dict[str, Any]) -> tuple[str, str]:
    """The tokens around a single text.

    Raises:
        UnsupportedModelError: anything but one token before it and one behind it.
    """
    try:
        if post_processor["type"] == "BertProcessing":
            return str(post_processor["cls"][0]), str(post_processor["sep"][0])
        if post_processor["type"] == "TemplateProcessing":
            first, text, last = post_processor["single"]
            if "Sequence" in text:
                return str(first["SpecialToken"]["id"]), str(last["SpecialToken"]["id"])
    except (KeyError, TypeError, ValueError, IndexError):
        pass  # not of the form that is looked for: refused below
    raise UnsupportedModelError("tokenizer.json: the post-processor must put one token before a text and one behind it")


def _id_of(text: str, vocab: dict[str, int]) -> int:
    if text not in vocab:
        raise MalformedModelError(f"tokenizer.json: token {text!r} is not in the vocabulary")
    return vocab[text]
