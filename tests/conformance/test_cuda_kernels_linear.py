"""Matrix-vector products and row gathers over every stored weight format, against float64 NumPy, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from cuda_fixtures import DTYPES, TOLERANCE, Array, draw, poisoned, relative_error, run_in_every_order, seeded_rng

from worker.backends import cuda_kernels as kernels
from worker.backends.cuda_kernels import FORMATS, OUTPUT_MODES, Activation
from worker.backends.protocol import BackendError

Record = Callable[[str, object], None]
GGUF_TYPES = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
    "q6_k": gguf.GGMLQuantizationType.Q6_K,
}
CASES = [
    (name, activation)
    for name, stored in FORMATS.items()
    for activation in (("bf16", "f32") if stored.is_quantised else (name,))
]


@dataclass(frozen=True)
class Stored:
    """A weight matrix as stored, its scales (0: none) and its exact values in float64."""

    weights: Any
    scales: Any
    values: Array


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run of a seed."""
    return seeded_rng()


def make_stored(rng: np.random.Generator, name: str, rows: int, width: int) -> Stored:
    """Random weights of a format: any bit pattern that stands for a number."""
    if name in DTYPES:
        weights = draw(rng, (rows, width), name)
        return Stored(weights, 0, weights.astype(np.float64))
    if name in ("int8", "e4m3"):
        codes = rng.integers(-128, 128, (rows, width)).astype(np.int8)
        weights = codes
        if name == "e4m3":
            codes[(codes & 0x7F) == 0x7F] = 0x7E  # NaN has its own test
            weights = codes.view(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.01, 0.1, rows).astype(np.float32)
        return Stored(weights, scales, weights.astype(np.float64) * scales[:, None])
    if name == "int4":
        codes = rng.integers(0, 256, (rows, width // 2)).astype(np.uint8)
        scales = rng.uniform(0.01, 0.1, (rows, width // group_of(width))).astype(np.float16)
        values = np.stack((codes & 15, codes >> 4), -1).reshape(rows, width).astype(np.float64) - 8
        return Stored(codes, scales, values * np.repeat(scales.astype(np.float64), group_of(width), 1))
    stored = FORMATS[name]
    blocks = rng.integers(0, 256, (rows, width // stored.block_weights, stored.block_bytes)).astype(np.uint8)
    num_halves = 2 if name in ("q4_1", "q4_k") else 1
    halves = rng.uniform(0.01, 0.1, (*blocks.shape[:2], num_halves)).astype(np.float16)
    first = 208 if name == "q6_k" else 0
    blocks[..., first : first + 2 * num_halves] = halves.view(np.uint8)
    packed = blocks.reshape(rows, -1)
    return Stored(packed, 0, gguf.dequantize(packed, GGUF_TYPES[name]).astype(np.float64))


def group_of(width: int) -> int:
    """Group size of int4 rows."""
    return 64 if width % 64 == 0 else 32


def widths_of(name: str) -> tuple[int, ...]:
    """Narrow, ragged over the warp, and wide enough for several rounds; for plain types also odd."""
    multiple = FORMATS[name].width_multiple
    widest = -(-2600 // max(multiple, 8)) * max(multiple, 8)
    return (multiple, 1, 37, 520, widest) if multiple == 1 else (multiple, 3 * multiple, widest)


@pytest.mark.parametrize(("name", "activation"), CASES)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 7])
def test_gemv(
    rng: np.random.Generator, name: str, activation: Activation, num_rows: int, record_property: Record
) -> None:
    """Products of 1 to 7 rows, with bias, into the activation type, float32, or added to float32."""
    for index, width in enumerate(widths_of(name)):
        num_outputs = int(rng.integers(1, 11))
        mode = list(OUTPUT_MODES)[(index + num_rows) % 3]
        stored = make_stored(rng, name, num_outputs, width)
        x, bias = draw(rng, (num_rows, width), activation), draw(rng, num_outputs) if index % 2 else None
        before = draw(rng, (num_rows, num_outputs))

        def make(
            width: int = width, mode: str = mode, stored: Stored = stored, x: Array = x, bias: Any = bias,
            before: Array = before, num_outputs: int = num_outputs,
        ) -> tuple[kernels.Launch, tuple[Array, ...]]:  # fmt: skip
            dtype = DTYPES[activation] if mode == "activation" else np.float32
            out = before.copy() if mode == "add" else poisoned((num_rows, num_outputs), dtype)
            sizes = {"num_rows": num_rows, "num_outputs": num_outputs, "width": width, "mode": OUTPUT_MODES[mode]}
            return kernels.gemv(
                name,
                activation,
                out,
                x,
                stored.weights,
                stored.scales,
                0 if bias is None else bias,
                bias_type=0,
                group_size=group_of(width),
                **sizes,
            ), (out,)

        (out,) = run_in_every_order(make)
        product = x.astype(np.float64) @ stored.values.T
        expected = product + (0 if bias is None else bias) + (before if mode == "add" else 0)
        magnitude = (np.abs(x.astype(np.float64)) @ np.abs(stored.values.T)).max()
        error = float(np.abs(out.astype(np.float64) - expected).max() / max(magnitude, np.abs(expected).max()))
        record_property("relative_error", error)
        assert error < TOLERANCE[activation if mode == "activation" else "f32"]


@pytest.mark.parametrize(
    ("name", "activation"), [(name, "f32") for name in FORMATS] + [case for case in CASES if case[1] == "bf16"][1:]
)
def test_gather_rows(rng: np.random.Generator, name: str, activation: Activation, record_property: Record) -> None:
    """Rows of every format as the activation type: in order, and by ids of which two lie outside."""
    for width in widths_of(name):
        group = group_of(width)
        stored = make_stored(rng, name, 6, width)
        ids = np.array([5, 0, 2, 2, -3, 99], np.int32)
        for indices, expected in ((ids, stored.values[np.clip(ids, 0, 5)]), (0, stored.values)):

            def make(
                width: int = width, stored: Stored = stored, indices: Any = indices, group: int = group
            ) -> tuple[kernels.Launch, tuple[Array, ...]]:
                out = poisoned((6, width), DTYPES[activation])
                return kernels.gather_rows(
                    name,
                    activation,
                    out,
                    stored.weights,
                    stored.scales,
                    indices,
                    num_rows=6,
                    num_table_rows=6,
                    width=width,
                    group_size=group,
                ), (out,)

            (out,) = run_in_every_order(make)
            error = relative_error(out, expected)
            record_property("relative_error", error)
            assert error < TOLERANCE[activation]


def test_every_fp8_pattern() -> None:
    """All 256 e4m3 patterns are what ml_dtypes says, NaN included."""
    weights = np.arange(256, dtype=np.uint8).reshape(1, 256).view(ml_dtypes.float8_e4m3fn)
    out, scales = poisoned((1, 256)), np.ones(1, np.float32)
    run_in_every_order(
        lambda: (
            kernels.gather_rows(
                "e4m3", "f32", out, weights, scales, 0, num_rows=1, num_table_rows=1, width=256, group_size=0
            ),
            (out,),
        )
    )
    np.testing.assert_array_equal(out, weights.astype(np.float32))


def test_what_no_kernel_reads_is_refused() -> None:
    """Unknown formats, widths that do not fit and types that do not go together name the limit."""
    sizes = {"bias_type": 0, "num_rows": 1, "num_outputs": 1}
    with pytest.raises(BackendError, match="q9: the kernels read f32"):
        kernels.gemv("q9", "bf16", 0, 0, 0, 0, 0, width=32, **sizes)
    with pytest.raises(BackendError, match="width 40: it must be a multiple of 32"):
        kernels.gemv("q4_0", "bf16", 0, 0, 0, 0, 0, width=40, **sizes)
    with pytest.raises(BackendError, match="groups of 24"):
        kernels.gemv("int4", "bf16", 0, 0, 0, 0, 0, width=96, group_size=24, **sizes)
    with pytest.raises(BackendError, match="bf16 weights with f16"):
        kernels.gemv("bf16", "f16", 0, 0, 0, 0, 0, width=32, **sizes)
