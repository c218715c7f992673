"""What the attention operations of a step share: the sequences' parts in it, and buffers and threads to compute in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from worker.backends.cpu_attention_packed import PackedDesk, PackedPrompts
from worker.backends.cpu_attention_tiles import TileMemory
from worker.backends.kv_blocks import Runs
from worker.backends.protocol import FloatArray

#: Tokens of a prompt that are attended to at once.
QUERY_ROWS: Final = 64


@dataclass(slots=True)
class SequenceShare:
    """Tokens ``first`` to ``first + num_tokens`` of the step belong to one sequence, at positions ``start`` on.
    ``runs`` of KV memory hold all its tokens, those of the step included; ``targets`` those of the step alone.
    ``block_table`` is a prompt's, whose keys and values may be kept packed from step to step."""

    runs: Runs
    targets: Runs
    first: int
    num_tokens: int
    start: int
    block_table: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Immediate operands of an ATTENTION operation."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int  # 0: none
    score_scale: float


@dataclass(frozen=True, slots=True)
class StepRoles:
    """The sequences of a step by the way they are attended to: those of one token ``together`` in one softmax (runs and
    number of the keys that each sees; their queries are ``columns`` of the step) or ``alone``, and ``prompts``.
    ``num_used`` columns belong to sequences."""

    together: list[tuple[Runs, int]]
    alone: list[SequenceShare]
    prompts: list[SequenceShare]
    num_used: int
    columns: slice | list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SeenKeys:
    """Where the keys lie that one query sees, and its ``scores`` ``[Hkv, G, keys]``, which are scratch."""

    runs: Runs
    scores: FloatArray


class AttentionScratch:
    """Buffers that all attention operations of a model share; grown on demand. ``rounds_long``: long prompts may be
    attended to in bf16 (see :mod:`~worker.backends.cpu_attention_tiles`).

    Long prompts are attended to by ``num_threads`` threads, each with buffers of its own, as BLAS has one (NumPy lets
    go of the interpreter's lock in its loops). The threads start with the first long prompt, never before a fork.
    """

    def __init__(self, num_threads: int = 1, *, rounds_long: bool = False) -> None:
        self.rounds_long = rounds_long
        self.tiles = TileMemory()
        self.packed = PackedPrompts()
        self._desk: PackedDesk | None = None
        self.roles: dict[int, StepRoles] = {}  # of the step in progress, by window
        self.seen: dict[tuple[int, int, int], SeenKeys] = {}  # of its one query, by window and heads
        self._others = [AttentionScratch() for _ in range(num_threads - 1)]
        self._executor: ThreadPoolExecutor | None = None
        self._flat: FloatArray = np.empty(0, np.float32)
        self._flat_by_key: FloatArray = np.empty(0, np.float32)
        self._results: dict[tuple[int, int, int], FloatArray] = {}  # of one token, by shape
        # Key j is later than query i where j > i: below the diagonal of [keys, queries].
        self.below_diagonal: FloatArray = np.zeros((QUERY_ROWS, QUERY_ROWS), np.float32)
        self.below_diagonal[np.tril_indices(QUERY_ROWS, k=-1)] = -np.inf

    def begin_step(self) -> None:
        """Forget what held for the step before."""
        self.roles.clear()
        self.seen.clear()

    def one_result(self, shape: tuple[int, int, int]) -> FloatArray:
        """An uninitialised array of that shape, one for all layers and steps: it lasts for one call."""
        found = self._results.get(shape)
        if found is None:
            found = self._results[shape] = np.empty(shape, np.float32)
        return found

    def scores(self, num_heads: int, num_rows: int, num_keys: int) -> FloatArray:
        """An uninitialised array of that shape; the previous one is overwritten."""
        num_elements = num_heads * num_rows * num_keys
        if num_elements > len(self._flat):
            self._flat = np.empty(1 << (num_elements - 1).bit_length(), np.float32)
        return self._flat[:num_elements].reshape(num_heads, num_rows, num_keys)

    def desk(self, num_kv_heads: int, num_rows: int, head_dim: int) -> PackedDesk:
        """Buffers of that shape; the previous ones are gone."""
        if self._desk is None or self._desk.key != (num_kv_heads, num_rows, head_dim):
            self._desk = PackedDesk(num_kv_heads, num_rows, head_dim)
        return self._desk

    def run_tasks(self, tasks: Sequence[Task]) -> None:
        """Call each of ``tasks`` with buffers of its own, on all threads."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(len(self._others), thread_name_prefix="attention")

        def run_every(first: int, scratch: AttentionScratch) -> None:
            for task in tasks[first :: len(self._others) + 1]:
                task(scratch)

        futures = [self._executor.submit(run_every, i + 1, other) for i, other in enumerate(self._others)]
        try:
            run_every(0, self)
        finally:
            wait(futures)  # nobody writes to the buffers after an error here
        for future in futures:
            future.result()

    @property
    def num_threads(self) -> int:
        return 1 + len(self._others)

    def close(self) -> None:
        """End the threads and forget packed prompts. Idempotent."""
        self.packed.clear()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def by_key(self, num_heads: int, num_keys: int, group: int) -> FloatArray:
        """An uninitialised array of that shape; the previous one is overwritten."""
        num_elements = num_heads * num_keys * group
        if num_elements > len(self._flat_by_key):
            self._flat_by_key = np.empty(1 << (num_elements - 1).bit_length(), np.float32)
        return self._flat_by_key[:num_elements].reshape(num_heads, num_keys, group)


#: A part of an attention operation, with buffers of its thread.
Task = Callable[[AttentionScratch], None]
