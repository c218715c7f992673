"""Rounding with error feedback: nearer where it counts, and readable by the same kernel."""

from __future__ import annotations

import numpy as np
import pytest

from worker.build.error_feedback import quantize_with_feedback
from worker.build.quantize import INT8_MAX, quantize_rows, scale_rows
from worker.build.source import FloatArray

SEED = 20_261


def _make_activations(num_columns: int, num_tokens: int) -> FloatArray:
    """Columns that depend on each other and differ in size, as a model's do."""
    random = np.random.default_rng(SEED)
    mixed = random.normal(size=(num_columns, num_columns)) @ random.normal(size=(num_columns, num_tokens))
    return (mixed * np.geomspace(0.1, 10, num_columns)[:, None]).astype(np.float32)


def _product_error(weights: FloatArray, activations: FloatArray, quantized: tuple[FloatArray, FloatArray]) -> float:
    data, scale = quantized
    return float(np.square((data * scale[:, None] - weights) @ activations).sum())


def test_products_come_nearer_than_with_rounding_to_the_nearest() -> None:
    """The squared error of products with fresh activations falls to less than half."""
    weights = np.random.default_rng(SEED).normal(size=(70, 96)).astype(np.float32)
    activations = _make_activations(96, 600)
    seen, fresh = activations[:, :400], activations[:, 400:]
    plain = _product_error(weights, fresh, quantize_rows(weights))
    fed_back = _product_error(weights, fresh, quantize_with_feedback(weights, seen @ seen.T))
    assert fed_back < plain / 2


@pytest.mark.parametrize("num_rows", [1, 5_000])
def test_scales_and_range_are_those_of_plain_rounding(num_rows: int) -> None:
    """So that every kernel reads either: the same scales, and values from -127 to 127, for few rows and many chunks."""
    weights = np.random.default_rng(SEED).normal(size=(num_rows, 40)).astype(np.float32)
    weights[0, 7] = 30  # an outlier leaves the row's other weights few steps
    activations = _make_activations(40, 100)
    data, scale = quantize_with_feedback(weights, activations @ activations.T)
    assert np.array_equal(scale, scale_rows(weights))
    assert data.dtype == np.int8
    assert np.abs(data.astype(np.int32)).max() <= INT8_MAX
    assert np.abs(data * scale[:, None] - weights).max() < 8 * scale.max()


def test_columns_that_no_text_showed_are_rounded_to_the_nearest() -> None:
    """Without activations there is nothing to weigh by, and no error to spread; rows of zeros stay zeros."""
    weights = np.random.default_rng(SEED).normal(size=(6, 33)).astype(np.float32)
    weights[3] = 0
    data, scale = quantize_with_feedback(weights, np.zeros((33, 33), np.float32))
    expected, expected_scale = quantize_rows(weights)
    assert np.abs(data.astype(np.int32) - expected).max() <= 1  # halves may fall to the other side
    assert np.array_equal(scale, expected_scale)
    assert not data[3].any()
