"""The llama guest for tests: tokeniser specifications, and the guest initialised with one of them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guests.initialise import initialise_guest
from guests.llama_assets import (
    CONFIG_ASSET,
    TOKENIZER_ASSET,
    LlamaConfig,
    PreTokenizer,
    TokenizerKind,
    TokenizerSpec,
    TokenKind,
    pack_config,
    pack_tokenizer,
)
from guests.runtime import DEFAULT_LIMITS, GuestEngine, GuestModule, InstanceLimits
from guests.shipped import llama_wasm
from guests.text import GuestText
from worker.build.gguf_file import GgufFile
from worker.build.gguf_tokenizer import read_gguf_tokenizer

SMOLLM2_PATH = Path(__file__).resolve().parent.parent / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
VECTORS_PATH = Path(__file__).parent / "data" / "smollm2_tokenizer_vectors.json"
SMOLLM2_VOCABULARY = 49_152
LAYER_WEIGHTS = ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down")
ONE_LAYER_WEIGHTS = (
    "embed.weight",
    "norm.weight",
    "rope.inv_freq",
    *(f"layers.0.{name}.weight" for name in LAYER_WEIGHTS),
)


def one_layer_config(vocab_size: int) -> LlamaConfig:
    """The smallest model around a tokeniser."""
    return LlamaConfig(
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=vocab_size,
        context_length=64,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
    )


@functools.cache
def smollm2_spec() -> TokenizerSpec:
    """The tokeniser of SmolLM2-135M-Instruct. A missing file fails the test."""
    if not SMOLLM2_PATH.is_file():
        pytest.fail(f"{SMOLLM2_PATH} is missing: run `make setup`, or `python tests/fetch_test_model.py`")
    return read_gguf_tokenizer(GgufFile(SMOLLM2_PATH), SMOLLM2_VOCABULARY)


def reference_vectors() -> dict[str, Any]:
    """Token ids that llama.cpp gave for SmolLM2."""
    return dict(json.loads(VECTORS_PATH.read_text()))


@contextmanager
def loaded_guest(spec: TokenizerSpec, *, padding: int = 0) -> Iterator[GuestModule]:
    """The llama guest around ``spec``, baked and compiled; the embedding has ``padding`` more rows than tokens."""
    config = one_layer_config(len(spec.tokens) + padding)
    assets = {CONFIG_ASSET: pack_config(config), TOKENIZER_ASSET: pack_tokenizer(spec)}
    baked = initialise_guest(llama_wasm(), assets, ONE_LAYER_WEIGHTS)
    with GuestEngine() as engine:
        engine.start_ticker()
        module = engine.compile(baked.baked_wasm)
        try:
            yield module
        finally:
            module.close()


@contextmanager
def guest_text(spec: TokenizerSpec, *, limits: InstanceLimits = DEFAULT_LIMITS) -> Iterator[GuestText]:
    """The text side of a guest around ``spec``."""
    with loaded_guest(spec) as module:
        text = GuestText(module, seed=1, limits=limits)
        try:
            yield text
        finally:
            text.close()


def small_spec(extra: tuple[bytes, ...] = (), **changes: Any) -> TokenizerSpec:
    """Byte-level: 256 bytes, then two control tokens <s> and </s> (256, 257), then ``extra`` ordinary tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"<s>", b"</s>", *extra]
    kinds = [TokenKind.NORMAL] * 256 + [TokenKind.CONTROL] * 2 + [TokenKind.NORMAL] * len(extra)
    fields: dict[str, Any] = {
        "kind": TokenizerKind.BYTE_LEVEL_BPE,
        "pre_tokenizer": PreTokenizer.GPT2,
        "tokens": tokens,
        "kinds": kinds,
        "bos_id": 256,
        "eos_ids": [257],
    }
    return TokenizerSpec(**(fields | changes))


# Unlike texts people write, these are dense in what splits and merges differently.
FRAGMENTS = (
    "the quick brown fox", "Hello", "world", "don't", "I'll", "WE'VE", "they're", "'S", "'LL", "'\u017f", "'\u017fo",
    "''s", "l'amour", "12", "1234567", "3.14159", "\u0661\u0662\u0663", "\u2163", "\u00bd", "x\u00b2", " ", "  ",
    "   ", "\n", "\n\n", " \n", "\n ", "\r\n", "\t", "\t\t", " \t ", "\u00a0", "\u2003", "\u3000", "\u0085", "\u2028",
    "\u180e", "\u200b", "!", "?!", "...", "=>", "{}", "();", "#include", "a_b", "--flag", "@user", "\u20ac",
    "\U0001f44b", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44b\U0001f3fd", "\U0001f1e9\U0001f1ea",
    "na\u00efve",
    "e\u0301", "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155", "\u0417\u0434\u0440",
    "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u2581",
    "\ufb06", "\u212a", "\U00016ff4", "\U00011de3", "\U0001d7d8", "\ufffd", "\ue000", "\x00", "\x04", "\x1d",
)  # fmt: skip


def random_texts(seed: int, count: int) -> list[str]:
    """Seeded texts over all Unicode planes, whitespace runs, digits, mixed scripts, contractions and emoji."""
    rng = random.Random(seed)
    return [_random_text(rng) for _ in range(count)]


def _random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 14)):
        choice = rng.random()
        if choice < 0.75:
            parts.append(rng.choice(FRAGMENTS) * rng.choice((1, 1, 1, 2, 3)))
        elif choice < 0.85:
            parts.append("".join(rng.choice("etaoin shrdlu'") for _ in range(rng.randint(1, 12))))
        else:
            parts.append("".join(_random_character(rng) for _ in range(rng.randint(1, 4))))
        if rng.random() < 0.4:
            parts.append(" ")
    return "".join(parts)


def _random_character(rng: random.Random) -> str:
    plane = rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 14, 15, 16))
    code_point = plane * 0x10000 + rng.randrange(0x10000 if plane else 0xD800)
    return chr(code_point)
