"""The GPU backend on a GPU: skipped, alone of all tests, where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from llama_programs import TINY, compute_logits, random_plan

from worker.backends.choice import make_backend
from worker.backends.detection import detect_backend
from worker.backends.host_sampling import sample_rows
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import SequenceInput
from worker.backends.sampling_rows import SamplingRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(detect_backend() != "cuda", reason="no GPU, or CuPy is not installed"),
]
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.35, "int8": 0.35}  # products of float32 may use TF32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_logits_on_the_device_agree_with_the_reference(dtype: str, head_dim: int) -> None:
    """Prefill, a second chunk and decodes, eager and by graph, against float32 NumPy."""
    config = replace(TINY, head_dim=head_dim, qkv_bias=True, qk_norm=True)
    plan = random_plan(config, dtype=dtype)
    models = [make_backend("cuda", 1).bind(plan), NumpyBackend().bind(plan)]
    for model in models:
        model.open_kv(16)
    start = 0
    for count in (37, 20, 1, 1, 1):
        step = SequenceInput((3, 1, 7, 2), start, tuple(range(count)))
        found, wanted = (compute_logits(model, step) for model in models)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE[dtype], rtol=0)
        start += count


def test_device_draws_what_the_host_draws() -> None:
    """Greedy and seeded draws from the logits that the device gave."""
    model = make_backend("cuda", 1).bind(random_plan(TINY))
    model.open_kv(4)
    logits = compute_logits(model, SequenceInput((0,), 0, (1, 2, 3)))
    rows = [SamplingRow(0), SamplingRow(0, 0.7, 0.9, top_k=20, top_p=0.9), SamplingRow(0, 0.2, 1.1, min_p=0.05)]
    assert [t.token_id for t in model.sample(rows)] == [t.token_id for t in sample_rows(logits, rows)]
