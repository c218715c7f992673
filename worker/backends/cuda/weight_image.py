"""Where each weight goes in device memory, and in which pieces it travels there.

The weights' blob is mirrored as it lies: some neighbouring chunks of the manifest are a piece, so that what is hashed
is what is copied, and a tensor is a place in the mirror. Pieces that no program reads are left out of the journey.
Tensors elsewhere in memory (what a guest made at init) follow behind the mirror, piece by piece, without digests: that
memory is sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR
from snapshots.chunks import DIGEST_BYTES
from worker.backends.cuda.device import ByteArray, Place, align
from worker.backends.cuda_kernels import FORMATS, Activation
from worker.backends.protocol import BackendError, ModelPlan, WeightBlob, WeightTensor

FORMAT_NAMES: Final[dict[Any, Activation]] = {
    np.dtype(np.float32): "f32",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.float16): "f16",
}
QUANTISED_NAMES: Final[dict[Any, str]] = {
    np.dtype(np.int8): "int8",
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3",
    np.dtype(np.uint8): "int4",
}

#: Codes of small tables (norm weights, biases) by format.
TABLE_TYPES: Final = {"f32": 0, "bf16": 1, "f16": 2}


@dataclass(frozen=True, slots=True)
class Piece:
    """Host bytes that travel together to ``offset`` of the image. ``digests`` (packed) are of each ``chunk_bytes`` of
    them; empty: there is nothing to check them against."""

    source: ByteArray
    offset: int
    digests: bytes = b""
    chunk_bytes: int = 0
    wait_verified: Callable[[], None] | None = None

    @property
    def is_signed(self) -> bool:
        """Whether it is of the blob."""
        return len(self.digests) > 0


@dataclass(frozen=True, slots=True)
class ImageTensor:
    """A weight in the image: where, how it is stored, and the last piece (by number) that it needs."""

    name: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    format: str  # of worker.backends.cuda_kernels.FORMATS
    last_piece: int
    scale_offset: int = -1  # float32 scales (int4: float16); -1: none
    scale_row_bytes: int = 4
    group_size: int = 0  # of int4

    def place_in(self, image: Place) -> Place:
        """Its bytes in a device's copy."""
        return image.part(self.offset, self.num_bytes)

    def scales_in(self, image: Place) -> Place | int:
        """Its scales, row by row; 0: it has none."""
        num_bytes = self.scale_row_bytes * self.shape[0]
        return image.part(self.scale_offset, num_bytes) if self.scale_offset >= 0 else 0


@dataclass(slots=True)
class WeightImage:
    """All weights of a plan. ``pieces`` are in order of use; ``tensors[h]`` is None where no program names handle h."""

    num_bytes: int = 0
    pieces: list[Piece] = field(default_factory=list)
    tensors: list[ImageTensor | None] = field(default_factory=list)


def lay_out_weights(plan: ModelPlan, piece_bytes: int) -> WeightImage:
    """The image of ``plan``'s weights in pieces of at most ``piece_bytes``, or of one chunk; reads none of them.

    Raises:
        BackendError: a dtype that no kernel reads, or int8 without scales.
    """
    return _Layout(plan, piece_bytes).build()


class _Layout:
    def __init__(self, plan: ModelPlan, piece_bytes: int) -> None:
        self._plan = plan
        self._piece_bytes = piece_bytes
        self._image = WeightImage(tensors=[None] * len(plan.tensors))
        self._piece_of_group: dict[int, int] = {}  # of neighbouring chunks
        self._strays: dict[int, tuple[int, int]] = {}  # by address: offset and last piece
        self._image.num_bytes = 0 if plan.blob is None else align(plan.blob.data.nbytes)

    def build(self) -> WeightImage:
        for program in (self._plan.prefill, self._plan.decode):
            for operation in program.operations:
                for handle in operation.tensors:
                    if handle != NO_TENSOR and self._image.tensors[handle] is None:
                        self._image.tensors[handle] = self._add(self._plan.tensors[handle])
        return self._image

    def _add(self, tensor: WeightTensor) -> ImageTensor:
        name, group_size, scale_row_bytes = _format_of(tensor), 0, 4
        offset, last_piece = self._place(tensor.data, tensor)
        scale_offset = -1
        if tensor.scale is not None:
            scale_offset, last_of_scale = self._place(tensor.scale, tensor)
            last_piece = max(last_piece, last_of_scale)
            scale_row_bytes = tensor.scale.nbytes // tensor.shape[0]
            group_size = tensor.shape[1] // tensor.scale.shape[1] if tensor.is_int4 else 0
        return ImageTensor(
            *(tensor.name, offset, tensor.data.nbytes, tensor.shape, name, last_piece),
            *(scale_offset, scale_row_bytes, group_size),
        )

    def _place(self, array: npt.NDArray[Any], tensor: WeightTensor) -> tuple[int, int]:
        """Offset in the image and last piece."""
        if not array.flags.c_contiguous:
            raise BackendError(f"{tensor.name}: its rows do not lie one behind the other")
        blob = self._plan.blob
        if blob is not None:
            start = array.ctypes.data - blob.data.ctypes.data
            if start >= 0 and start + array.nbytes <= blob.data.nbytes:
                return start, self._take_chunks(blob, start, start + array.nbytes)
        return self._take_stray(array, tensor.wait_verified)

    def _take_chunks(self, blob: WeightBlob, start: int, end: int) -> int:
        last = -1
        group_bytes = max(1, self._piece_bytes // blob.chunk_bytes) * blob.chunk_bytes
        for group in range(start // group_bytes, -(-end // group_bytes)):
            if group not in self._piece_of_group:
                self._piece_of_group[group] = len(self._image.pieces)
                self._image.pieces.append(_cut(blob, group * group_bytes, group_bytes))
            last = max(last, self._piece_of_group[group])
        return last

    def _take_stray(self, array: npt.NDArray[Any], wait_verified: Callable[[], None] | None) -> tuple[int, int]:
        known = self._strays.get(array.ctypes.data)
        if known is not None:
            return known
        offset, flat = self._image.num_bytes, array.reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, self._piece_bytes):
            source = flat[start : start + self._piece_bytes]
            self._image.pieces.append(Piece(source, offset + start, wait_verified=wait_verified))
        self._image.num_bytes += align(flat.nbytes)
        self._strays[array.ctypes.data] = (offset, len(self._image.pieces) - 1)
        return self._strays[array.ctypes.data]


def _cut(blob: WeightBlob, start: int, num_bytes: int) -> Piece:
    end = min(start + num_bytes, blob.data.nbytes)
    first, last = start // blob.chunk_bytes, -(-end // blob.chunk_bytes)
    digests = blob.chunk_digests[first * DIGEST_BYTES : last * DIGEST_BYTES]
    wait = None if blob.wait_verified is None else partial(blob.wait_verified, end)
    return Piece(blob.data[start:end], start, digests, blob.chunk_bytes, wait)


def _format_of(tensor: WeightTensor) -> str:
    if tensor.block_type:
        return tensor.block_type.lower()
    quantised = QUANTISED_NAMES.get(tensor.data.dtype)
    if quantised is not None:
        if tensor.scale is None:
            raise BackendError(f"{tensor.name}: {quantised} weights need scales")
        return quantised
    found = FORMAT_NAMES.get(tensor.data.dtype)
    if found is None:
        raise BackendError(
            f"{tensor.name}: dtype {tensor.data.dtype} (this backend runs float32, bfloat16, float16, int8, "
            "fp8, int4 and GGUF's blocks)"
        )
    return found


def choose_activation(image: WeightImage, linear_handles: Sequence[int], quantised: Activation = "bf16") -> Activation:
    """The type of what flows between matrix products: that of the matrices, ``quantised`` where all of them are.

    Raises:
        BackendError: matrices of several types, of which no kernel takes one with the other's activations.
    """
    found = {tensor.format for handle in linear_handles if (tensor := image.tensors[handle]) is not None}
    plain = {name for name in found if not FORMATS[name].is_quantised}
    if not plain:
        return quantised
    if len(plain) > 1 or (plain == {"f16"} and found != plain):
        raise BackendError(f"matrices stored as {', '.join(sorted(found))}: the kernels take one type for all")
    chosen: Activation = next(name for name in FORMAT_NAMES.values() if name in plain)
    return chosen
