"""Norms, rotary embedding, KV append, elementwise kernels against float64 NumPy, from the CUDA sources on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from cuda_fixtures import (
    ACTIVATIONS,
    DTYPES,
    TABLE_NAMES,
    TOLERANCE,
    Array,
    draw,
    poisoned,
    relative_error,
    run_in_every_order,
    seeded_rng,
)

from worker.backends import cuda_kernels as kernels
from worker.backends.cuda_kernels import TABLE_TYPES, Activation

Record = Callable[[str, object], None]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run of a seed."""
    return seeded_rng()


def _normalise(values: Array, weight: Array, epsilon: float) -> Array:
    values = values.astype(np.float64)
    result: Array = values / np.sqrt((values**2).mean(-1, keepdims=True) + epsilon) * weight.astype(np.float64)
    return result


def _close(result: Array, reference: Array, activation: str, record: Record) -> None:
    error = relative_error(result, reference)
    record("relative_error", error)
    assert error < TOLERANCE[activation]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 5, 64, 1000, 4096])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "after-add"])
def test_rms_norm(
    rng: np.random.Generator, activation: Activation, width: int, adds: bool, record_property: Record
) -> None:
    """RMS norm, and the fused residual add, at widths that are and are not multiples of the vector."""
    stored = ACTIVATIONS[width % 3]
    source, weight, delta = draw(rng, (3, width)), draw(rng, width, stored), draw(rng, (3, width), activation)
    sizes = {"weight_type": TABLE_TYPES[TABLE_NAMES[stored]], "num_rows": 3, "width": width, "epsilon": 1e-5}

    def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
        out, residual = poisoned((3, width), DTYPES[activation]), source.copy()
        if adds:
            return kernels.add_rms_norm(activation, out, residual, delta, weight, **sizes), (out, residual)
        return kernels.rms_norm(activation, out, residual, weight, **sizes), (out, residual)

    out, residual = run_in_every_order(make)
    total = source + delta.astype(np.float32) if adds else source
    np.testing.assert_array_equal(residual, total)
    _close(out, _normalise(total, weight, 1e-5), activation, record_property)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head_dim", [4, 64, 80, 128])
def test_head_rms_norm(
    rng: np.random.Generator, activation: Activation, head_dim: int, record_property: Record
) -> None:
    """Heads of some columns are normalised in place; the other columns stay."""
    rows, weight, num_heads, column = draw(rng, (5, 7 * head_dim), activation), draw(rng, head_dim), 3, 2 * head_dim

    def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
        changed = rows.copy()
        sizes = {"num_rows": 5, "row_stride": 7 * head_dim, "column": column, "num_heads": num_heads}
        return kernels.head_rms_norm(
            activation, changed, weight, weight_type=0, head_dim=head_dim, epsilon=1e-6, **sizes
        ), (changed,)

    (changed,) = run_in_every_order(make)
    expected = rows.astype(np.float64)
    heads = expected[:, column : column + num_heads * head_dim].reshape(5, num_heads, head_dim)
    expected[:, column : column + num_heads * head_dim] = _normalise(heads, weight, 1e-6).reshape(5, -1)
    np.testing.assert_array_equal(changed[:, :column], rows[:, :column])
    _close(changed, expected, activation, record_property)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [7, 384])
def test_layer_norm(rng: np.random.Generator, activation: Activation, width: int, record_property: Record) -> None:
    """Layer norm around the mean, with weight and bias."""
    source, weight, bias = draw(rng, (4, width)) + np.float32(3), draw(rng, width), draw(rng, width)

    def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
        out = poisoned((4, width), DTYPES[activation])
        return kernels.layer_norm(
            activation, out, source, weight, bias, table_type=0, num_rows=4, width=width, epsilon=1e-12
        ), (out,)

    (out,) = run_in_every_order(make)
    centred = source.astype(np.float64) - source.astype(np.float64).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * weight + bias
    _close(out, expected, activation, record_property)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("head_dim", "num_heads"), [(4, 1), (64, 5), (80, 2), (96, 3), (128, 2)])
def test_rope(
    rng: np.random.Generator, activation: Activation, head_dim: int, num_heads: int, record_property: Record
) -> None:
    """Half-split rotation of some columns by positions up to 100,000, with a scale."""
    half, num_rows, column = head_dim // 2, 3, head_dim
    stride = (num_heads + 2) * head_dim
    positions = rng.integers(0, 100_000, num_rows).astype(np.int32)
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    rows = draw(rng, (num_rows, stride), activation)

    def make_table() -> tuple[kernels.Launch, tuple[Array, ...]]:
        table = poisoned((num_rows, 2, half))
        return kernels.rope_table(table, positions, frequencies, num_rows=num_rows, half=half, scale=1.25), (table,)

    (table,) = run_in_every_order(make_table)
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)  # the product is rounded by rule
    cosines, sines = np.cos(angles) * 1.25, np.sin(angles) * 1.25
    assert relative_error(table, np.stack((cosines, sines), 1)) < 1e-6

    def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
        changed = rows.copy()
        sizes = {"num_rows": num_rows, "row_stride": stride, "column": column, "num_heads": num_heads, "half": half}
        return kernels.rope(activation, changed, table, **sizes), (changed,)

    (changed,) = run_in_every_order(make)
    expected = rows.astype(np.float64)
    heads = expected[:, column : column + num_heads * head_dim].reshape(num_rows, num_heads, head_dim)
    first, second = heads[..., :half].copy(), heads[..., half:].copy()
    heads[..., :half] = first * cosines[:, None] - second * sines[:, None]
    heads[..., half:] = second * cosines[:, None] + first * sines[:, None]
    expected[:, column : column + num_heads * head_dim] = heads.reshape(num_rows, -1)
    _close(changed, expected, activation, record_property)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 4), (2, 64), (3, 80)])
def test_kv_append(rng: np.random.Generator, activation: Activation, num_kv_heads: int, head_dim: int) -> None:
    """Keys and values land in their layer, block and offset, bit for bit; padding rows write nothing."""
    num_blocks, num_layers, layer, num_rows = 5, 3, 1, 7
    width = num_kv_heads * head_dim
    pool = draw(rng, (num_blocks, num_layers, 2, num_kv_heads, 16, head_dim), activation)
    rows = draw(rng, (num_rows, 3 * width), activation)
    slots = rng.permutation(num_blocks * 16)[:num_rows].astype(np.int32)
    slots[2] = -1

    def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
        changed = pool.copy()
        layer_start = changed.reshape(-1)[layer * 2 * width * 16 :]
        sizes = {"num_rows": num_rows, "row_stride": 3 * width, "key_column": width, "value_column": 2 * width}
        return kernels.kv_append(
            activation,
            layer_start,
            rows,
            slots,
            block_stride=pool[0].size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            **sizes,
        ), (changed,)

    (changed,) = run_in_every_order(make)
    expected = pool.copy()
    for row, slot in zip(rows, slots, strict=True):
        if slot >= 0:
            new = row[width:].reshape(2, num_kv_heads, head_dim)
            expected[slot // 16, layer, :, :, slot % 16] = new
    np.testing.assert_array_equal(changed.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [3, 64, 129])
def test_elementwise(rng: np.random.Generator, activation: Activation, width: int, record_property: Record) -> None:
    """SiLU-mul, GELU, bias, residual add and the conversions."""
    dtype, num_rows = DTYPES[activation], 5
    source, both = draw(rng, (num_rows, width), activation), draw(rng, (num_rows, 2 * width), activation, 4.0)
    bias, stream = draw(rng, width, "f16"), draw(rng, (num_rows, width))
    count = num_rows * width
    both[0, 0] = -300  # exp overflows: the result is 0

    def make_silu() -> tuple[kernels.Launch, tuple[Array, ...]]:
        out = poisoned((num_rows, width), dtype)
        return kernels.silu_mul(activation, out, both, num_rows=num_rows, width=width), (out,)

    def in_place(build: Callable[[Array], kernels.Launch], array: Array) -> Array:
        def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
            changed = array.copy()
            return build(changed), (changed,)

        return run_in_every_order(make)[0]

    (activated,) = run_in_every_order(make_silu)
    gate, up = both[:, :width].astype(np.float64), both[:, width:].astype(np.float64)
    _close(activated, gate / (1 + np.exp(-gate)) * up, activation, record_property)
    biased = in_place(
        lambda rows: kernels.bias_add(activation, rows, bias, bias_type=2, num_rows=num_rows, width=width), source
    )
    _close(biased, source.astype(np.float64) + bias.astype(np.float64), activation, record_property)
    curved = in_place(lambda rows: kernels.gelu(activation, rows, count=count), source)
    exact = source.astype(np.float64)
    erf = np.vectorize(math.erf)(exact / math.sqrt(2))
    _close(curved, exact * (1 + erf) / 2, activation, record_property)
    added = in_place(lambda residual: kernels.add(activation, residual, source, count=count), stream)
    np.testing.assert_array_equal(added, stream + source.astype(np.float32))
    narrowed = in_place(lambda out: kernels.narrow(activation, out, stream, count=count), poisoned(source.shape, dtype))
    np.testing.assert_array_equal(narrowed.view(np.uint8), stream.astype(dtype).view(np.uint8))
    widened = in_place(lambda out: kernels.widen(activation, out, source, count=count), poisoned(source.shape))
    np.testing.assert_array_equal(widened, source.astype(np.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_value_of_sixteen_bits_converts(activation: Activation) -> None:
    """Widening is exact for all 65,536 patterns, narrowing the inverse (NaN stays NaN)."""
    if activation == "f32":
        values = np.array([0.0, -0.0, 1e-45, -1e-38, 3e38, np.inf, -np.inf], np.float32)
    else:
        values = np.arange(65536, dtype=np.uint16).view(DTYPES[activation])
    wide, narrow = poisoned(values.shape), poisoned(values.shape, values.dtype)

    def make() -> tuple[kernels.Launch, tuple[Array, ...]]:
        return kernels.widen(activation, wide, values, count=len(values)), (wide,)

    run_in_every_order(make)
    np.testing.assert_array_equal(wide, values.astype(np.float32))
    run_in_every_order(lambda: (kernels.narrow(activation, narrow, wide, count=len(values)), (narrow,)))
    is_number = ~np.isnan(wide)
    np.testing.assert_array_equal(narrow[is_number].view(np.uint8), values[is_number].view(np.uint8))
    assert np.isnan(narrow[~is_number].astype(np.float32)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [9, 2050])
def test_row_moves_and_pooling(
    rng: np.random.Generator, activation: Activation, width: int, record_property: Record
) -> None:
    """Selection of last rows, mean pooling over spans, division by length."""
    source, indices = draw(rng, (6, width), activation), np.array([5, 0, 3], np.int32)

    def make_selection() -> tuple[kernels.Launch, tuple[Array, ...]]:
        out = poisoned((3, width), DTYPES[activation])
        return kernels.select_rows(activation, out, source, indices, num_rows=3, width=width), (out,)

    (selected,) = run_in_every_order(make_selection)
    np.testing.assert_array_equal(selected, source[indices])
    rows = source.astype(np.float32)
    firsts, lengths = np.array([0, 4], np.int32), np.array([4, 2], np.int32)

    def make_pool() -> tuple[kernels.Launch, tuple[Array, ...]]:
        out = poisoned((2, width))
        return kernels.mean_pool(out, rows, firsts, lengths, num_sequences=2, width=width), (out,)

    (pooled,) = run_in_every_order(make_pool)
    means = np.stack([rows[:4].mean(0, dtype=np.float64), rows[4:].mean(0, dtype=np.float64)])
    _close(pooled, means, "f32", record_property)

    def make_lengths() -> tuple[kernels.Launch, tuple[Array, ...]]:
        changed = rows.copy()
        return kernels.l2_normalise(changed, num_rows=6, width=width, lowest_length=1e-12), (changed,)

    (unit,) = run_in_every_order(make_lengths)
    wide = rows.astype(np.float64)
    _close(unit, wide / np.sqrt((wide**2).sum(-1, keepdims=True)), "f32", record_property)
