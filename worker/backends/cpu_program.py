"""Compiles a tensor program for the CPU backend: buffers, weights, and prebound lists of calls for each step shape.

A program has two parts with different numbers of rows: operations on the T tokens of the step, and, after LAST_ROWS,
operations on the S rows whose logits are wanted (of an encoder: after MEAN_POOL, on one row for each sequence). Each
part is bound once for every number of rows it meets (see :func:`~worker.backends.cpu_buffers.pad_rows`); a step then
only runs the list.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from guests.abi import Opcode
from guests.program import Operation, Program
from worker.backends.cpu_binding import BoundRows, BoundTokens, CompiledProgram, ProgramBinder, StepTokens
from worker.backends.cpu_buffers import RowBuffers, assign_buffers, pad_rows
from worker.backends.cpu_encoder import (
    mean_pool,
)
from worker.backends.cpu_linear import LinearWeight
from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.program_shapes import Rows, infer_shapes
from worker.backends.protocol import FloatArray, ModelPlan


class CpuProgram:
    """One compiled program. Engine thread only."""

    def __init__(
        self,
        program: Program,
        plan: ModelPlan | EncoderPlan,
        linear_weights: dict[int, LinearWeight],
        tokens: StepTokens,
    ) -> None:
        shapes = infer_shapes(program, plan)
        assigned = {rows: assign_buffers(program, shapes, rows) for rows in Rows}
        self._compiled = CompiledProgram(
            operations=fuse_rotations(program.operations),
            plan=plan,
            linear_weights=linear_weights,
            tokens=tokens,
            rows_of={value: shape.rows for value, shape in shapes.items()},
            buffer_of={rows: buffer_of for rows, (buffer_of, _) in assigned.items()},
            buffers={rows: RowBuffers(widths) for rows, (_, widths) in assigned.items()},
        )
        self._bound_tokens: dict[int, BoundTokens] = {}
        self._bound_rows: dict[int, BoundRows] = {}

    def prepare(self, num_tokens: int) -> None:
        """Bind what a run of ``num_tokens`` tokens that wants one row needs."""
        self._ensure_tokens(pad_rows(num_tokens))
        self._ensure_rows(1)

    def run(self, token_ids: list[int], positions: list[int], last_rows: list[int]) -> FloatArray | None:
        """Run the program; logits ``[V, S]`` feature-major, None where no row is wanted. Valid until the next run."""
        bound = self._run_tokens(token_ids, positions)
        if not last_rows:
            return None
        if bound.result is not None:
            return bound.result[:, last_rows]
        return self._run_rows(bound, last_rows)

    def run_pooled(self, token_ids: list[int], positions: list[int]) -> FloatArray:
        """Run an encoder's program on the sequences of :attr:`StepTokens.spans`: vectors ``[D, S]`` feature-major,
        valid until the next run."""
        tokens = self._run_tokens(token_ids, positions)
        spans = self._compiled.tokens.spans
        bound = self._ensure_rows(pad_rows(len(spans)))
        for source, value in tokens.selections:
            mean_pool(source, spans, bound.targets[value])
        _run_calls(bound)
        if bound.result is None:
            raise RuntimeError("an encoder's program without pooled result was bound")
        return bound.result[:, : len(spans)]

    def _run_tokens(self, token_ids: list[int], positions: list[int]) -> BoundTokens:
        bound = self._ensure_tokens(pad_rows(len(token_ids)))
        bound.token_ids[: len(token_ids)] = token_ids
        bound.positions[: len(positions)] = positions
        self._compiled.tokens.scratch.begin_step()
        _run_calls(bound)
        return bound

    def _run_rows(self, tokens: BoundTokens, last_rows: list[int]) -> FloatArray | None:
        num_rows = pad_rows(len(last_rows))
        bound = self._ensure_rows(num_rows)
        selected = np.array(last_rows + [0] * (num_rows - len(last_rows)))
        for source, value in tokens.selections:
            source.take(selected, 1, bound.targets[value], "clip")
        _run_calls(bound)
        return None if bound.result is None else bound.result[:, : len(last_rows)]

    def _ensure_tokens(self, num_rows: int) -> BoundTokens:
        if self._compiled.buffers[Rows.TOKENS].ensure_rows(num_rows):
            self._bound_tokens.clear()
        found = self._bound_tokens.get(num_rows)
        if found is None:
            found = self._bound_tokens[num_rows] = ProgramBinder(self._compiled, num_rows, Rows.TOKENS).bind_tokens()
        return found

    def _ensure_rows(self, num_rows: int) -> BoundRows:
        if self._compiled.buffers[Rows.SAMPLED].ensure_rows(num_rows):
            self._bound_rows.clear()
        found = self._bound_rows.get(num_rows)
        if found is None:
            found = self._bound_rows[num_rows] = ProgramBinder(self._compiled, num_rows, Rows.SAMPLED).bind_rows()
        return found


def _run_calls(bound: BoundTokens | BoundRows) -> None:
    for call in bound.calls:
        call()
    if bound.waits:  # all that they waited for is there now
        waits, bound.waits = bound.waits, set()
        bound.calls = [call for call in bound.calls if id(call) not in waits]


def fuse_rotations(operations: tuple[Operation, ...]) -> list[Operation]:
    """``operations`` with each pair of ROPEs on neighbouring columns (queries, then keys) made one."""
    fused: list[Operation] = []
    for operation in operations:
        previous = fused[-1] if fused else None
        if previous is not None and _continues_rotation(previous, operation):
            column, num_heads, head_dim = previous.ints[:3]
            ints = (column, num_heads + operation.ints[1], head_dim, 0, 0, 0)
            fused[-1] = replace(previous, ints=ints)
        else:
            fused.append(operation)
    return fused


def _continues_rotation(previous: Operation, operation: Operation) -> bool:
    column, num_heads, head_dim = previous.ints[:3]
    return (
        previous.opcode is operation.opcode is Opcode.ROPE
        and (previous.out, previous.tensors, previous.floats) == (operation.out, operation.tensors, operation.floats)
        and operation.ints[0] == column + num_heads * head_dim
        and operation.ints[2] == head_dim
    )
