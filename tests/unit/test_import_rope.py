"""Rotary frequencies of every scaling variant, against transformers' goldens and against the formulas' edges."""

from __future__ import annotations

import numpy as np
import pytest

from worker.build.errors import UnsupportedModelError
from worker.build.rope import RopeScaling, compute_rope

HEAD_DIM = 64


def test_without_scaling_the_frequencies_are_powers_of_theta() -> None:
    """theta^(-2i/d), from 1 down; the factor on queries and keys is 1."""
    inv_freq, scale = compute_rope(RopeScaling(theta=10_000.0), HEAD_DIM)
    np.testing.assert_allclose(inv_freq, 10_000.0 ** (-np.arange(32) / 32), rtol=1e-6)
    assert inv_freq.dtype == np.float32
    assert scale == 1.0


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    """Wavelengths below original/high are kept, above original/low divided by the factor, between them blended."""
    plain, _ = compute_rope(RopeScaling(theta=5e5), HEAD_DIM)
    scaled, _ = compute_rope(RopeScaling("llama3", 5e5, 8.0, 8192), HEAD_DIM)
    wavelength = 2 * np.pi / plain
    is_short, is_long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[is_short], plain[is_short])
    np.testing.assert_allclose(scaled[is_long], plain[is_long] / 8, rtol=1e-6)
    between = ~is_short & ~is_long
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_yarn_blends_between_its_two_rotation_counts() -> None:
    """The fastest pairs are kept, the slowest divided by the factor; scores are scaled by 0.1 ln(factor) + 1."""
    plain, _ = compute_rope(RopeScaling(theta=1e6), HEAD_DIM)
    scaled, scale = compute_rope(RopeScaling("yarn", 1e6, 4.0, 32_768), HEAD_DIM)
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-6)
    assert scale == pytest.approx(1.1386294)
    _, stated = compute_rope(RopeScaling("yarn", 1e6, 4.0, 32_768, attention_factor=1.0), HEAD_DIM)
    assert stated == 1.0


def test_dynamic_scaling_is_none_within_the_trained_context() -> None:
    """Dynamic NTK changes nothing up to max_position_embeddings, which is where a snapshot's context ends."""
    plain, _ = compute_rope(RopeScaling(), HEAD_DIM)
    dynamic, _ = compute_rope(RopeScaling("dynamic"), HEAD_DIM)
    np.testing.assert_array_equal(dynamic, plain)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("su"),
        RopeScaling("llama3", 5e5, 8.0, 0),
        RopeScaling("llama3", 5e5, 8.0, 8192, low_freq_factor=4.0, high_freq_factor=4.0),
        RopeScaling("yarn", 1e6, 4.0, 0),
        RopeScaling(theta=0.0),
        RopeScaling(theta=float("nan")),
        RopeScaling("linear", factor=0.0),
        RopeScaling("yarn", 1e6, 4.0, 4096, attention_factor=float("inf")),
    ],
)
def test_parameters_that_make_no_frequencies_are_refused(scaling: RopeScaling) -> None:
    """Unknown kinds and impossible numbers never reach the weights."""
    with pytest.raises(UnsupportedModelError):
        compute_rope(scaling, HEAD_DIM)
