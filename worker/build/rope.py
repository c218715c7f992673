"""Rotary position frequencies: every scaling variant becomes one vector of inverse frequencies and one factor.

A token at position p is rotated by the angles ``p * inv_freq`` in half-split pairs (i, i + head_dim / 2). Variants that
depend on the position (dynamic NTK, LongRoPE) are no vectors; dynamic NTK equals no scaling up to the trained
context, which is where glowplug stops anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from worker.build.errors import UnsupportedModelError
from worker.build.source import FloatArray

SUPPORTED_ROPE: Final = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters of rotary embeddings, named as in Hugging Face's ``rope_scaling``.

    ``attention_factor`` of None means the variant's own default; ``divisors`` [head_dim / 2] are GGUF's
    ``rope_freqs.weight``, which fold in a scaling that the converter computed.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_context: int = 0  # tokens
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: FloatArray | None = None


def compute_rope(scaling: RopeScaling, head_dim: int) -> tuple[FloatArray, float]:
    """Inverse frequencies ``[head_dim / 2]`` float32 and the factor on rotated queries and keys.

    Computed in float32 like the reference implementation, so that long positions rotate alike.

    Raises:
        UnsupportedModelError: an unknown kind of scaling, or parameters that make no frequencies.
    """
    if not 1 < scaling.theta < math.inf or not 0 < scaling.factor < math.inf:
        raise UnsupportedModelError(
            f"rope theta {scaling.theta:g} and factor {scaling.factor:g}: expected above 1 and above 0"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1.0) / np.power(np.float32(scaling.theta), exponents)
    if scaling.divisors is not None:
        inv_freq = inv_freq / scaling.divisors
    rope_scale = 1.0
    if scaling.kind == "linear":
        inv_freq = inv_freq / np.float32(scaling.factor)
    elif scaling.kind == "llama3":
        inv_freq = _scale_llama3(inv_freq, scaling)
    elif scaling.kind == "yarn":
        inv_freq = _scale_yarn(inv_freq, scaling, head_dim)
        rope_scale = _yarn_attention_factor(scaling)
    elif scaling.kind not in SUPPORTED_ROPE:
        raise UnsupportedModelError(f"rope scaling {scaling.kind!r}: supported are {', '.join(SUPPORTED_ROPE)}")
    if not np.isfinite(inv_freq).all() or not math.isfinite(rope_scale):
        raise UnsupportedModelError(f"rope scaling {scaling.kind} with parameters that make no frequencies")
    return inv_freq.astype(np.float32), rope_scale


def _require_original_context(scaling: RopeScaling) -> int:
    if scaling.original_context <= 0:
        raise UnsupportedModelError(
            f"rope scaling {scaling.kind} without its original context length (original_max_position_embeddings)"
        )
    return scaling.original_context


def _scale_llama3(inv_freq: FloatArray, scaling: RopeScaling) -> FloatArray:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between blended.

    Source: Llama 3.1 reference code, ``apply_scaling``.
    """
    if not scaling.high_freq_factor > scaling.low_freq_factor > 0:
        raise UnsupportedModelError(
            f"rope scaling llama3 with low_freq_factor {scaling.low_freq_factor:g} and high_freq_factor "
            f"{scaling.high_freq_factor:g}: the second must be the larger"
        )
    original_context = _require_original_context(scaling)
    wavelength = 2 * math.pi / inv_freq
    blend = (original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    is_long = wavelength > original_context / scaling.low_freq_factor
    is_short = wavelength < original_context / scaling.high_freq_factor
    return np.where(is_long, inv_freq / scaling.factor, np.where(is_short, inv_freq, blended)).astype(np.float32)


def _scale_yarn(inv_freq: FloatArray, scaling: RopeScaling, head_dim: int) -> FloatArray:
    """Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", section 3.2."""
    original_context = _require_original_context(scaling)

    def correction(num_rotations: float) -> float:
        return head_dim * math.log(original_context / (num_rotations * 2 * math.pi)) / (2 * math.log(scaling.theta))

    low, high = correction(scaling.beta_fast), correction(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    scaled: FloatArray = (inv_freq / scaling.factor * (1 - keep) + inv_freq * keep).astype(np.float32)
    return scaled


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
