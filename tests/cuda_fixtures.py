"""The CUDA kernels on the CPU for tests: one emulator for the run, poisoned outputs, every thread order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from worker.backends.cuda_kernels import Launch
from worker.backends.kernels.emulation.emulator import KernelEmulator, ThreadOrder, build_emulator

CACHE_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "kernels"
Array = npt.NDArray[Any]

DTYPES: dict[str, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
TABLE_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
#: Largest difference from float64, relative to the largest value of the result: rounding of the result's own type, and
#: for float32 of sums in another order.
TOLERANCE = {"f32": 3e-6, "bf16": 4.5e-3, "f16": 6e-4}
ACTIVATIONS = tuple(DTYPES)


@functools.cache
def emulator() -> KernelEmulator:
    """The shipped kernels, compiled once for each content of the sources."""
    return build_emulator(CACHE_FOLDER)


def poisoned(shape: tuple[int, ...] | int, dtype: Any = np.float32) -> Array:
    """An array of 0xFF bytes: NaN in every floating type, -1 in every integer."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


def run_in_every_order(make: Callable[[], tuple[Launch, tuple[Array, ...]]]) -> tuple[Array, ...]:
    """Launch what ``make`` gives, afresh for each thread order; its outputs, which must not depend on the order."""
    results = []
    for order in ThreadOrder:
        launch, outputs = make()
        emulator().launch(launch, order)
        results.append(outputs)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    return results[0]


def relative_error(result: Array, reference: Array) -> float:
    """Largest difference over the largest magnitude of the reference; a NaN is infinitely wrong."""
    result = result.astype(np.float64)
    if not np.isfinite(result).all():
        return float("inf")
    return float(np.abs(result - reference).max() / max(np.abs(reference).max(), 1e-30))


def draw(rng: np.random.Generator, shape: tuple[int, ...] | int, activation: str = "f32", scale: float = 1.0) -> Array:
    """Fresh normal numbers in the activation's dtype."""
    return np.asarray(rng.standard_normal(shape) * scale).astype(DTYPES[activation])
