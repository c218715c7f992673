"""Tensors that a guest makes while ``gp_init`` runs: allocated with zeros, filled piece by piece, counted and bounded.

They become a blob of the snapshot; a worker maps them read-only, as it maps weights, and programs name them by handle.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from guests.abi import TensorType
from guests.errors import GuestContractError

MAX_GUEST_TENSORS: Final = 1_024
MAX_GUEST_TENSOR_BYTES: Final = 256 << 20  # of all of a guest's together
MAX_DIMENSIONS: Final = 8
MAX_NAME_CHARACTERS: Final = 256
RESERVED_PREFIX: Final = "pad."  # what the file that stores them calls its fillers
ITEM_BYTES: Final = {TensorType.F32: 4, TensorType.BF16: 2}
_SIZE_BYTES: Final = 4  # of one size in a shape


@dataclass(frozen=True, slots=True)
class GuestTensor:
    """A tensor that a guest made. ``data``: its values, C order, little-endian."""

    name: str
    dtype: TensorType
    shape: tuple[int, ...]
    data: bytes | bytearray


class GuestTensors:
    """All that one guest allocates, by handle."""

    def __init__(self) -> None:
        self._by_handle: dict[int, GuestTensor] = {}
        self._num_bytes = 0

    @property
    def made(self) -> tuple[GuestTensor, ...]:
        """In the order of allocation."""
        return tuple(self._by_handle.values())

    def allocate(self, handle: int, name: str, dtype: int, packed_shape: bytes) -> None:
        """Make a tensor of zeros behind ``handle``, which is free. ``packed_shape``: u32 sizes.

        Raises:
            GuestContractError: of a type, shape or name that cannot be, or over a limit.
        """
        if len(self._by_handle) >= MAX_GUEST_TENSORS:
            raise GuestContractError(f"the guest allocated more than {MAX_GUEST_TENSORS} tensors")
        if dtype not in list(TensorType):
            raise GuestContractError(f"tensor_alloc: type {dtype}, expected 0 (F32) or 1 (BF16)")
        if len(packed_shape) % _SIZE_BYTES:
            raise GuestContractError(f"tensor_alloc: a shape of {len(packed_shape)} bytes is not of 4 for each size")
        shape = struct.unpack(f"<{len(packed_shape) // _SIZE_BYTES}I", packed_shape)
        size_bytes = check_tensor(name, TensorType(dtype), shape)
        self._num_bytes += size_bytes
        if self._num_bytes > MAX_GUEST_TENSOR_BYTES:
            raise GuestContractError(
                f"tensor_alloc: {self._num_bytes} bytes of tensors, at most {MAX_GUEST_TENSOR_BYTES} for one guest"
            )
        self._by_handle[handle] = GuestTensor(name, TensorType(dtype), shape, bytearray(size_bytes))

    def write(self, handle: int, offset: int, data: bytes) -> None:
        """Put ``data`` at byte ``offset`` of the tensor behind ``handle``.

        Raises:
            GuestContractError: not a tensor of this guest's, or beyond its end.
        """
        tensor = self._by_handle.get(handle)
        if tensor is None:
            raise GuestContractError(f"tensor_write: handle {handle} is no tensor that this guest allocated")
        if not 0 <= offset <= len(tensor.data) - len(data):
            raise GuestContractError(
                f"tensor_write: {len(data)} bytes at offset {offset} of a tensor of {len(tensor.data)} bytes"
            )
        assert isinstance(tensor.data, bytearray)  # made above
        tensor.data[offset : offset + len(data)] = data


def check_tensor(name: str, dtype: TensorType, shape: Sequence[int]) -> int:
    """Bytes of a tensor, whose name and shape may come from anybody.

    Raises:
        GuestContractError: they cannot be, or are over a limit.
    """
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or name.startswith(RESERVED_PREFIX) or name == "__metadata__":
        raise GuestContractError(
            f"tensor name {name[:40]!r}: expected 1 to {MAX_NAME_CHARACTERS} characters that do not begin with "
            f"{RESERVED_PREFIX!r}"
        )
    if not 0 < len(shape) <= MAX_DIMENSIONS or any(size <= 0 for size in shape):
        raise GuestContractError(f"tensor {name!r}: shape {tuple(shape)}, expected 1 to {MAX_DIMENSIONS} sizes above 0")
    size_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if size_bytes > MAX_GUEST_TENSOR_BYTES:
        raise GuestContractError(f"tensor {name!r}: {size_bytes} bytes, at most {MAX_GUEST_TENSOR_BYTES} for one guest")
    return size_bytes


def check_tensors(tensors: Sequence[GuestTensor]) -> None:
    """Check tensors that an untrusted process handed over.

    Raises:
        GuestContractError: no honest guest could have made them.
    """
    if len(tensors) > MAX_GUEST_TENSORS or len({tensor.name for tensor in tensors}) != len(tensors):
        raise GuestContractError(f"{len(tensors)} tensors: too many, or two of one name")
    sizes = [check_tensor(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    if sizes != [len(tensor.data) for tensor in tensors] or sum(sizes) > MAX_GUEST_TENSOR_BYTES:
        raise GuestContractError("tensors whose bytes do not fit their shapes, or the limit")
