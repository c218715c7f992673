"""Memory for keys and values: one anonymous mapping a model, cut into blocks, paged in by first use."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from worker.backends.protocol import KV_BLOCK_TOKENS, BackendError, FloatArray, SequenceInput

#: Physical memory of released blocks kept for reuse, so that a new sequence takes no page faults. What is beyond goes
#: back to the system at once.
MAX_SPARE_BYTES: Final = 64 * 1024 * 1024

_MAP_NORESERVE: Final = 0x4000  # Linux; mmap has no name for it in every Python

#: Stretches ``[begin, end)`` of token rows in memory that hold consecutive positions, in order of position.
Runs = tuple[tuple[int, int], ...]


class KvBlocks:
    """Keys and values of all sequences of a model, float32. Used by the engine thread only.

    The mapping is ``[layers, 2, kv heads, blocks * 16, head_dim]``: a layer's keys lie before its values, and
    neighbouring blocks of one head are one plain matrix for BLAS. ``layers[i]`` is ``[2 * kv heads, blocks * 16,
    head_dim]``, a view; the list is empty before :meth:`open`.

    Pages are taken by first use, 4 KiB each (at a head width of 64 exactly one block of one head): with huge pages the
    first token of a short prompt would zero 2 MiB for every layer and head.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, context_length: int) -> None:
        self._shape = (num_layers, num_kv_heads, head_dim)
        self._context_length = context_length
        self._memory: mmap.mmap | None = None
        self._all: FloatArray = np.empty((0, 2, 0, 0, 0), np.float32)
        self._spare: dict[int, None] = {}  # released and still paged in, oldest first
        self._touched: set[int] = set()  # written since their memory last went back
        self._runs: dict[int, tuple[Sequence[int], Runs]] = {}  # of the latest step, by identity of the block table
        self.layers: list[FloatArray] = []
        self.num_blocks = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's keys and values in all layers."""
        num_layers, num_kv_heads, head_dim = self._shape
        return 2 * num_layers * num_kv_heads * head_dim * 4 * KV_BLOCK_TOKENS

    @property
    def resident_bytes(self) -> int:
        """Bytes of the blocks that take physical memory, spare ones included."""
        return len(self._touched) * self.block_bytes

    @property
    def spare_bytes(self) -> int:
        """Bytes of released blocks that still take physical memory."""
        return len(self._spare) * self.block_bytes

    def open(self, num_blocks: int) -> None:
        """Map address space for ``num_blocks`` blocks; no memory is taken yet.

        Raises:
            BackendError: opened before, or the system refuses the address space.
        """
        if self._memory is not None:
            raise BackendError("the KV blocks are open already")
        num_layers, num_kv_heads, head_dim = self._shape
        self.num_blocks = num_blocks
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._memory = mmap.mmap(-1, max(num_blocks, 1) * self.block_bytes, flags=flags)
        except OSError as error:
            raise BackendError(f"no address space for {num_blocks} KV blocks of {self.block_bytes} bytes") from error
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        num_rows = num_blocks * KV_BLOCK_TOKENS
        flat: FloatArray = np.frombuffer(self._memory, np.float32, num_blocks * self.block_bytes // 4)
        self._all = flat.reshape(num_layers, 2, num_kv_heads, num_rows, head_dim)
        self.layers = list(flat.reshape(num_layers, 2 * num_kv_heads, num_rows, head_dim))

    def close(self) -> None:
        """Drop the memory; the mapping ends with the last array that looks into it. Idempotent."""
        self.layers.clear()
        self._runs.clear()
        self._spare.clear()
        self._touched.clear()
        self._all = np.empty((0, 2, 0, 0, 0), np.float32)
        self._memory = None
        self.num_blocks = 0

    def find_runs(self, inputs: Sequence[SequenceInput]) -> list[Runs]:
        """The runs of each input's block table, cut to the tokens that it holds after the step.

        A table is looked at once, as long as the same object comes step after step: Requires that a caller makes a
        new one when it changes.

        Raises:
            BackendError: a block that does not exist, a table that is too short, or a sequence beyond the context.
        """
        known, self._runs = self._runs, {}
        found: list[Runs] = []
        for item in inputs:
            table, end = item.block_table, item.start + len(item.token_ids)
            cached = known.get(id(table))
            if cached is None or cached[0] is not table:
                cached = (table, self._join(table))
                self._take(table)
            self._runs[id(table)] = cached
            if not item.token_ids or item.start < 0:
                raise BackendError(f"{len(item.token_ids)} tokens at position {item.start}")
            if end > self._context_length:
                raise BackendError(f"{end} tokens: the context is {self._context_length} tokens")
            found.append(_cut(cached[1], end))
        return found

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks, ``(source, target)`` each.

        Raises:
            BackendError: a block that does not exist.
        """
        for source, target in pairs:
            (from_run,), (to_run,) = self._join((source,)), self._join((target,))
            self._take((target,))
            self._all[:, :, :, slice(*to_run)] = self._all[:, :, :, slice(*from_run)]

    def capture_prefix(self, block_table: Sequence[int], num_tokens: int) -> FloatArray:
        """A copy of the first ``num_tokens`` tokens, ``[layers, 2, kv heads, tokens, head_dim]``.

        Raises:
            BackendError: the table is too short, or has a block that does not exist.
        """
        runs = _cut(self._join(block_table), num_tokens)
        captured: FloatArray = np.concatenate([self._all[:, :, :, slice(*run)] for run in runs], axis=3)
        return captured

    def restore_prefix(self, block_table: Sequence[int], keys_values: FloatArray) -> None:
        """Copy what :meth:`capture_prefix` gave into the blocks of a table.

        Raises:
            BackendError: of another model's shape, or more tokens than the table has room for.
        """
        num_layers, num_kv_heads, head_dim = self._shape
        num_tokens = keys_values.shape[3] if keys_values.ndim == 5 else 0
        if keys_values.shape != (num_layers, 2, num_kv_heads, num_tokens, head_dim) or not num_tokens:
            raise BackendError(f"prefix of shape {keys_values.shape} for a model of {self._shape}")
        runs = _cut(self._join(block_table), num_tokens)
        self._take(block_table)
        first = 0
        for begin, end in runs:
            self._all[:, :, :, begin:end] = keys_values[:, :, :, first : first + end - begin]
            first += end - begin

    def release(self, blocks: Iterable[int]) -> None:
        """Take note that nobody needs these blocks' contents; memory beyond the spare limit goes back."""
        for block in blocks:
            if block in self._touched:
                self._spare[block] = None
        num_excess = len(self._spare) - MAX_SPARE_BYTES // self.block_bytes
        if num_excess <= 0:
            return
        excess = [block for block, _ in zip(self._spare, range(num_excess), strict=False)]
        for block in excess:
            del self._spare[block]
        for run in self._join(sorted(excess)):
            self._give_back(*run)
        self._touched.difference_update(excess)

    def _take(self, blocks: Iterable[int]) -> None:
        self._touched.update(blocks)
        for block in blocks:
            self._spare.pop(block, None)

    def _join(self, block_table: Sequence[int]) -> Runs:
        """Maximal runs of neighbouring blocks, as token rows."""
        runs: list[tuple[int, int]] = []
        first = previous = -2
        for block in block_table:
            if not 0 <= block < self.num_blocks:
                raise BackendError(f"KV block {block}: there are {self.num_blocks}")
            if block != previous + 1:
                if previous >= 0:
                    runs.append((first * KV_BLOCK_TOKENS, (previous + 1) * KV_BLOCK_TOKENS))
                first = block
            previous = block
        if previous >= 0:
            runs.append((first * KV_BLOCK_TOKENS, (previous + 1) * KV_BLOCK_TOKENS))
        return tuple(runs)

    def _give_back(self, begin: int, end: int) -> None:
        """Return the whole pages of token rows ``[begin, end)`` of every plane to the system."""
        if self._memory is None:
            return
        num_layers, num_kv_heads, head_dim = self._shape
        row_bytes = head_dim * 4
        plane_bytes = self.num_blocks * KV_BLOCK_TOKENS * row_bytes
        page = mmap.PAGESIZE
        for plane in range(2 * num_layers * num_kv_heads):
            base = plane * plane_bytes
            first = -(-(base + begin * row_bytes) // page) * page
            last = (base + end * row_bytes) // page * page
            if last > first:
                self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def _cut(runs: Runs, num_tokens: int) -> Runs:
    """The first ``num_tokens`` tokens of ``runs``.

    Raises:
        BackendError: they hold fewer.
    """
    if len(runs) == 1 and 0 < num_tokens <= runs[0][1] - runs[0][0]:  # the usual case
        return ((runs[0][0], runs[0][0] + num_tokens),)
    kept: list[tuple[int, int]] = []
    left = num_tokens
    for begin, end in runs:
        if left <= 0:
            break
        kept.append((begin, min(end, begin + left)))
        left -= end - begin
    if left > 0 or not kept:
        raise BackendError(f"{num_tokens} tokens in blocks for {num_tokens - max(left, 0)}")
    return tuple(kept)


def skip_tokens(runs: Runs, num_tokens: int) -> Runs:
    """``runs`` without their first ``num_tokens`` tokens."""
    if len(runs) == 1:  # the usual case
        return ((runs[0][0] + num_tokens, runs[0][1]),)
    kept: list[tuple[int, int]] = []
    for begin, end in runs:
        if num_tokens < end - begin:
            kept.append((begin + num_tokens, end))
        num_tokens = max(0, num_tokens - (end - begin))
    return tuple(kept)


def cut_runs(runs: Runs, begin: int, end: int) -> Runs:
    """Tokens ``[begin, end)`` of ``runs``."""
    kept = []
    for run_begin, run_end in skip_tokens(runs, begin):
        size = min(run_end - run_begin, end - begin)
        if size <= 0:
            break
        kept.append((run_begin, run_begin + size))
        begin += size
    return tuple(kept)
