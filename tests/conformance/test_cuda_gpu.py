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
#: Largest difference from the logits of transformers in the same type, root of the mean square, and by how much the
#: best of its logits must lead so that ours must agree. Logits reach 6; transformers rounds its own to bfloat16.
FROM_TRANSFORMERS = {"float32": (2e-3, 2e-4, 4e-3), "bfloat16": (0.35, 0.06, 0.15)}


def forced_steps(plan: ModelPlan, token_ids: list[int], num_prompt: int) -> tuple[FloatArray, list[int]]:
    """A prefill of ``num_prompt`` tokens, then a decode for each further one: logits, and the device's own choices."""
    model = device_backend().bind(plan)
    model.open_kv(8)
    table, rows, chosen = tuple(range(8)), [], []
    for end in range(num_prompt, len(token_ids) + 1):
        start = 0 if end == num_prompt else end - 1
        rows.append(compute_logits(model, SequenceInput(table, start, tuple(token_ids[start:end])))[0])
        chosen.append(model.sample([SamplingRow(0)])[0].token_id)
        if end == num_prompt:
            model.wait_weights()  # what follows goes by graph
    model.close()
    return np.stack(rows), chosen


def check_against_transformers(plan: ModelPlan, token_ids: list[int], expected: FloatArray, dtype: str) -> None:
    """Greedy steps of transformers: the same logits, and the same choice wherever its own is no near tie."""
    largest, root_mean_square, margin = FROM_TRANSFORMERS[dtype]
    found, chosen = forced_steps(plan, token_ids[:-1], len(token_ids) - len(expected))
    difference = np.abs(found - expected)
    assert difference.max() < largest
    assert np.sqrt((difference**2).mean()) < root_mean_square
    best = np.sort(expected, axis=1)
    is_clear = best[:, -1] - best[:, -2] > margin
    assert is_clear.mean() > (0.99 if dtype == "float32" else 0.5)
    np.testing.assert_array_equal(np.array(chosen)[is_clear], np.array(token_ids[-len(expected) :])[is_clear])


@pytest.mark.parametrize("dtype", FROM_TRANSFORMERS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_steps_are_those_that_transformers_took(name: str, dtype: str) -> None:
    """64 steps that transformers took on a CPU in the same type (tests/make_transformers_goldens.py)."""
    golden = load_file(DATA / name / "greedy.safetensors")
    token_ids = [int(token) for token in golden[f"{dtype}.token_ids"]]
    assert len(token_ids) == PROMPT_TOKENS + NUM_STEPS
    expected = golden[f"{dtype}.logits"].astype(np.float32)
    check_against_transformers(import_plan(name, dtype), token_ids, expected, dtype)


@pytest.mark.parametrize("dtype", FROM_TRANSFORMERS)
@pytest.mark.parametrize("name", MODELS)
def test_live_transformers_on_the_same_device(name: str, dtype: str) -> None:
    """The same against transformers on this GPU."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(DATA / name, dtype=getattr(torch, dtype)).to("cuda").eval()
    )
    token_ids, rows = [(37 * i + 5) % 256 for i in range(PROMPT_TOKENS)], []
    with torch.inference_mode():
        for _ in range(NUM_STEPS):
            rows.append(model(torch.tensor([token_ids], device="cuda")).logits[0, -1].float().cpu().numpy())
            token_ids.append(int(rows[-1].argmax()))
    check_against_transformers(import_plan(name, dtype), token_ids, np.stack(rows), dtype)


def test_parked_model_comes_back() -> None:
    """Its memory goes to the driver meanwhile, and the same logits follow."""
    model = device_backend().bind(random_plan(TINY, dtype="bfloat16"))
    first = SequenceInput((0,), 0, (1, 2, 3))
    model.open_kv(4)
    before = compute_logits(model, first)
    model.park()
    model.unpark()
    model.open_kv(4)
    np.testing.assert_array_equal(compute_logits(model, first), before)
    model.close()


def test_device_draws_what_the_host_draws() -> None:
    """Greedy and seeded draws from the logits that the device gave."""
    model = device_backend().bind(random_plan(TINY))
    model.open_kv(4)
    logits = compute_logits(model, SequenceInput((0,), 0, (1, 2, 3)))
    rows = [SamplingRow(0), SamplingRow(0, 0.7, 0.9, top_k=20, top_p=0.9), SamplingRow(0, 0.2, 1.1, min_p=0.05)]
    assert [t.token_id for t in model.sample(rows)] == [t.token_id for t in sample_rows(logits, rows)]
