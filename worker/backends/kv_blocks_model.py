"""The part of a CPU model that is the same for every one: its protocol's KV methods, over :class:`KvBlocks`."""

from __future__ import annotations

from collections.abc import Sequence

from worker.backends.kv_blocks import KvBlocks
from worker.backends.protocol import FloatArray


class KvBlocksModel:
    """Base of models whose KV memory is ``_blocks``; see :class:`~worker.backends.protocol.BoundModel`."""

    _blocks: KvBlocks

    @property
    def kv_block_bytes(self) -> int:
        return self._blocks.block_bytes

    def open_kv(self, num_blocks: int) -> None:
        self._blocks.open(num_blocks)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._blocks.copy_blocks(pairs)

    def release_blocks(self, blocks: Sequence[int]) -> None:
        self._blocks.release(blocks)

    def capture_prefix(self, block_table: Sequence[int], num_tokens: int) -> FloatArray:
        return self._blocks.capture_prefix(block_table, num_tokens)

    def restore_prefix(self, block_table: Sequence[int], keys_values: FloatArray) -> None:
        self._blocks.restore_prefix(block_table, keys_values)
