"""The embed guest's tokeniser against the ``tokenizers`` package, and its refusal of damaged assets."""

from __future__ import annotations

import random
import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from guests.abi import ProgramKind
from guests.embed_assets import EncoderConfig, WordPieceSpec, pack_encoder_config, pack_wordpiece
from guests.errors import GuestContractError
from guests.initialisation import run_initialisation
from guests.runtime import GuestEngine
from guests.shipped import embed_wasm
from guests.text import GuestText
from tests.guest_fixtures import compiled, sealed
from worker.build.wordpiece_import import read_wordpiece

VOCABULARY = 30522
CONFIG = EncoderConfig(
    num_layers=1,
    hidden_size=4,
    intermediate_size=8,
    num_heads=2,
    vocab_size=VOCABULARY,
    num_positions=512,
    context_length=256,
    layer_norm_eps=1e-12,
    normalise=True,
)
LAYER = [
    f"layers.0.{part}.{kind}"
    for part in ("qkv", "o", "attn_norm", "up", "down", "mlp_norm")
    for kind in ("weight", "bias")
]
TENSORS = ["embed.weight", "position.weight", "embed_norm.weight", "embed_norm.bias", *LAYER]
EVERYTHING = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
#: Planes 4 to 13, 15 and 16 have no characters or private ones: of them every 61st.
DEALT_OUT = [p for p in EVERYTHING if p < 0x40000 or 0xE0000 <= p < 0xF0000 or p % 61 == 0]
MARKS = [chr(point) for point in EVERYTHING if unicodedata.combining(chr(point))]


@pytest.fixture(scope="module")
def engine() -> Iterator[GuestEngine]:
    with GuestEngine() as engine:
        engine.start_ticker()
        yield engine


@pytest.fixture(scope="module")
def spec(minilm_folder: Path) -> WordPieceSpec:
    return read_wordpiece((minilm_folder / "tokenizer.json").read_bytes(), VOCABULARY)


@pytest.fixture(scope="module")
def reference(minilm_folder: Path) -> Any:
    tokenizer = Tokenizer.from_file(str(minilm_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def assets(spec: WordPieceSpec, config: EncoderConfig = CONFIG) -> dict[str, bytes]:
    return {"config": pack_encoder_config(config), "tokenizer": pack_wordpiece(spec)}


@pytest.fixture(scope="module", params=["uncased", "cased", "accents-kept"])
def pair(request: pytest.FixtureRequest, engine: GuestEngine, spec: WordPieceSpec, reference: Any) -> Iterator[Any]:
    """A guest and the reference tokeniser with the same normalisation."""
    lower, strip = {"uncased": (True, True), "cased": (False, False), "accents-kept": (True, False)}[request.param]
    reference.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip)
    chosen = replace(spec, lowercase=lower, strip_accents=strip)
    guest = run_initialisation(embed_wasm(), assets(chosen), TENSORS)
    assert set(guest.programs) == {ProgramKind.ENCODE}
    with sealed(compiled(guest.baked_wasm)) as path:
        module = engine.load(path)
        yield GuestText(module, 1), reference
        module.close()


def agree(pair: Any, text: str) -> None:
    guest, reference = pair
    assert guest.tokenize(text, add_special=True, parse_special=True) == reference.encode(text).ids, ascii(text)


def test_every_code_point_alone_and_behind_a_letter(pair: Any) -> None:
    """All planes: between spaces (its own class), and joined to a letter and its neighbours (words, marks)."""
    for first in range(0, len(DEALT_OUT), 4096):
        part = [chr(point) for point in DEALT_OUT[first : first + 4096]]
        agree(pair, " ".join(part))
        agree(pair, " ".join("e" + character for character in part))


def test_generated_texts_of_letters_marks_scripts_and_specials(pair: Any) -> None:
    """Runs of combining marks in every order, ideographs, punctuation and special tokens, 2,000 texts."""
    chance = random.Random(3)
    alphabet = ["a", "E", "\u00e9", "ing ", "\u4e2d", "!", "[SEP]", "[MASK", "\u0130", "\ud55c", "\u1e9b\u0323", "\t"]
    for _ in range(2000):
        parts = [
            chance.choice(
                [chance.choice(alphabet), chance.choice(MARKS), chance.choice(MARKS), chr(chance.choice(EVERYTHING))]
            )
            for _ in range(chance.randrange(1, 30))
        ]
        agree(pair, "".join(parts))


@pytest.mark.parametrize("text", ["", " ", "a" * 100, "a" * 101, "\u00e9" * 101, "x" * 5000, "un" + "believ" * 30])
def test_empty_texts_and_long_words(pair: Any, text: str) -> None:
    """A word of more characters than the model allows is one unknown token, not a prefix of pieces."""
    agree(pair, text)


def test_a_long_run_of_marks_in_the_wrong_order_is_done_in_time(pair: Any) -> None:
    """A text that is one run, which each mark would have to pass, takes no longer than its length says."""
    agree(pair, "a" + "\u302e" * 30_000 + "\u1b44" * 30_000)
    agree(pair, "\u4e2d" + "\u302e\u1b44" * 3 + "\u4e2d" + "\u1b44\u302e")


def test_specials_are_plain_text_without_the_flag(pair: Any) -> None:
    """Without PARSE_SPECIAL a written-out special token never becomes one; without ADD_SPECIAL none is put around."""
    guest, _ = pair
    ids = guest.tokenize("[CLS] [SEP]", add_special=False, parse_special=False)
    assert ids
    assert not {101, 102} & set(ids)
    assert guest.tokenize("", add_special=False, parse_special=True) == []


def test_damaged_assets_are_refused_with_a_reason(spec: WordPieceSpec) -> None:
    """Each inconsistency that a damaged asset may have ends gp_init with a line that names it."""
    good = assets(spec)
    tokenizer = good["tokenizer"]
    cases = {
        "is missing": {"config": good["config"]},
        "48 bytes": {**good, "config": good["config"] + b"x"},
        "not of version": {**good, "tokenizer": b"XXXX" + tokenizer[4:]},
        "bytes left over": {**good, "tokenizer": tokenizer + b"x"},
        "ask for more": {**good, "tokenizer": tokenizer[:100]},
        "outside the vocabulary": {**good, "tokenizer": tokenizer[:24] + struct.pack("<I", 99999) + tokenizer[28:]},
    }
    for reason, damaged in cases.items():
        with pytest.raises(GuestContractError, match=reason):
            run_initialisation(embed_wasm(), damaged, TENSORS)
    with pytest.raises(GuestContractError, match=r"no weight .*layers.0.o.bias"):
        run_initialisation(embed_wasm(), good, [name for name in TENSORS if name != "layers.0.o.bias"])
