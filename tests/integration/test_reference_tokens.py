"""SmolLM2-135M against float32 transformers: greedy tokens and top-5 log-probabilities, for both CPU backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fixtures import EngineHarness, greedy, make_request
from llama_programs import build_plan, compute_logits, store_matrix
from model_fixtures import smollm2_gguf  # noqa: F401  # a fixture

from worker.backends.host_sampling import compute_logprobs
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import ModelPlan, SequenceInput, WeightTensor
from worker.build.gguf_source import open_gguf

RUNS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "smollm2_reference_runs.json").read_text()
)["runs"]
NUM_STEPS = 24  # of the reference backend: float32 in NumPy
CLEAR_MARGIN = 0.15  # nats between the two best tokens; below, rounding to bf16 may swap them


@pytest.fixture(scope="module")
def plans(smollm2_gguf: Path) -> dict[str, ModelPlan]:  # noqa: F811
    """The model with float32 and with bf16 weights, programs recorded in Python."""
    with open_gguf(smollm2_gguf) as source:
        weights = {tensor.name: tensor.read() for tensor in source.tensors}
        config = source.config
    return {
        dtype: build_plan(
            config,
            {
                name: store_matrix(name, data, dtype) if data.ndim == 2 else WeightTensor(name, data)
                for name, data in weights.items()
            },
        )
        for dtype in ("float32", "bfloat16")
    }


def test_reference_backend_gives_the_reference_tokens(plans: dict[str, ModelPlan]) -> None:
    """All prompts in one batch through the engine: tokens exactly, top-5 log-probabilities within 0.05."""
    plan = plans["float32"]
    harness = EngineHarness(plan=plan, bound=NumpyBackend().bind(plan), kv_budget_bytes=1 << 28)
    outcomes = [
        harness.submit(
            make_request(
                f"r{i}", tuple(run["prompt_tokens"]), greedy(min(NUM_STEPS, len(run["generated"])), num_top_logprobs=5)
            )
        )
        for i, run in enumerate(RUNS)
    ]
    harness.run_until_done()
    for run, outcome in zip(RUNS, outcomes, strict=True):
        assert outcome.token_ids() == run["generated"][:NUM_STEPS]
        for event, top5 in zip(outcome.events, run["top5"][:NUM_STEPS], strict=True):
            assert event.logprob is not None
            assert [entry.token_id for entry in event.logprob.top] == [token for token, _ in top5]
            found = [entry.logprob for entry in event.logprob.top]
            np.testing.assert_allclose(found, [logprob for _, logprob in top5], atol=0.05)


def test_numkong_bf16_agrees_wherever_the_choice_is_clear(plans: dict[str, ModelPlan]) -> None:
    """Fed the reference's tokens: same argmax in each step with a clear margin, log-probabilities within 0.35."""
    bound = NumKongBackend().bind(plans["bfloat16"])
    bound.open_kv(16 * len(RUNS))
    tables = [tuple(range(16 * i, 16 * i + 16)) for i in range(len(RUNS))]
    shares: list[tuple[int, tuple[int, ...]]] = [(0, tuple(run["prompt_tokens"])) for run in RUNS]
    num_clear = 0
    for step in range(max(len(run["generated"]) for run in RUNS)):
        active = [i for i, run in enumerate(RUNS) if step < len(run["generated"])]
        logits = compute_logits(bound, *(SequenceInput(tables[i], *shares[i]) for i in active))
        for row, i in zip(logits, active, strict=True):
            (best, best_logprob), (_, second_logprob) = RUNS[i]["top5"][step][:2]
            for token, logprob in RUNS[i]["top5"][step]:
                assert compute_logprobs(row, token, 0).chosen == pytest.approx(logprob, abs=0.35)
            if best_logprob - second_logprob > CLEAR_MARGIN:
                assert int(row.argmax()) == best
                num_clear += 1
            shares[i] = (shares[i][0] + len(shares[i][1]), (RUNS[i]["generated"][step],))
    assert num_clear > 80  # the margin must not have excused nearly everything
