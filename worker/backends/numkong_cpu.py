"""The CPU backend: NumKong matrix products over mapped bf16 or int8 weights, NumPy for everything between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import ml_dtypes
import numpy as np

from guests.abi import Opcode, ProgramKind
from worker.backends.cores import count_usable_cores
from worker.backends.cpu_attention_scratch import AttentionScratch, SequenceShare
from worker.backends.cpu_binding import StepTokens
from worker.backends.cpu_buffers import transpose_into
from worker.backends.cpu_folding import HAS_TILES
from worker.backends.cpu_linear import LinearWeight, bind_weight
from worker.backends.cpu_program import CpuProgram
from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan
from worker.backends.host_sampling import sample_rows
from worker.backends.kv_blocks import KvBlocks, skip_tokens
from worker.backends.kv_blocks_model import KvBlocksModel
from worker.backends.numkong_encoder import NumKongEncoder
from worker.backends.protocol import BoundModel, FloatArray, ModelPlan, SequenceInput, WeightTensor
from worker.backends.sampling_rows import SampledToken, SamplingRow
from worker.backends.thread_governor import ThreadGovernor

#: Products of fewer rows than this run on the caller's thread alone, and would start no pool.
_WARM_ROWS_PER_THREAD: Final = 128


class NumKongBackend:
    """CPU backend.

    ``num_threads`` 0 means one for each usable core (affinity and cgroup quota). NumPy's BLAS must have one thread
    beside NumKong's pool (``OPENBLAS_NUM_THREADS=1`` before NumPy is imported): its second one spins after every call
    and starves the pool.
    """

    name = "numkong"
    binds_before_fork = True  # NumKong starts its pool with the first product
    waits_for_weights = True

    def __init__(self, num_threads: int = 0) -> None:
        self._num_threads = num_threads or count_usable_cores()

    def warm(self) -> None:
        """Start the thread pool and touch both kernels with a tiny product."""
        num_rows = _WARM_ROWS_PER_THREAD * self._num_threads
        for dtype in (ml_dtypes.bfloat16, np.int8):
            weight = WeightTensor("warm", np.ones((num_rows, 64), dtype), np.ones(num_rows, np.float32))
            product = bind_weight(weight, ThreadGovernor(self._num_threads))
            staging = product.make_staging((64, 1))
            staging.bind_stage(np.ones((64, 1), np.float32))()
            product.bind(staging, np.empty((num_rows, 1), np.float32))()

    def bind(self, plan: ModelPlan) -> BoundModel:
        """Bind both programs; weights stay where they lie.

        Raises:
            BackendError: a shape, dtype or layout that cannot be run; the message names the operation or tensor.
        """
        return NumKongModel(plan, self._num_threads)

    def bind_encoder(self, plan: EncoderPlan) -> BoundEncoder:
        """Bind an encoder's program; weights stay where they lie.

        Raises:
            BackendError: see :meth:`bind`.
        """
        return NumKongEncoder(plan, self._num_threads)


class NumKongModel(KvBlocksModel):
    """A model on the CPU backend. Engine thread only."""

    def __init__(self, plan: ModelPlan, num_threads: int) -> None:
        self._shares: list[SequenceShare] = []
        self._blocks = KvBlocks(plan.num_layers, plan.num_kv_heads, plan.head_dim, plan.context_length)
        is_rounded = any(tensor.data.dtype != np.float32 for tensor in plan.tensors)
        self._attention = AttentionScratch(num_threads, rounds_long=HAS_TILES and is_rounded)
        tokens = StepTokens(self._shares, self._attention, memory=self._blocks)
        is_filling = any(tensor.wait_verified is not None for tensor in plan.tensors)
        self._governor = ThreadGovernor(num_threads, begins_single=is_filling)
        weights: dict[int, LinearWeight] = {}
        for program in (plan.prefill, plan.decode):
            for operation in program.operations:
                handle = operation.tensors[0]
                if operation.opcode is Opcode.LINEAR and handle not in weights:
                    weights[handle] = bind_weight(plan.tensors[handle], self._governor)
        prefill = CpuProgram(plan.prefill, plan, weights, tokens)
        # Guests usually record the same operations twice: compiled once, the two share buffers and bound shapes.
        is_same = plan.decode.operations == plan.prefill.operations
        decode = prefill if is_same else CpuProgram(plan.decode, plan, weights, tokens)
        self._programs = {ProgramKind.PREFILL: prefill, ProgramKind.DECODE: decode}
        self._vocab_size = plan.vocab_size
        self._buffer: FloatArray = np.empty((0, plan.vocab_size), np.float32)  # of logits, where rows are transposed
        self._logits: FloatArray = self._buffer  # of the latest step
        self._num_steps = 0
        self._num_tokens = 0

    def prepare_step(self, num_tokens: int) -> None:
        """Bind the program to that many rows (5 ms for 30 layers). No memory of activations or weights is touched."""
        kind = ProgramKind.DECODE if num_tokens == 1 else ProgramKind.PREFILL
        self._programs[kind].prepare(num_tokens)

    def step(self, inputs: tuple[SequenceInput, ...]) -> None:
        """See :class:`~worker.backends.protocol.BoundModel`."""
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        self._shares.clear()
        for item, runs in zip(inputs, self._blocks.find_runs(inputs), strict=True):
            num_tokens = len(item.token_ids)
            targets = skip_tokens(runs, item.start)
            table = item.block_table if item.num_logits <= 1 else None  # guesses are verified once in a while
            self._shares.append(SequenceShare(runs, targets, len(token_ids), num_tokens, item.start, table))
            if num_tokens == 1:
                self._attention.packed.forget(item.block_table)
            token_ids += item.token_ids
            positions += range(item.start, item.start + num_tokens)
            last_rows += range(len(token_ids) - item.num_logits, len(token_ids))
        is_decode = len(token_ids) == len(inputs)
        program = self._programs[ProgramKind.DECODE if is_decode else ProgramKind.PREFILL]
        with np.errstate(over="ignore"):  # see bind_silu_mul
            columns = program.run(token_ids, positions, last_rows)
        self._num_steps += 1
        self._num_tokens += len(token_ids)
        self._logits = self._arrange(columns)

    def logits(self) -> FloatArray:
        return self._logits

    def sample(self, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        return sample_rows(self._logits, rows)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._attention.packed.forget_blocks(target for _, target in pairs)
        super().copy_blocks(pairs)

    def release_blocks(self, blocks: Sequence[int]) -> None:
        self._attention.packed.forget_blocks(blocks)
        super().release_blocks(blocks)

    def restore_prefix(self, block_table: Sequence[int], keys_values: FloatArray) -> None:
        self._attention.packed.forget_blocks(block_table)
        super().restore_prefix(block_table, keys_values)

    def statistics(self) -> Mapping[str, int]:
        return {
            "num_steps": self._num_steps,
            "num_tokens": self._num_tokens,
            "num_thread_fallbacks": self._governor.num_fallbacks,
            "kv_resident_bytes": self._blocks.resident_bytes,
            "kv_spare_bytes": self._blocks.spare_bytes,
            "kv_packed_bytes": self._attention.packed.num_bytes,
        }

    def close(self) -> None:
        self._programs.clear()  # with them every reference to a weight
        self._shares.clear()
        self._attention.close()
        self._blocks.close()

    def _arrange(self, columns: FloatArray | None) -> FloatArray:
        """Logits ``[R, V]`` of feature-major ``columns`` ``[V, R]``, without a copy for one row."""
        if columns is None:
            return self._buffer[:0]
        num_rows = columns.shape[1]
        if num_rows == 1 and columns.flags.c_contiguous:
            return columns.reshape(1, -1)
        if len(self._buffer) < num_rows:
            self._buffer = np.empty((num_rows, self._vocab_size), np.float32)
        transpose_into(self._buffer[:num_rows], columns)
        return self._buffer[:num_rows]
