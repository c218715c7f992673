"""Keys and values on the device: ``[blocks][layers][2][kv heads][16 tokens][head_dim]`` of the activation type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.backends.cuda.device import ACTIVATION_BYTES, DTYPES, Device, DeviceError, Place, Stream
from worker.backends.cuda.step_layout import check_blocks, check_room
from worker.backends.cuda.transfers import Transfers
from worker.backends.cuda_kernels import Activation
from worker.backends.protocol import KV_BLOCK_TOKENS, BackendError, FloatArray


class KvPool:
    """All blocks of a model in one allocation. Engine thread only."""

    def __init__(
        self, device: Device, stream: Stream, transfers: Transfers, shape: tuple[int, int, int], activation: Activation
    ) -> None:
        """``shape`` is (layers, kv heads, head_dim)."""
        self._device = device
        self._stream = stream
        self._transfers = transfers
        self._shape = shape
        self._dtype: Any = DTYPES[activation]
        num_layers, num_kv_heads, head_dim = shape
        self.block_bytes = 2 * num_layers * num_kv_heads * head_dim * KV_BLOCK_TOKENS * ACTIVATION_BYTES[activation]
        self.num_blocks = 0
        self._pool: Place | None = None

    @property
    def pool(self) -> Place:
        """The whole pool.

        Raises:
            DeviceError: not open.
        """
        if self._pool is None:
            raise DeviceError("the KV blocks are not open")
        return self._pool

    def open(self, num_blocks: int) -> None:
        """Take the memory of all blocks from the device.

        Raises:
            BackendError: open already.
            OutOfDeviceMemory: it does not fit.
        """
        if self._pool is not None:
            raise BackendError("the KV blocks are open already")
        self._pool = self._device.allocate(max(num_blocks, 1) * self.block_bytes)
        self.num_blocks = num_blocks
        self._device.fill(self._pool, 0, self._stream)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Queue copies of whole blocks, (source, target) each.

        Raises:
            BackendError: a block that does not exist.
        """
        for source, target in pairs:
            check_blocks((source, target), self.num_blocks)
            self._device.copy(self._block(target), self._block(source), self._stream)

    def capture_prefix(self, block_table: Sequence[int], num_tokens: int) -> FloatArray:
        """See :class:`~worker.backends.protocol.BoundModel`. Blocks."""
        check_blocks(block_table, self.num_blocks)
        check_room(block_table, num_tokens)
        num_layers, num_kv_heads, head_dim = self._shape
        captured = np.empty((num_layers, 2, num_kv_heads, num_tokens, head_dim), np.float32)
        for index in range(-(-num_tokens // KV_BLOCK_TOKENS)):
            block = self._as_array(self._transfers.receive(self._block(block_table[index])))
            first = index * KV_BLOCK_TOKENS
            count = min(KV_BLOCK_TOKENS, num_tokens - first)
            captured[:, :, :, first : first + count] = block[:, :, :, :count]
        return captured

    def restore_prefix(self, block_table: Sequence[int], keys_values: FloatArray) -> None:
        """See :class:`~worker.backends.protocol.BoundModel`. The last block's other tokens keep their content."""
        num_layers, num_kv_heads, head_dim = self._shape
        num_tokens = keys_values.shape[3] if keys_values.ndim == 5 else 0
        if keys_values.shape != (num_layers, 2, num_kv_heads, num_tokens, head_dim) or not num_tokens:
            raise BackendError(f"prefix of shape {keys_values.shape} for a model of {self._shape}")
        check_blocks(block_table, self.num_blocks)
        check_room(block_table, num_tokens)
        for index in range(-(-num_tokens // KV_BLOCK_TOKENS)):
            first = index * KV_BLOCK_TOKENS
            count = min(KV_BLOCK_TOKENS, num_tokens - first)
            place = self._block(block_table[index])
            if count < KV_BLOCK_TOKENS:
                former = self._transfers.receive(place).copy()
            pinned = self._transfers.take_in(self.block_bytes)
            if count < KV_BLOCK_TOKENS:
                pinned[:] = former
            self._as_array(pinned)[:, :, :, :count] = keys_values[:, :, :, first : first + count]
            self._transfers.send(place, pinned)

    def close(self) -> None:
        """Return the memory. Requires: nothing queued touches it. Idempotent."""
        if self._pool is not None:
            self._device.free(self._pool)
        self._pool, self.num_blocks = None, 0

    def _block(self, block: int) -> Place:
        return self.pool.part(block * self.block_bytes, self.block_bytes)

    def _as_array(self, pinned: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        num_layers, num_kv_heads, head_dim = self._shape
        shape = (num_layers, 2, num_kv_heads, KV_BLOCK_TOKENS, head_dim)
        viewed: npt.NDArray[Any] = pinned.view(self._dtype).reshape(shape)
        return viewed
