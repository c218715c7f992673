"""bfloat16 rounding, int8 per output channel, and the q/k order."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint_files import permute_for_ggml
from worker.build.quantize import quantize_rows, round_to_bfloat16
from worker.build.weight_layout import split_rotary_halves


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_bfloat16_rounds_to_nearest_ties_to_even(values: list[float]) -> None:
    """Equal to rounding the float32 bit pattern by hand."""
    array = np.array(values, np.float32)
    bits = array.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    rounded = round_to_bfloat16(array)
    assert rounded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rounded.view(np.uint16), expected)


def test_int8_rows_are_off_by_at_most_half_a_scale() -> None:
    """Each row's largest magnitude becomes 127; the error of any element is at most half its row's scale."""
    rows = np.random.default_rng(0).normal(0, 1, (50, 300)).astype(np.float32)
    rows *= np.logspace(-4, 4, 50, dtype=np.float32)[:, None]
    quantized, scale = quantize_rows(rows)
    assert quantized.dtype == np.int8
    assert scale.shape == (50,)
    assert (np.abs(quantized).max(axis=1) == 127).all()
    error = np.abs(quantized * scale[:, None] - rows)
    assert (error <= 0.5001 * scale[:, None]).all()


def test_a_row_of_zeros_quantises_to_zeros() -> None:
    """No division by zero; the scale is 1."""
    quantized, scale = quantize_rows(np.zeros((2, 8), np.float32))
    assert not quantized.any()
    assert scale.tolist() == [1.0, 1.0]


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 5))
def test_unpermuting_undoes_what_converters_do(num_heads: int, half: int, columns: int) -> None:
    """For any shape, split_rotary_halves is the inverse of llama.cpp's permutation."""
    rows = np.arange(num_heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)
    np.testing.assert_array_equal(split_rotary_halves(permute_for_ggml(rows, num_heads), 2 * half), rows)
    bias = rows[:, 0]
    np.testing.assert_array_equal(split_rotary_halves(permute_for_ggml(bias, num_heads), 2 * half), bias)
