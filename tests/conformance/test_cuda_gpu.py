"""The GPU backend on a GPU: skipped, alone of all tests, where there is none."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from imported_plans import DATA, import_plan
from llama_programs import TINY, compute_logits, random_plan
from safetensors.numpy import load_file

from worker.backends.choice import make_backend
from worker.backends.host_sampling import sample_rows
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, FloatArray, ModelPlan, SequenceInput
from worker.backends.sampling_rows import SamplingRow


def has_gpu() -> bool:
    """Whether CuPy is installed and sees a device."""
    if importlib.util.find_spec("cupy") is None:
        return False
    from cupy.cuda import runtime

    try:
        return bool(runtime.getDeviceCount())
    except runtime.CUDARuntimeError:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="no GPU, or CuPy is not installed")]
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.35, "int8": 0.35}


@functools.cache
def device_backend() -> Backend:
    """One for the run: a worker has one."""
    return make_backend("cuda", 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_logits_on_the_device_agree_with_the_reference(dtype: str, head_dim: int) -> None:
    """Prefill, a second chunk and decodes, eager and by graph, against float32 NumPy."""
    config = replace(TINY, head_dim=head_dim, qkv_bias=True, qk_norm=True)
    plan = random_plan(config, dtype=dtype)
    models = [device_backend().bind(plan), NumpyBackend().bind(plan)]
    for model in models:
        model.open_kv(16)
    start = 0
    for count in (37, 20, 1, 1, 1):
        step = SequenceInput((3, 1, 7, 2), start, tuple(range(count)))
        found, wanted = (compute_logits(model, step) for model in models)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE[dtype], rtol=0)
        start += count
    for model in models:
        model.close()


def test_blocks_of_gguf_on_the_device_agree_with_the_reference() -> None:
    """Matrices in every type of block: gathered, multiplied as stored (decode), and widened for cuBLAS (prefill)."""
    plan = random_plan(replace(TINY, hidden_size=256, intermediate_size=256, tie_embeddings=False), dtype="gguf")
    models = [device_backend().bind(plan), NumpyBackend().bind(plan)]
    for model in models:
        model.open_kv(16)
    start = 0
    for count in (37, 3, 1, 1):
        step = SequenceInput((3, 1, 7, 2), start, tuple(range(count)))
        found, wanted = (compute_logits(model, step) for model in models)
        np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max(), rtol=0)
        start += count
    for model in models:
        model.close()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_batched_decodes_go_through_graphs(dtype: str) -> None:
    """Twelve sequences: prefills in one step, then decodes whose products are the vendor's, captured and replayed."""
    plan = random_plan(replace(TINY, head_dim=64), dtype=dtype)
    models = [device_backend().bind(plan), NumpyBackend().bind(plan)]
    prompts = [tuple((7 * index + i) % 96 for i in range(1 + index)) for index in range(12)]
    for model in models:
        model.open_kv(12)
        model.step(tuple(SequenceInput((index,), 0, prompt) for index, prompt in enumerate(prompts)))
    models[0].wait_weights()  # graphs are for models that are all there
    for step in range(3):
        inputs = tuple(SequenceInput((i,), len(prompt) + step, (step,)) for i, prompt in enumerate(prompts))
        found, wanted = (compute_logits(model, *inputs) for model in models)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE[dtype], rtol=0)
    assert models[0].statistics()["num_graph_replays"] == 3
    for model in models:
        model.close()


MODELS = ("tiny_llama", "tiny_qwen2", "tiny_qwen3")
PROMPT_TOKENS, NUM_STEPS = 16, 64


def forced_logits(plan: ModelPlan, token_ids: list[int], num_prompt: int) -> FloatArray:
    """Logits of positions ``num_prompt - 1`` on: a prefill, then a decode for each further token."""
    model = device_backend().bind(plan)
    model.open_kv(8)
    table = tuple(range(8))
    rows = [compute_logits(model, SequenceInput(table, 0, tuple(token_ids[:num_prompt])))[0]]
    model.wait_weights()
    for position in range(num_prompt, len(token_ids)):
        rows.append(compute_logits(model, SequenceInput(table, position, (token_ids[position],)))[0])
    model.close()
    return np.stack(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_that_transformers_gave(name: str, dtype: str) -> None:
    """Against float32 logits that transformers computed on a CPU, at every position of 40 tokens."""
    golden = load_file(DATA / name / "golden.safetensors")
    found = forced_logits(import_plan(name, dtype), [int(token) for token in golden["input_ids"]], 23)
    np.testing.assert_allclose(
        found, golden["logits"][22:], atol=TOLERANCE[dtype] / (5 if dtype == "float32" else 1), rtol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_live_transformers_on_the_same_device(name: str, dtype: str) -> None:
    """64 greedy steps of transformers on this GPU: the same logits, and the same choice wherever it is no near tie."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(DATA / name, dtype=getattr(torch, dtype)).to("cuda").eval()
    )
    token_ids = [(37 * i + 5) % 256 for i in range(PROMPT_TOKENS)]
    with torch.inference_mode():
        for _ in range(NUM_STEPS):
            logits = model(torch.tensor([token_ids], device="cuda")).logits[0].float().cpu().numpy()
            token_ids.append(int(logits[-1].argmax()))
    found = forced_logits(import_plan(name, dtype), token_ids[:-1], PROMPT_TOKENS)
    expected = logits[PROMPT_TOKENS - 1 :]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype], rtol=0)
    best = np.sort(expected, axis=1)
    is_clear = best[:, -1] - best[:, -2] > 2 * np.abs(found - expected).max(axis=1)
    assert is_clear.any()
    np.testing.assert_array_equal(found.argmax(axis=1)[is_clear], expected.argmax(axis=1)[is_clear])


def test_parked_model_comes_back() -> None:
    """Its memory goes to the driver meanwhile, and the same logits follow."""
    model = device_backend().bind(random_plan(TINY, dtype="bfloat16"))
    first = SequenceInput((0,), 0, (1, 2, 3))
    model.open_kv(4)
    before = compute_logits(model, first)
    model.park()
    model.unpark()
    np.testing.assert_array_equal(compute_logits(model, first), before)
    model.close()


def test_device_draws_what_the_host_draws() -> None:
    """Greedy and seeded draws from the logits that the device gave."""
    model = device_backend().bind(random_plan(TINY))
    model.open_kv(4)
    logits = compute_logits(model, SequenceInput((0,), 0, (1, 2, 3)))
    rows = [SamplingRow(0), SamplingRow(0, 0.7, 0.9, top_k=20, top_p=0.9), SamplingRow(0, 0.2, 1.1, min_p=0.05)]
    assert [t.token_id for t in model.sample(rows)] == [t.token_id for t in sample_rows(logits, rows)]
