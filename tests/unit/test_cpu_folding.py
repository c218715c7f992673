"""Folded products: the weight's rows taken several at a time give what they give one at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from worker.backends import cpu_folding
from worker.backends.cpu_folding import choose_fold, fold_weight
from worker.backends.cpu_linear import bind_weight
from worker.backends.protocol import FloatArray, WeightTensor
from worker.backends.thread_governor import ThreadGovernor


def multiply(weight: WeightTensor, columns: FloatArray) -> FloatArray:
    """The product by the backend's own calls."""
    product = bind_weight(weight, ThreadGovernor(1))
    staging = product.make_staging((columns.shape[0], columns.shape[1]))
    out = np.zeros((len(weight.data), columns.shape[1]), np.float32)
    stage, run = staging.bind_stage(columns), product.bind(staging, out)
    for _ in range(2):  # what a first product left in the staging must not show in the second
        stage()
        run()
    return out


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_folded_product_equals_the_plain_one(dtype: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros beside an activation change nothing: int8 sums are the same numbers, bf16 ones up to their order."""
    rng = np.random.default_rng(num_tokens)
    if dtype == "int8":
        data = rng.integers(-127, 128, (768, 576)).astype(np.int8)
        weight = WeightTensor("w", data, rng.random(768, np.float32))
    else:
        weight = WeightTensor("w", rng.standard_normal((768, 576), np.float32).astype(ml_dtypes.bfloat16))
    columns = rng.standard_normal((576, num_tokens), np.float32)
    monkeypatch.setattr(cpu_folding, "HAS_TILES", False)
    plain = multiply(weight, columns)
    monkeypatch.setattr(cpu_folding, "HAS_TILES", True)
    folded = multiply(weight, columns)
    if dtype == "int8":
        np.testing.assert_array_equal(folded, plain)
    else:
        np.testing.assert_allclose(folded, plain, rtol=1e-5, atol=1e-4)


def test_fold_fills_the_columns_that_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many copies as the tile has columns, while rows stay short and threads have whole tiles; else none."""
    monkeypatch.setattr(cpu_folding, "HAS_TILES", True)
    assert choose_fold(np.empty((3072, 576), np.int8), 2, 2) == 8
    assert choose_fold(np.empty((3072, 576), np.int8), 4, 2) == 4
    assert choose_fold(np.empty((3072, 576), np.int8), 16, 2) == 1
    assert choose_fold(np.empty((3072, 576), np.int16), 1, 2) == 4  # 4.6 KB a row
    assert choose_fold(np.empty((49152, 576), np.int16), 1, 2) == 8  # large: 9.2 KB a row
    assert choose_fold(np.empty((576, 576), np.int8), 2, 2) == 4  # 72 rows a thread
    assert choose_fold(np.empty((577, 576), np.int8), 2, 1) == 1  # not divisible
    monkeypatch.setattr(cpu_folding, "HAS_TILES", False)
    assert choose_fold(np.empty((3072, 576), np.int8), 2, 2) == 1  # each column would cost as much as the first


def test_folded_weight_is_a_view() -> None:
    """No copy of a weight is made."""
    weight = np.arange(24, dtype=np.int8).reshape(6, 4)
    folded = fold_weight(weight, 3)
    assert folded.shape == (2, 12)
    assert np.shares_memory(folded, weight)
