"""Reader of safetensors checkpoints, one file or an index over several, that trusts no header and leaves no folder.

Layout: u64 little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, tensor data. Only the
rows asked for are read (the ``safetensors`` package maps whole files, and has no bfloat16 for NumPy).
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import ml_dtypes
import msgspec
import numpy as np

from worker.build.errors import MalformedModelError, UnsupportedModelError
from worker.build.source import FloatArray

MAX_HEADER_BYTES: Final = 100 * 1024 * 1024  # the format's own limit
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_DIMENSIONS: Final = 8  # also bounds the work of multiplying hostile sizes
SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Tensor:
    fd: int
    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset_bytes: int


class SafetensorsCheckpoint:
    """The weights of a Hugging Face folder. Implements ``TensorFile``. Close it.

    Raises:
        MalformedModelError: no weights, a damaged header, an index that names other files than are there.
        UnsupportedModelError: a tensor type that is not F32, F16 or BF16.
    """

    def __init__(self, folder: Path, *, ignored: tuple[str, ...] = ()) -> None:
        """``ignored``: endings of the names of tensors that are not looked at, whatever their type."""
        self._ignored = ignored
        self._fds: list[int] = []
        self._tensors: dict[str, _Tensor] = {}
        try:
            self._open_all(folder)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        tensor = self._tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        num_bytes = (stop - start) * row_bytes
        data = os.pread(tensor.fd, num_bytes, tensor.offset_bytes + start * row_bytes)
        if len(data) != num_bytes:
            raise MalformedModelError(f"{tensor.path}: tensor {name} ends early: the file was cut short")
        return np.frombuffer(data, tensor.dtype).astype(np.float32).reshape(stop - start, *tensor.shape[1:])

    def _open_all(self, folder: Path) -> None:
        if (folder / INDEX_NAME).exists():
            weight_map = _read_index(folder)
            for file_name in sorted(set(weight_map.values())):
                wanted = {name for name, place in weight_map.items() if place == file_name}
                self._open_file(resolve_inside(folder, file_name), wanted)
            missing = sorted(
                name for name in weight_map.keys() - self._tensors.keys() if not name.endswith(self._ignored)
            )
            if missing:
                raise MalformedModelError(f"{folder / INDEX_NAME} lists tensors that are not there: {missing[:3]}")
            return
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise MalformedModelError(f"{folder} holds no .safetensors file")
        if len(files) > 1 and SINGLE_NAME not in files:
            raise MalformedModelError(f"{folder} holds {len(files)} .safetensors files and no {INDEX_NAME}")
        self._open_file(resolve_inside(folder, SINGLE_NAME if SINGLE_NAME in files else files[0]), None)

    def _open_file(self, path: Path, wanted: set[str] | None) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        size_bytes = os.fstat(fd).st_size
        header_bytes = int.from_bytes(os.pread(fd, 8, 0), "little")
        if size_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise MalformedModelError(f"{path}: a header of {header_bytes} bytes in a file of {size_bytes}")
        try:
            raw = msgspec.json.decode(os.pread(fd, header_bytes, 8), type=dict[str, msgspec.Raw])
            raw.pop("__metadata__", None)
            entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedModelError(f"{path}: not a safetensors header: {error}") from error
        data_start = 8 + header_bytes
        for name, entry in entries.items():
            if (wanted is not None and name not in wanted) or name.endswith(self._ignored):
                continue
            self._tensors[name] = _place(fd, path, name, entry, data_start, size_bytes)


def _place(fd: int, path: Path, name: str, entry: _Entry, data_start: int, size_bytes: int) -> _Tensor:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise UnsupportedModelError(f"{path}: tensor {name} has type {entry.dtype}: supported are {', '.join(DTYPES)}")
    start, end = entry.data_offsets
    is_sane = 0 < len(entry.shape) <= MAX_DIMENSIONS and all(size > 0 for size in entry.shape) and 0 <= start <= end
    if not is_sane or end - start != math.prod(entry.shape) * dtype.itemsize or data_start + end > size_bytes:
        raise MalformedModelError(
            f"{path}: tensor {name} of shape {entry.shape} at bytes {start} to {end} does not fit the file's "
            f"{size_bytes} bytes; it is damaged or not complete"
        )
    return _Tensor(fd, path, dtype, entry.shape, data_start + start)


def _read_index(folder: Path) -> dict[str, str]:
    path = resolve_inside(folder, INDEX_NAME)
    data = read_capped(path)
    try:
        return msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedModelError(f"{path}: {error}") from error


def read_capped(path: Path, limit_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """A whole (JSON) file.

    Raises:
        MalformedModelError: larger than ``limit_bytes``.
    """
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise MalformedModelError(f"{path} is larger than {limit_bytes} bytes")
    return data


def resolve_inside(folder: Path, name: str) -> Path:
    """The regular file ``name`` of a model folder, symlinks resolved.

    A symlink may lead within the folder, or to the ``blobs`` of the Hugging Face cache that the folder is a
    snapshot of (``models--x/snapshots/<revision>``); nowhere else.

    Raises:
        MalformedModelError: no plain name, missing, outside, or not a regular file.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise MalformedModelError(f"{folder} refers to {name!r}: expected the name of a file inside the folder")
    root = folder.resolve()
    try:
        path = (root / name).resolve(strict=True)
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink loop
        reason = getattr(error, "strerror", None) or error
        raise MalformedModelError(f"{folder / name} cannot be opened: {reason}") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(path.is_relative_to(place) for place in allowed):
        raise MalformedModelError(f"{folder / name} is a link that leaves the folder (to {path})")
    if not is_regular:
        raise MalformedModelError(f"{folder / name} is not a regular file")
    return path
