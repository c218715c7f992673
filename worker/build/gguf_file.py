"""Reader of GGUF files that trusts nothing: every length and offset is checked against the file before use.

The ``gguf`` package's own reader loops over counts as the header states them and indexes past the end of a truncated
file; here a hostile header costs no more than its own bytes. Only dequantisation is the package's.

Layout (GGUF version 2 and 3, little-endian): magic ``GGUF``, u32 version, u64 tensors, u64 metadata entries; the
entries (string key, u32 type, value); the tensor infos (string name, u32 dimensions, u64 each, innermost first,
u32 type, u64 offset); padding to ``general.alignment``; tensor data. A string is u64 length and bytes.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from worker.build.errors import MalformedModelError, UnsupportedModelError
from worker.build.source import ByteArray, FloatArray

T = TypeVar("T")

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_METADATA_ENTRIES: Final = 65_536
MAX_TENSORS: Final = 65_536
MAX_STRING_BYTES: Final = 16 * 1024 * 1024
MAX_DIMENSIONS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20
DEFAULT_ALIGNMENT: Final = 32

STRING_TYPE: Final = 8
ARRAY_TYPE: Final = 9
#: Scalar value types of the metadata, by their number.
SCALARS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

SUPPORTED_TYPES: Final = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. ``shape`` is outermost dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset_bytes: int
    row_bytes: int


class GgufFile:
    """An open GGUF file: metadata in memory, tensors read on demand. Implements ``QuantisedFile``. Close it.

    Raises:
        MalformedModelError: not GGUF, truncated, or a header that contradicts the file.
        UnsupportedModelError: a tensor type that is not in :data:`SUPPORTED_TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            header = _HeaderReader(self._file, path)
            self.metadata, self._tensors = header.read_all()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Metadata ``key`` as ``kind``; an integer passes for a float.

        Raises:
            MalformedModelError: missing without a default, or of another type.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                raise MalformedModelError(f"{self.path}: metadata {key} is missing")
            return default
        if kind is float and type(value) is int:
            return float(value)  # type: ignore[return-value]  # kind is float here
        if type(value) is not kind:
            raise MalformedModelError(
                f"{self.path}: metadata {key} is {type(value).__name__}: expected {kind.__name__}"
            )
        return value

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:  # one row as far as blocks are concerned
            return self._read_bytes(tensor, 0, tensor.row_bytes)[start:stop]
        rows = self._read_bytes(tensor, start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return rows.reshape(stop - start, *tensor.shape[1:])

    def block_type(self, name: str) -> str:
        kind = self._tensors[name].type
        return kind.name if GGML_QUANT_SIZES[kind][0] > 1 else ""

    def read_blocks(self, name: str, start: int, stop: int) -> ByteArray:
        tensor = self._tensors[name]
        return self._read_raw(tensor, start * tensor.row_bytes, (stop - start) * tensor.row_bytes)

    def _read_bytes(self, tensor: GgufTensor, offset_bytes: int, num_bytes: int) -> FloatArray:
        raw = self._read_raw(tensor, offset_bytes, num_bytes)
        with np.errstate(invalid="ignore"):  # what is no number is refused by whoever stores it
            values: FloatArray = np.ascontiguousarray(dequantize(raw, tensor.type), dtype=np.float32)
        return values.ravel()

    def _read_raw(self, tensor: GgufTensor, offset_bytes: int, num_bytes: int) -> ByteArray:
        data = os.pread(self._file.fileno(), num_bytes, tensor.offset_bytes + offset_bytes)
        if len(data) != num_bytes:
            raise MalformedModelError(f"{self.path}: tensor {tensor.name} ends early: the file was cut short")
        return np.frombuffer(data, np.uint8).reshape(-1, tensor.row_bytes)


class _HeaderReader:
    """Reads the header once, front to back, never past the end of the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self._size_bytes = os.fstat(file.fileno()).st_size
        self._position = 0

    def read_all(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic = self._take(4)
        if magic != MAGIC:
            raise MalformedModelError(f"{self._path}: starts with {magic!r}: not a GGUF file")
        version = self._integer("<I")
        if version not in VERSIONS:
            raise MalformedModelError(
                f"{self._path}: GGUF version {version}: expected one of {VERSIONS}, little-endian"
            )
        num_tensors = self._count("tensors", MAX_TENSORS)
        num_entries = self._count("metadata entries", MAX_METADATA_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._text("a metadata key")
            if key in metadata:
                raise self._malformed(f"metadata {key} appears twice")
            metadata[key] = self._value(key, self._integer("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        return metadata, self._place(infos, self._alignment(metadata))

    def _malformed(self, what: str) -> MalformedModelError:
        return MalformedModelError(f"{self._path}: {what}; the file is damaged or not complete")

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size_bytes - self._position:
            raise self._malformed(f"wants {num_bytes} bytes at offset {self._position} of {self._size_bytes}")
        self._position += num_bytes
        return self._file.read(num_bytes)

    def _integer(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(value)

    def _count(self, what: str, limit: int) -> int:
        count = self._integer("<Q")
        if count > limit:
            raise self._malformed(f"{count} {what}: at most {limit} are accepted")
        return count

    def _bytes(self, what: str) -> bytes:
        length = self._integer("<Q")
        if length > MAX_STRING_BYTES:
            raise self._malformed(f"{what} of {length} bytes: at most {MAX_STRING_BYTES} are accepted")
        return self._take(length)

    def _text(self, what: str) -> str:
        data = self._bytes(what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._malformed(f"{what} is not UTF-8") from error

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING_TYPE:
            return self._text(key)
        if kind == ARRAY_TYPE:
            return self._array(key)
        if kind not in SCALARS:
            raise self._malformed(f"metadata {key} has the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _array(self, key: str) -> list[Any]:
        kind = self._integer("<I")
        length = self._integer("<Q")
        least_bytes = 8 if kind == STRING_TYPE else np.dtype(SCALARS.get(kind, "u1")).itemsize
        if length * least_bytes > self._size_bytes - self._position:
            raise self._malformed(f"metadata {key} states {length} elements, more than the file can hold")
        if kind == STRING_TYPE:
            return [self._text(key) for _ in range(length)]
        if kind not in SCALARS:
            raise self._malformed(f"metadata {key} is an array of the unsupported type {kind}")
        dtype = np.dtype(SCALARS[kind])
        values: list[Any] = np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()
        return values

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._malformed(f"general.alignment is {alignment!r}: expected a power of two")
        return alignment

    def _tensor_info(self) -> GgufTensor:
        name = self._text("a tensor name")
        num_dimensions = self._integer("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._malformed(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._integer("<Q") for _ in range(num_dimensions)]))
        kind = self._integer("<I")
        offset_bytes = self._integer("<Q")
        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModelError(_unsupported_type(self._path, name, str(kind))) from None
        if tensor_type.name not in SUPPORTED_TYPES:
            raise UnsupportedModelError(_unsupported_type(self._path, name, tensor_type.name))
        block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if 0 in shape or shape[-1] % block_size:
            raise self._malformed(f"tensor {name} of shape {shape} cannot be {tensor_type.name}")
        return GgufTensor(name, shape, tensor_type, offset_bytes, shape[-1] // block_size * block_bytes)

    def _place(self, infos: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        data_start = -(-self._position // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for info in infos:
            size_bytes = info.row_bytes * math.prod(info.shape[:-1])
            if info.name in placed:
                raise self._malformed(f"tensor {info.name} appears twice")
            end = data_start + info.offset_bytes + size_bytes
            if end > self._size_bytes:
                raise self._malformed(f"tensor {info.name} ends at byte {end} of {self._size_bytes}")
            placed[info.name] = replace(info, offset_bytes=end - size_bytes)
        return placed


def _unsupported_type(path: Path, name: str, kind: str) -> str:
    return f"{path}: tensor {name} has type {kind}: supported are {', '.join(SUPPORTED_TYPES)}"
