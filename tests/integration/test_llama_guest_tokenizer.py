"""The llama guest's tokenisers equal llama.cpp's reference vectors and the ``tokenizers`` package."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from llama_fixtures import guest_text, random_texts, reference_vectors, small_spec, smollm2_spec
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from guests.llama_assets import PreTokenizer, TokenizerKind, TokenizerSpec, TokenKind
from guests.runtime import MEBIBYTE, InstanceLimits
from guests.text import GuestText
from worker.build.vocabulary import BYTE_ALPHABET

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SPLITS = {
    PreTokenizer.NONE: BYTES_ONLY,
    PreTokenizer.GPT2: GPT2_SPLIT,
    PreTokenizer.SMOLLM: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT]),
    PreTokenizer.LLAMA3: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL), behavior="isolated"
            ),
            BYTES_ONLY,
        ]
    ),
    PreTokenizer.QWEN2: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL), behavior="isolated"),
            BYTES_ONLY,
        ]
    ),
}


def encode(text: GuestText, prompt: str, *, parse_special: bool = False) -> list[int]:
    return text.tokenize(prompt, add_special=False, parse_special=parse_special)


def printable(text: bytes) -> str:
    """The GPT-2 alphabet's spelling of bytes."""
    letters = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
    return "".join(letters[byte] for byte in text)


def byte_level_peer(spec: TokenizerSpec) -> tokenizers.Tokenizer:
    """The same tokeniser in the ``tokenizers`` package."""
    names = [
        printable(text) if kind is TokenKind.NORMAL else text.decode()
        for text, kind in zip(spec.tokens, spec.kinds, strict=True)
    ]
    model = models.BPE(
        vocab={name: token for token, name in enumerate(names)},
        merges=[(names[left], names[right]) for left, right in spec.merges],
        ignore_merges=spec.ignore_merges,
    )
    peer = tokenizers.Tokenizer(model)
    peer.pre_tokenizer = SPLITS[spec.pre_tokenizer]
    peer.decoder = decoders.ByteLevel()
    peer.add_special_tokens([names[token] for token, kind in enumerate(spec.kinds) if kind is TokenKind.CONTROL])
    return peer


@pytest.fixture(scope="module")
def smollm2() -> Iterator[GuestText]:
    with guest_text(smollm2_spec()) as text:
        yield text


def test_reference_vectors_are_met_exactly(smollm2: GuestText) -> None:
    """llama.cpp's ids for SmolLM2, with special tokens parsed and as text, and back to the same text."""
    for vector in reference_vectors()["vectors"]:
        assert encode(smollm2, vector["text"], parse_special=True) == vector["tokens"]
        assert encode(smollm2, vector["text"]) == vector["tokens_nospecial"]
        assert smollm2.detokenize(vector["tokens_nospecial"]) == vector["text"]


def test_rendered_chat_prompts_have_the_reference_ids(smollm2: GuestText) -> None:
    """Whole chat prompts, special tokens included."""
    for prompt in reference_vectors()["prompts"]:
        assert smollm2.tokenize(prompt["rendered"], add_special=True, parse_special=True) == prompt["tokens"]


@pytest.mark.parametrize("split", list(PreTokenizer))
def test_byte_level_equals_the_tokenizers_package(split: PreTokenizer) -> None:
    """Each split over SmolLM2's vocabulary gives the package's ids on a thousand generated texts, and its text back."""
    spec = replace(smollm2_spec(), pre_tokenizer=split, ignore_merges=split is PreTokenizer.LLAMA3)
    peer = byte_level_peer(spec)
    with guest_text(spec) as text:
        for prompt in random_texts(seed=split, count=1000):
            expected = peer.encode(prompt).ids
            assert encode(text, prompt, parse_special=True) == expected, ascii(prompt)
            assert text.detokenize(expected) == peer.decode(expected), ascii(prompt)


@pytest.mark.parametrize("split", [split for split in PreTokenizer if split is not PreTokenizer.NONE])
def test_splits_equal_the_tokenizers_package(split: PreTokenizer) -> None:
    """With a vocabulary of the package's own pieces every word is one token, so each border shows."""
    texts = random_texts(seed=90 + split, count=400)
    pieces = [[piece for piece, _ in SPLITS[split].pre_tokenize_str(text)] for text in texts]
    as_bytes = [[bytes(BYTE_ALPHABET[letter] for letter in piece) for piece in row] for row in pieces]
    words = sorted({piece for row in as_bytes for piece in row if len(piece) > 1})
    ids = {word: 258 + index for index, word in enumerate(words)} | {bytes([byte]): byte for byte in range(256)}
    with guest_text(small_spec(tuple(words), pre_tokenizer=split, ignore_merges=True)) as text:
        for prompt, row in zip(texts, as_bytes, strict=True):
            assert encode(text, prompt) == [ids[piece] for piece in row], ascii(prompt)


def test_special_tokens_equal_the_tokenizers_package(smollm2: GuestText) -> None:
    """Special tokens and pieces of them at random places: found when parsed, ordinary text when not."""
    spec = smollm2_spec()
    peer = byte_level_peer(spec)
    specials = [spec.tokens[token].decode() for token, kind in enumerate(spec.kinds) if kind is TokenKind.CONTROL]
    rng = random.Random(7)
    for prompt in random_texts(seed=77, count=300):
        written = "".join(
            part + special[: rng.choice((len(special), len(special), 3))]
            for part, special in zip(prompt.split(" "), rng.choices(specials, k=30), strict=False)
        )
        peer.encode_special_tokens = False
        assert encode(smollm2, written, parse_special=True) == peer.encode(written).ids, ascii(written)
        peer.encode_special_tokens = True
        assert encode(smollm2, written) == peer.encode(written).ids, ascii(written)


def test_normalisation_equals_pythons_and_the_packages() -> None:
    """Every character that Unicode 3.2 had, alone and in 2,000 random strings dense in marks, Hangul and composites."""
    old = unicodedata.ucd_3_2_0
    known = [c for c in map(chr, range(0x30000)) if old.category(c) not in ("Cn", "Cs", "Co")]
    changing = [c for c in known if old.combining(c) or unicodedata.normalize("NFD", c) != c]
    changes, rng = frozenset(changing), random.Random(3)
    prompts = [c + "x" for c in known if c in changes or rng.random() < 0.02]
    joined = ["\n".join(prompts[i : i + 200]) for i in range(0, len(prompts), 200)]
    for _ in range(2000):
        letters = rng.choices(changing, k=rng.randrange(1, 20)) + rng.choices(known, k=rng.randrange(4))
        joined.append("".join(rng.sample(letters, len(letters))))
        joined[-1] += unicodedata.normalize("NFD", joined[-1])[: rng.randrange(9)]
    package = normalizers.NFC()
    with guest_text(small_spec(nfc=True)) as text:
        for prompt in joined:
            expected = unicodedata.normalize("NFC", prompt)
            assert bytes(encode(text, prompt)) == expected.encode(), ascii(prompt)
            assert package.normalize_str(prompt) == expected, ascii(prompt)


def test_a_long_run_of_marks_is_sorted_within_the_deadline() -> None:
    """100,000 marks in the worst order for a quadratic sort, as Python's own is."""
    count = 50_000
    with guest_text(small_spec(nfc=True)) as text:
        found = bytes(encode(text, "a" + "\u0301\u0323" * count)).decode()
    assert found == "\u1ea1" + "\u0323" * (count - 1) + "\u0301" * count


def test_special_tokens_stand_between_normalised_stretches() -> None:
    """A mark behind a special token does not join what is before it; without the flag text stays as it is."""
    with guest_text(small_spec(nfc=True)) as text:
        assert encode(text, "e<s>\u0301e\u0301", parse_special=True) == [ord("e"), 256, *"\u0301\u00e9".encode()]
    with guest_text(small_spec()) as text:
        assert bytes(encode(text, "e\u0301")) == "e\u0301".encode()


def test_unicode_tables_are_current() -> None:
    """The committed character classes equal what the package says about every code point."""
    script = Path(__file__).parents[2] / "guests" / "llama" / "generate_unicode_tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_longest_special_token_wins_and_user_defined_ones_always_match() -> None:
    """Of special tokens that begin at one place the longest allowed one counts; USER_DEFINED need no parsing."""
    spec = small_spec((b"<s>>", b"[x]", b"[x][y]"))
    spec.kinds[258:] = [TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.USER_DEFINED]
    with guest_text(spec) as text:
        assert encode(text, "<s>>a<s></s", parse_special=True) == [258, ord("a"), 256, *b"</s"]
        assert encode(text, "<s>>") == list(b"<s>>")
        assert encode(text, "[x][y][x][x") == [260, 259, *b"[x"]


def test_begin_of_sequence_is_added_only_where_wanted() -> None:
    """The BOS comes from ADD_SPECIAL together with the model's add_bos, also before nothing."""
    with guest_text(small_spec(add_bos=True)) as text:
        assert text.tokenize("", add_special=True, parse_special=True) == [256]
        assert text.tokenize("a", add_special=False, parse_special=True) == [ord("a")]
    with guest_text(small_spec()) as text:
        assert text.tokenize("a", add_special=True, parse_special=True) == [ord("a")]


def test_plain_text_never_becomes_a_control_token() -> None:
    """A merge that would spell a control token is left out, so an injected prompt stays text."""
    spec = small_spec((b"<s",), merges=[(ord("<"), ord("s")), (258, ord(">"))], pre_tokenizer=PreTokenizer.NONE)
    with guest_text(spec) as text:
        assert encode(text, "<s>") == [258, ord(">")]


def test_bytes_without_a_token_are_dropped() -> None:
    """As in llama.cpp and the package, what a byte-level vocabulary lacks disappears and its neighbours may merge."""
    spec = small_spec((b"ab",), merges=[(ord("a"), ord("b"))], pre_tokenizer=PreTokenizer.NONE)
    spec.kinds[4] = TokenKind.UNUSED
    with guest_text(spec) as text:
        assert encode(text, "a\x04b\x04") == [258]


def test_of_equal_tokens_and_of_equal_merges_the_first_counts() -> None:
    """A vocabulary may hold a text, and a file a merge, twice: the lower id and the lower rank are used."""
    with guest_text(small_spec((b"xy", b"xy"), ignore_merges=True)) as text:
        assert encode(text, "xy") == [258]
    a, b, c = b"abc"
    merges = [(a, b), (b, c), (a, b)]
    with guest_text(small_spec((b"ab", b"bc"), merges=merges)) as text:
        assert encode(text, "abc") == [258, c]


def test_a_megabyte_in_one_word_is_neither_slow_nor_big() -> None:
    """A word of a megabyte is merged well within a call's deadline and 160 MiB, again and again."""
    rng = random.Random(3)
    word = "".join(rng.choices("etaoinshrdlu", k=1 << 20))
    with guest_text(smollm2_spec(), limits=InstanceLimits(memory_bytes=160 * MEBIBYTE)) as text:
        first = encode(text, word)
        assert text.detokenize(first) == word
        assert encode(text, word) == first


def test_too_little_memory_is_an_error_and_not_the_end() -> None:
    """A text that does not fit into the instance's memory is refused; the next one is served."""
    with guest_text(small_spec(), limits=InstanceLimits(memory_bytes=4 * MEBIBYTE)) as text:
        with pytest.raises(Exception, match="gp_tokenize failed"):
            encode(text, "x" * (1 << 19))
        assert encode(text, "ok") == list(b"ok")


MARK = "\u2581"
CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs through the forest",
    "she sells sea shells on the sea shore, the shells she sells are sea shells",
    "der schnelle braune Fuchs springt \u00fcber den faulen Hund; \u00e4rger, gr\u00f6\u00dfe",
    "l'\u00e9t\u00e9 \u00e0 la plage, c'est la for\u00eat o\u00f9 l'on s'\u00e9l\u00e8ve",
    "\u4f60\u597d\u4e16\u754c \u4f60\u597d \u4e16\u754c  with   runs    of     spaces",
] * 4


def train_sentencepiece(*, byte_fallback: bool) -> TokenizerSpec:
    """A small vocabulary laid out like Llama 2's: unknown, BOS, EOS, 256 bytes, then learnt pieces."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    num_bytes = 256 if byte_fallback else 0
    fallback = [bytes([byte]) for byte in range(num_bytes)]
    tokens = [b"<unk>", b"<s>", b"</s>", *fallback, *(piece.encode() for piece in pieces)]
    first_piece = 3 + num_bytes
    kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL]
    kinds += [TokenKind.BYTE] * num_bytes + [TokenKind.NORMAL] * len(pieces)
    ids = {piece: first_piece + index for index, piece in enumerate(pieces)}
    file = trained.to_str()
    merges = [(ids[left], ids[right]) for left, right in tokenizers_merges(file)]
    return TokenizerSpec(
        kind=TokenizerKind.SENTENCEPIECE_BPE,
        pre_tokenizer=PreTokenizer.NONE,
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        bos_id=1,
        eos_ids=[2],
        unk_id=0,
        add_bos=True,
        add_space_prefix=True,
    )


def tokenizers_merges(file: str) -> list[tuple[str, str]]:
    """Merges of a serialised tokeniser."""
    return [(left, right) for left, right in json.loads(file)["model"]["merges"]]


def sentencepiece_peer(spec: TokenizerSpec, prefix: str) -> tokenizers.Tokenizer:
    """The same tokeniser in the ``tokenizers`` package, as Llama 2's older (prepend) and newer files have it."""
    names = [
        f"<0x{text[0]:02X}>" if kind is TokenKind.BYTE else text.decode()
        for text, kind in zip(spec.tokens, spec.kinds, strict=True)
    ]
    model = models.BPE(
        vocab={name: token for token, name in enumerate(names)},
        merges=[(names[left], names[right]) for left, right in spec.merges],
        byte_fallback=TokenKind.BYTE in spec.kinds,
        unk_token="<unk>",
        fuse_unk=True,
    )
    peer = tokenizers.Tokenizer(model)
    if prefix == "prepend":
        peer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    else:
        peer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_space_prefix else []
    peer.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    peer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return peer


def sentencepiece_texts(seed: int, count: int) -> list[str]:
    """Texts with words of the corpus, so that merges happen, and with special tokens."""
    rng = random.Random(seed)
    words = " ".join(CORPUS[:5]).split(" ")
    return [
        "".join(rng.choice((*words, " ", "  ", "<s>", "</s>", "\n", other)) + rng.choice(("", " ")) for _ in range(12))
        for other in random_texts(seed, count)
    ]


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", ["prepend", "always", "first", "never"])
def test_sentencepiece_merges_equal_the_tokenizers_package(prefix: str, byte_fallback: bool) -> None:
    """With explicit merges: ids, byte fallback or fused unknowns, dummy prefix and decoded text are the package's."""
    spec = replace(
        train_sentencepiece(byte_fallback=byte_fallback),
        add_space_prefix=prefix != "never",
        space_prefix_once=prefix == "first",
        space_prefix_if_missing=prefix in ("always", "first"),
    )
    peer = sentencepiece_peer(spec, prefix)
    with guest_text(spec) as text:
        for prompt in sentencepiece_texts(seed=5, count=250):
            expected = peer.encode(prompt).ids
            assert encode(text, prompt, parse_special=True) == expected, ascii(prompt)
            assert text.detokenize(expected) == peer.decode(expected), ascii(prompt)


def merge_by_score(spec: TokenizerSpec, text: str) -> list[int]:
    """SentencePiece's own algorithm, as plainly as possible: the best-scored neighbours merge, leftmost first."""
    ids = {text: token for token, text in enumerate(spec.tokens) if spec.kinds[token] is TokenKind.NORMAL}
    pieces = [character.encode() for character in text]
    while True:
        found = [
            (-spec.scores[ids[left + right]], index)
            for index, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in ids
        ]
        if not found:
            break
        _, best = min(found)
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
    bytes_start = spec.kinds.index(TokenKind.BYTE)
    return [
        token
        for piece in pieces
        for token in ([ids[piece]] if piece in ids else [bytes_start + byte for byte in piece])
    ]


def test_sentencepiece_scores_equal_the_plain_algorithm() -> None:
    """Without merges the scores decide; equal scores go from left to right."""
    trained = train_sentencepiece(byte_fallback=True)
    spec = replace(trained, merges=[], scores=[-float(token // 3) for token in range(len(trained.tokens))])
    with guest_text(spec) as text:
        for prompt in sentencepiece_texts(seed=6, count=250):
            plain = prompt.replace("<s>", "").replace("</s>", "")
            expected = merge_by_score(spec, (MARK + plain).replace(" ", MARK)) if plain else []
            assert encode(text, plain) == expected, ascii(plain)
