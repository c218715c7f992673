"""The weights blob: a safetensors file whose every tensor starts on a page boundary.

Format (Source: the safetensors format description): u64 header length, JSON header, data. Data must be covered
without holes, so the space between tensors is filled by tensors ``pad.N`` of U8; the header is padded with spaces so
that data, too, starts on a page. Any safetensors reader can open it; we map it and take offsets from the manifest.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from snapshots.block_types import DTYPE_BYTES, TENSOR_TYPES, byte_shape, count_tensor_bytes, fits_blocks
from snapshots.errors import StoreError
from snapshots.manifest import MAX_TENSORS, TensorEntry

PAGE_BYTES: Final = 4096
PAD_PREFIX: Final = "pad."
MAX_HEADER_BYTES: Final = 32 * 1024 * 1024
_LENGTH: Final = struct.Struct("<Q")
_WRITE_BYTES: Final = 16 * 1024 * 1024


class TensorSpec(NamedTuple):
    """A tensor to be written, of a dtype of block_types.TENSOR_TYPES; in blocks it is ``U8`` for other readers."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return count_tensor_bytes(self.dtype, self.shape)

    @property
    def header_type(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape in the file's header, which any safetensors reader knows."""
        return self.dtype if self.dtype in DTYPE_BYTES else "U8", byte_shape(self.dtype, self.shape)


class WeightsLayout(NamedTuple):
    """Where everything goes: known before any tensor is at hand, so that a build can stream."""

    header: bytes  # length field and padded JSON: the file's first bytes
    entries: tuple[TensorEntry, ...]  # in file order, without fillers; offsets from the start of the file
    size_bytes: int  # of the whole file


class Sink(Protocol):
    """What a layout is written to: a blob writer, or a binary file."""

    def write(self, data: memoryview, /) -> int:
        """Append ``data``."""


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def plan_weights(specs: Sequence[TensorSpec]) -> WeightsLayout:
    """Lay out tensors in the given order.

    Raises:
        StoreError: no tensor, a dtype we do not store, an empty shape or size, a name that is reserved or used twice.
    """
    _validate_specs(specs)
    header: dict[str, _HeaderEntry] = {}
    places: list[tuple[TensorSpec, int]] = []
    position = 0
    for spec in specs:
        gap = -position % PAGE_BYTES
        if gap:
            header[f"{PAD_PREFIX}{len(header)}"] = _HeaderEntry("U8", (gap,), (position, position + gap))
            position += gap
        header[spec.name] = _HeaderEntry(*spec.header_type, (position, position + spec.size_bytes))
        places.append((spec, position))
        position += spec.size_bytes
    text = msgspec.json.encode(header)
    text += b" " * (-(_LENGTH.size + len(text)) % PAGE_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise StoreError(f"weights header of {len(text)} bytes, at most {MAX_HEADER_BYTES}")
    start = _LENGTH.size + len(text)
    entries = tuple(TensorEntry(s.name, s.dtype, s.shape, start + offset, s.size_bytes) for s, offset in places)
    return WeightsLayout(_LENGTH.pack(len(text)) + text, entries, start + position)


def write_weights(sink: Sink, layout: WeightsLayout, tensors: Iterable[npt.NDArray[np.generic]]) -> None:
    """Write the header, then each tensor as it comes from ``tensors`` (layout order), with fillers between.

    Arrays are C-contiguous, of any dtype whose bytes are the stored ones (little-endian; bfloat16 also as uint16).

    Raises:
        StoreError: too few or too many tensors, or one with another size than planned.
    """
    sink.write(memoryview(layout.header))
    position = len(layout.header)
    source = iter(tensors)
    for entry in layout.entries:
        tensor = next(source, None)
        if tensor is None:
            raise StoreError(f"tensor {entry.name!r} is missing: the source ended early")
        if tensor.nbytes != entry.size_bytes or not tensor.flags.c_contiguous:
            raise StoreError(
                f"tensor {entry.name!r}: expected {entry.size_bytes} contiguous bytes, got {tensor.nbytes} "
                f"({tensor.dtype}, shape {tensor.shape})"
            )
        sink.write(memoryview(bytes(entry.offset - position)))
        # Through uint8: ml_dtypes' bfloat16 has no buffer format of its own.
        data = tensor.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _WRITE_BYTES):
            sink.write(data[start : start + _WRITE_BYTES])
        position = entry.offset + entry.size_bytes
    if next(source, None) is not None:
        raise StoreError(f"more tensors than the {len(layout.entries)} planned")


def read_weights_header(fd: int) -> tuple[TensorEntry, ...]:
    """Entries of a safetensors file in file order, fillers left out; the position of ``fd`` is not moved.

    For checks and tools: serving takes offsets from the signed manifest and never parses this header.

    Raises:
        StoreError: over a cap, malformed, or data not covered exactly once.
    """
    file_bytes = os.fstat(fd).st_size
    prefix = os.pread(fd, _LENGTH.size, 0)
    if len(prefix) < _LENGTH.size:
        raise StoreError(f"weights file of {file_bytes} bytes is too short for a header")
    (header_bytes,) = _LENGTH.unpack(prefix)
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - _LENGTH.size):
        raise StoreError(
            f"weights header of {header_bytes} bytes in a file of {file_bytes}, at most {MAX_HEADER_BYTES}"
        )
    entries = parse_weights_header(os.pread(fd, header_bytes, _LENGTH.size), file_bytes)
    return tuple(entry for entry in entries if not entry.name.startswith(PAD_PREFIX))


def parse_weights_header(text: bytes, file_bytes: int) -> tuple[TensorEntry, ...]:
    """All entries (fillers too) of header ``text`` of a file of ``file_bytes``, sorted by offset.

    Raises:
        StoreError: malformed, or data not covered exactly once.
    """
    start = _LENGTH.size + len(text)
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        if len(raw) > 2 * MAX_TENSORS:
            raise StoreError(f"{len(raw)} entries in a weights header, at most {2 * MAX_TENSORS}")
        header = {name: msgspec.json.decode(value, type=_HeaderEntry) for name, value in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"weights header is malformed: {error}") from error
    position = 0
    entries = []
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        item_bytes = DTYPE_BYTES.get(entry.dtype)
        if item_bytes is None:
            raise StoreError(f"tensor {name[:80]!r}: dtype {entry.dtype[:20]!r}, expected {sorted(DTYPE_BYTES)}")
        if len(entry.shape) > 8 or any(size < 0 for size in entry.shape):
            raise StoreError(f"tensor {name[:80]!r}: shape {entry.shape[:8]}, expected at most 8 sizes, none negative")
        if begin != position or end - begin != math.prod(entry.shape) * item_bytes:
            raise StoreError(f"tensor {name[:80]!r}: bytes {begin} to {end} leave a hole or do not fit {entry.shape}")
        entries.append(TensorEntry(name, entry.dtype, entry.shape, start + begin, end - begin))
        position = end
    if start + position != file_bytes:
        raise StoreError(f"weights file has {file_bytes} bytes, its header accounts for {start + position}")
    return tuple(entries)


def _validate_specs(specs: Sequence[TensorSpec]) -> None:
    if not 0 < len(specs) <= MAX_TENSORS:
        raise StoreError(f"{len(specs)} tensors, expected 1 to {MAX_TENSORS}")
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen or not spec.name or spec.name.startswith(PAD_PREFIX) or spec.name == "__metadata__":
            raise StoreError(f"tensor name {spec.name[:80]!r} is empty, reserved or used twice")
        seen.add(spec.name)
        if spec.dtype not in TENSOR_TYPES:
            raise StoreError(f"tensor {spec.name!r}: dtype {spec.dtype!r}, expected one of {sorted(TENSOR_TYPES)}")
        if not spec.shape or any(size <= 0 for size in spec.shape):
            raise StoreError(f"tensor {spec.name!r}: shape {spec.shape}, expected positive sizes")
        if not fits_blocks(spec.dtype, spec.shape):
            raise StoreError(f"tensor {spec.name!r}: shape {spec.shape} is no matrix of whole {spec.dtype} blocks")
