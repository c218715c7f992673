"""The weights file: readable by any safetensors reader, page-aligned, and strictly checked."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from snapshots.errors import StoreError
from snapshots.weights_file import (
    PAGE_BYTES,
    TensorSpec,
    parse_weights_header,
    plan_weights,
    read_weights_header,
    write_weights,
)

SPECS = (
    TensorSpec("a.weight", "BF16", (3, 5)),
    TensorSpec("a.weight_scale", "F32", (1024,)),  # ends on a page boundary: no filler after it
    TensorSpec("b.weight", "I8", (7,)),
    TensorSpec("c.weight", "F32", (2, 2, 2)),
)


def make_arrays() -> list[np.ndarray]:
    """Arrays for SPECS."""
    random = np.random.default_rng(3)
    return [
        random.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        random.standard_normal(1024).astype(np.float32),
        np.arange(-3, 4, dtype=np.int8),
        random.standard_normal((2, 2, 2)).astype(np.float32),
    ]


def write_file(path: Path) -> Path:
    """The file of SPECS."""
    with path.open("wb") as file:
        write_weights(file, plan_weights(SPECS), make_arrays())
    return path


def test_safetensors_package_reads_the_same_values(tmp_path: Path) -> None:
    """Another implementation opens the file and finds every tensor with its dtype, shape and values."""
    path = write_file(tmp_path / "w.safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        names = {name for name in file.keys() if not name.startswith("pad.")}  # noqa: SIM118 - not a mapping
        assert names == {spec.name for spec in SPECS}
        for spec, array in zip(SPECS, make_arrays(), strict=True):
            found = file.get_tensor(spec.name)
            assert found.shape == spec.shape
            assert found.tobytes() == array.tobytes()


def test_every_tensor_starts_on_a_page(tmp_path: Path) -> None:
    """Offsets in the file are multiples of 4096, the first one included."""
    layout = plan_weights(SPECS)
    path = write_file(tmp_path / "w")
    assert path.stat().st_size == layout.size_bytes
    data = path.read_bytes()
    for entry, array in zip(layout.entries, make_arrays(), strict=True):
        assert entry.offset % PAGE_BYTES == 0
        assert data[entry.offset : entry.offset + entry.size_bytes] == array.tobytes()


def test_reader_finds_what_the_layout_planned(tmp_path: Path) -> None:
    """Reading the header gives the planned entries, fillers left out."""
    fd = os.open(write_file(tmp_path / "w"), os.O_RDONLY)
    try:
        assert read_weights_header(fd) == plan_weights(SPECS).entries
    finally:
        os.close(fd)


def test_layout_is_deterministic() -> None:
    """The same tensors give the same header bytes, so that equal models share one blob."""
    assert plan_weights(SPECS).header == plan_weights(list(SPECS)).header


@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "I8", "U8"]), st.lists(st.integers(1, 70), min_size=1, max_size=3))
    )
)
def test_any_layout_covers_its_file_without_holes(shapes: list[tuple[str, list[int]]]) -> None:
    """Whatever the tensors, a strict reader accepts the header and finds each page-aligned."""
    specs = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    if not specs:
        with pytest.raises(StoreError):
            plan_weights(specs)
        return
    layout = plan_weights(specs)
    entries = parse_weights_header(layout.header[8:], layout.size_bytes)
    assert tuple(entry for entry in entries if not entry.name.startswith("pad.")) == layout.entries
    assert all(entry.offset % PAGE_BYTES == 0 for entry in layout.entries)


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("pad.0", "F32", (1,)),
        TensorSpec("__metadata__", "F32", (1,)),
        TensorSpec("", "F32", (1,)),
        TensorSpec("a.weight", "F32", (1,)),
        TensorSpec("x", "F64", (1,)),
        TensorSpec("x", "F32", ()),
        TensorSpec("x", "F32", (0,)),
    ],
)
def test_specs_we_cannot_store_are_refused(spec: TensorSpec) -> None:
    """Reserved or repeated names, other dtypes, empty shapes."""
    with pytest.raises(StoreError):
        plan_weights([SPECS[0], spec])


def test_arrays_that_do_not_fit_the_plan_are_refused() -> None:
    """Too few, too many, or of another size: the message names the tensor."""
    arrays, layout = make_arrays(), plan_weights(SPECS)
    with pytest.raises(StoreError, match=r"'c\.weight' is missing"):
        write_weights(io.BytesIO(), layout, arrays[:3])
    with pytest.raises(StoreError, match="more tensors"):
        write_weights(io.BytesIO(), layout, [*arrays, arrays[0]])
    with pytest.raises(StoreError, match=r"'a\.weight': expected 30"):
        write_weights(io.BytesIO(), layout, [arrays[1]])
    with pytest.raises(StoreError, match="contiguous"):
        write_weights(io.BytesIO(), layout, [np.zeros((5, 3), np.uint16).T])


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    """A header entry of U8."""
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changes}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        json.dumps({"a": entry(0, 4), "b": entry(5, 10)}).encode(),
        json.dumps({"a": entry(0, 6), "b": entry(5, 10)}).encode(),
        json.dumps({"a": entry(0, 9)}).encode(),
        json.dumps({"a": entry(0, 11)}).encode(),
        json.dumps({"a": entry(0, 10, dtype="F64")}).encode(),
        json.dumps({"a": entry(0, 10, shape=[3])}).encode(),
        json.dumps({"a": entry(0, 10, shape=[-1, -10])}).encode(),
        json.dumps({"a": entry(0, 10, shape=[1] * 8 + [10])}).encode(),
        json.dumps({"a": entry(0, 10, data_offsets=[0])}).encode(),
        json.dumps({"a": 1}).encode(),
    ],
)
def test_malformed_headers_are_refused(header: bytes) -> None:
    """Holes, overlaps, wrong sizes and broken JSON."""
    with pytest.raises(StoreError):
        parse_weights_header(header, 8 + len(header) + 10)


@pytest.mark.parametrize("prefix", [b"", b"\0" * 7, b"\xff" * 8, (100).to_bytes(8, "little")])
def test_header_length_is_checked_before_it_is_read(tmp_path: Path, prefix: bytes) -> None:
    """A length beyond the file or the cap allocates nothing."""
    path = tmp_path / "w"
    path.write_bytes(prefix)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(StoreError):
            read_weights_header(fd)
    finally:
        os.close(fd)


@given(st.binary(max_size=200))
def test_arbitrary_headers_give_our_own_error(data: bytes) -> None:
    """No bytes make the parser fail in any way but its own error."""
    try:
        parse_weights_header(data, 8 + len(data))
    except StoreError:
        pass
