"""The llama guest's init: the programs it records compute what they should, and bad assets are refused in words."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llama_fixtures import ONE_LAYER_WEIGHTS, one_layer_config, small_spec
from llama_programs import TINY, compute_logits, random_plan

from guests.abi import Opcode, ProgramKind
from guests.errors import GuestContractError
from guests.initialisation import run_initialisation
from guests.initialise import InitialisedGuest, initialise_guest
from guests.llama_assets import CONFIG_ASSET, TOKENIZER_ASSET, LlamaConfig, pack_config, pack_tokenizer
from guests.program import Program, decode_program
from guests.runtime import GuestEngine
from guests.shipped import llama_wasm
from guests.text import GuestText
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import FloatArray, ModelPlan, SequenceInput

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "output bias": {"output_bias": True},
    "one key/value head for all": {"num_kv_heads": 1},
    "yarn": {"rope_scale": 1.25},
    "window from layer 1": {"sliding_window": 3, "sliding_window_from_layer": 1},
}


def initialise(config: LlamaConfig, tensor_names: list[str]) -> InitialisedGuest:
    spec = small_spec()
    tokens = min(config.vocab_size, len(spec.tokens))
    spec = replace(spec, tokens=spec.tokens[:tokens], kinds=spec.kinds[:tokens], bos_id=-1, eos_ids=[])
    assets = {CONFIG_ASSET: pack_config(config), TOKENIZER_ASSET: pack_tokenizer(spec)}
    return initialise_guest(llama_wasm(), assets, tensor_names)


def guest_program(guest: InitialisedGuest, kind: ProgramKind) -> Program:
    return decode_program(guest.programs[kind], num_tensors=len(guest.tensor_handles))


def run(plan: ModelPlan) -> list[FloatArray]:
    """Logits of a prefill of two sequences, and of two decode steps."""
    bound = NumpyBackend().bind(plan)
    bound.open_kv(2)
    steps = [((5, 6, 7, 8, 9, 10, 11), (40, 41, 42)), ((12,), (43,)), ((13,), (44,))]
    results = []
    positions = [0, 0]
    for step in steps:
        inputs = tuple(
            SequenceInput((block,), position, ids)
            for block, (position, ids) in enumerate(zip(positions, step, strict=True))
        )
        results.append(compute_logits(bound, *inputs))
        positions = [position + len(ids) for position, ids in zip(positions, step, strict=True)]
    bound.close()
    return results


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_recorded_programs_compute_the_model(changes: dict[str, Any]) -> None:
    """On the reference backend the guest's programs give exactly the logits of an independent recording."""
    expected = random_plan(replace(TINY, **changes))
    weights = {tensor.name: tensor for tensor in expected.tensors}
    guest = initialise(replace(TINY, **changes), list(weights))
    assert set(guest.tensor_handles) == set(weights)
    plan = replace(
        expected,
        prefill=guest_program(guest, ProgramKind.PREFILL),
        decode=guest_program(guest, ProgramKind.DECODE),
        tensors=tuple(weights[name] for name in guest.tensor_handles),
    )
    for ours, theirs in zip(run(plan), run(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_mlp_biases_are_recorded() -> None:
    """With mlp_bias both matrices of the MLP carry their bias."""
    names = [*ONE_LAYER_WEIGHTS, "layers.0.gate_up.bias", "layers.0.down.bias"]
    guest = initialise(replace(one_layer_config(96), mlp_bias=True), names)
    linear = [op for op in guest_program(guest, ProgramKind.DECODE).operations if op.opcode is Opcode.LINEAR]
    biases = [guest.tensor_handles[op.tensors[1]] for op in linear if op.tensors[1] < len(guest.tensor_handles)]
    assert biases == ["layers.0.gate_up.bias", "layers.0.down.bias"]


def test_activations_are_shared_by_all_layers() -> None:
    """A deeper model needs no more activation buffers."""
    shallow, deep = (
        guest_program(initialise(config, [tensor.name for tensor in random_plan(config).tensors]), ProgramKind.PREFILL)
        for config in (TINY, replace(TINY, num_layers=9))
    )
    assert shallow.num_values == deep.num_values


def test_missing_weights_are_all_named() -> None:
    """Init fails with the names of every weight that the model lacks."""
    names = [name for name in ONE_LAYER_WEIGHTS if "down" not in name and name != "norm.weight"]
    with pytest.raises(GuestContractError, match=r'"layers\.0\.down\.weight".*"norm\.weight"'):
        initialise(one_layer_config(96), names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONFIG_ASSET: None}, 'asset "config" is missing'),
        ({TOKENIZER_ASSET: None}, 'asset "tokenizer" is missing'),
        ({CONFIG_ASSET: b"GLCF"}, "must have 60 bytes, it has 4"),
        ({CONFIG_ASSET: bytes(60)}, "not of version 1: build the snapshot again"),
        ({TOKENIZER_ASSET: bytes(48)}, "not of version 1: build the snapshot again"),
        ({TOKENIZER_ASSET: b""}, "ends early"),
        ({CONFIG_ASSET: pack_config(one_layer_config(100))}, "needs 1 to vocab_size tokens, it has 258"),
    ],
)
def test_wrong_assets_are_refused_in_words(change: dict[str, bytes | None], message: str) -> None:
    """What is missing, of another version or contradictory fails init with a sentence."""
    whole: dict[str, bytes | None] = {
        CONFIG_ASSET: pack_config(one_layer_config(258)),
        TOKENIZER_ASSET: pack_tokenizer(small_spec()),
    }
    assets = {name: data for name, data in (whole | change).items() if data is not None}
    with pytest.raises(GuestContractError, match=message):
        initialise_guest(llama_wasm(), assets, ONE_LAYER_WEIGHTS)


def test_damaged_tokenizers_never_trap() -> None:
    """Truncated and altered tokenizer assets are refused, or give a guest that still answers."""
    whole = pack_tokenizer(small_spec((b"ab", b"[x]"), merges=[(ord("a"), ord("b"))]))
    rng = random.Random(13)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(10)]
    for _ in range(50):
        copy = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            copy[rng.randrange(rng.choice((48, len(copy))))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        damaged.append(bytes(copy))
    outcomes = [refusal_of(tokenizer) for tokenizer in damaged]
    assert all(outcomes[:10]), "a truncated asset was accepted"
    assert not any("the guest logged: nothing" in outcome for outcome in outcomes)


def refusal_of(tokenizer: bytes) -> str:
    """Why init refused this tokenizer asset; empty: it did not, and the guest answers calls."""
    assets = {CONFIG_ASSET: pack_config(one_layer_config(300)), TOKENIZER_ASSET: tokenizer}
    try:
        made = run_initialisation(llama_wasm(), assets, ONE_LAYER_WEIGHTS)  # here: a process for each is 0.1 s
    except GuestContractError as error:
        return str(error)
    answer(made.baked_wasm)
    return ""


def answer(baked_wasm: bytes) -> None:
    """One call of each kind, without a trap."""
    with GuestEngine() as engine:
        engine.start_ticker()
        module = engine.compile(baked_wasm)
        text = GuestText(module, seed=0)
        ids = text.tokenize("abc [x] <s>\u4f60", add_special=True, parse_special=True)
        text.detokenize(ids)
        text.close()
        module.close()
