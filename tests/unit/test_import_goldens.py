"""Tiny random models, imported from their Hugging Face folders, compute what transformers computed for them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.llama_programs import build_plan, compute_logits
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import SequenceInput, WeightTensor
from worker.build.hf_source import open_hugging_face
from worker.build.quantize import round_to_bfloat16
from worker.build.source import SourceTensor

DATA = Path(__file__).resolve().parent.parent / "data"
MODELS = ("tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_mistral")
PREFILL_TOKENS = 23
#: float32 summed in another order; logits reach 6.
TOLERANCE = 2e-4


def _store(tensor: SourceTensor) -> WeightTensor:
    values = tensor.read()
    return WeightTensor(tensor.name, round_to_bfloat16(values) if tensor.is_matrix else values)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_then_decode_gives_the_logits_of_transformers(name: str) -> None:
    """Every position from the end of the prefill on has the reference's logits, one decode step each."""
    golden = load_file(DATA / name / "golden.safetensors")
    token_ids = [int(token) for token in golden["input_ids"]]
    with open_hugging_face(DATA / name) as source:
        weights = {tensor.name: _store(tensor) for tensor in source.tensors}
        bound = NumpyBackend().bind(build_plan(source.config, weights))
    bound.open_kv(8)
    table = tuple(range(8))
    logits = compute_logits(bound, SequenceInput(table, 0, tuple(token_ids[:PREFILL_TOKENS])))
    np.testing.assert_allclose(logits[0], golden["logits"][PREFILL_TOKENS - 1], atol=TOLERANCE, rtol=0)
    for position in range(PREFILL_TOKENS, len(token_ids)):
        logits = compute_logits(bound, SequenceInput(table, position, (token_ids[position],)))
        np.testing.assert_allclose(logits[0], golden["logits"][position], atol=TOLERANCE, rtol=0)
    bound.close()


def test_goldens_can_tell_the_variants_apart() -> None:
    """Rotary scaling, sliding window and QK norm are really on in the goldens, so that passing them means something."""
    configs = {}
    for name in MODELS:
        with open_hugging_face(DATA / name) as source:
            configs[name] = source.config
    assert configs["tiny_llama"].num_kv_heads < configs["tiny_llama"].num_heads
    assert not configs["tiny_llama"].tie_embeddings
    assert configs["tiny_qwen2"].qkv_bias
    assert configs["tiny_qwen2"].rope_scale > 1
    assert configs["tiny_qwen3"].qk_norm
    assert configs["tiny_mistral"].sliding_window == 8


def test_weights_survive_the_import_bit_for_bit() -> None:
    """A bfloat16 checkpoint rounds to exactly its own bits, with q, k and v stacked in that order."""
    raw = (DATA / "tiny_llama" / "model.safetensors").read_bytes()
    with open_hugging_face(DATA / "tiny_llama") as source:
        tensors = {tensor.name: tensor for tensor in source.tensors}
        qkv = round_to_bfloat16(tensors["layers.1.qkv.weight"].read())
    assert qkv.dtype == ml_dtypes.bfloat16
    queries, keys, values = qkv[:48].tobytes(), qkv[48:72].tobytes(), qkv[72:].tobytes()
    assert queries in raw
    assert keys in raw
    assert values in raw
