"""Encoders on the CPU backend: one program, no keys and values between steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from guests.abi import Opcode
from worker.backends.cpu_attention_scratch import AttentionScratch
from worker.backends.cpu_binding import StepTokens
from worker.backends.cpu_linear import LinearWeight, bind_weight
from worker.backends.cpu_program import CpuProgram
from worker.backends.encoder_protocol import EncoderPlan, TokenSpan, lay_out
from worker.backends.protocol import FloatArray
from worker.backends.thread_governor import ThreadGovernor


class NumKongEncoder:
    """An encoder on the CPU backend. Engine thread only."""

    def __init__(self, plan: EncoderPlan, num_threads: int) -> None:
        self._spans: list[TokenSpan] = []
        is_filling = any(tensor.wait_verified is not None for tensor in plan.tensors)
        self._governor = ThreadGovernor(num_threads, begins_single=is_filling)
        weights: dict[int, LinearWeight] = {}
        for operation in plan.program.operations:
            handle = operation.tensors[0]
            if operation.opcode is Opcode.LINEAR and handle not in weights:
                weights[handle] = bind_weight(plan.tensors[handle], self._governor)
        tokens = StepTokens([], AttentionScratch(), self._spans)
        self._program: CpuProgram | None = CpuProgram(plan.program, plan, weights, tokens)
        self._num_steps = 0
        self._num_tokens = 0

    def encode(self, sequences: tuple[tuple[int, ...], ...]) -> FloatArray:
        """See :class:`~worker.backends.encoder_protocol.BoundEncoder`."""
        if self._program is None:
            raise RuntimeError("this encoder is closed")
        token_ids, positions, self._spans[:] = lay_out(sequences)
        columns = self._program.run_pooled(token_ids, positions)
        self._num_steps += 1
        self._num_tokens += len(token_ids)
        return np.ascontiguousarray(columns.T)

    def prepare_step(self, num_tokens: int) -> None:
        if self._program is not None:
            self._program.prepare(num_tokens)

    def statistics(self) -> Mapping[str, int]:
        return {
            "num_steps": self._num_steps,
            "num_tokens": self._num_tokens,
            "num_thread_fallbacks": self._governor.num_fallbacks,
        }

    def close(self) -> None:
        self._program = None  # with it every reference to a weight
