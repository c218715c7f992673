"""A tensor program as a list of device commands for a step's shape. Decides only; queues nothing.

Fused on the way: a LINEAR whose result is only added to the residual adds there itself, and cosines and sines are
computed once a step for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guests.abi import NO_TENSOR, Opcode
from guests.program import Operation, Program
from worker.backends import cuda_attention_kernels as attention
from worker.backends import cuda_kernels as kernels
from worker.backends.cuda.device import ACTIVATION_BYTES, Place
from worker.backends.cuda.linear_commands import LinearCommands
from worker.backends.cuda.program_types import assign_values, rename_values
from worker.backends.cuda.step_layout import StepShape
from worker.backends.cuda.step_values import BoundProgram, Command, DeviceCopy, StepMemory, StepValues
from worker.backends.cuda.weight_image import TABLE_TYPES, WeightImage
from worker.backends.cuda_kernels import Activation, Launch
from worker.backends.program_shapes import Rows, infer_shapes
from worker.backends.protocol import KV_BLOCK_TOKENS, BackendError, ModelPlan


class CudaProgram:
    """One program, bound to an image of weights. Immutable."""

    def __init__(
        self, program: Program, plan: ModelPlan, image: WeightImage, activation: Activation, num_processors: int
    ) -> None:
        """Raises:
        BackendError: an operation, dtype or shape without a kernel; the message names the operation or tensor.
        """
        program = rename_values(program)
        shapes = infer_shapes(program, plan)
        values = assign_values(program, shapes, activation)
        self._bound = BoundProgram(
            program.operations, shapes, values, image, activation, plan.num_layers, num_processors
        )
        self._check_tables()

    def list_commands(self, shape: StepShape, memory: StepMemory) -> tuple[list[Command], Place]:
        """The commands of a step in order, and where its logits are, float32 ``[R, V]``."""
        emitter = _Emitter(StepValues(self._bound, shape, memory))
        commands = list(emitter.emit())
        return commands, emitter.logits

    def _check_tables(self) -> None:
        for operation in self._bound.operations:
            if operation.opcode is Opcode.LINEAR and operation.tensors[1] != NO_TENSOR:
                bias = self._bound.tensor(operation, 1)
                if bias.format not in TABLE_TYPES:
                    raise BackendError(f"{bias.name}: a bias stored as {bias.format}")
            if operation.opcode not in (Opcode.ROPE, Opcode.RMS_NORM, Opcode.HEAD_RMS_NORM):
                continue
            tensor = self._bound.tensor(operation)
            if operation.opcode is Opcode.ROPE and tensor.format != "f32":
                raise BackendError(f"{tensor.name}: inverse frequencies must be float32")
            if tensor.format not in TABLE_TYPES:
                raise BackendError(f"{tensor.name}: a norm's weight stored as {tensor.format}")


class _Emitter:
    """One step's commands."""

    def __init__(self, values: StepValues) -> None:
        self._values = values
        self._program = values.program
        self._shape = values.shape
        self._memory = values.memory
        self._activation: Activation = values.activation
        self._linear = LinearCommands(values)
        self._rope_tables: dict[tuple[int, float], Place] = {}
        self._selects_rows = any(operation.opcode is Opcode.LAST_ROWS for operation in values.program.operations)
        self.logits = values.memory.take("logits", 0)

    def emit(self) -> Iterator[Command]:
        emitters: dict[Opcode, Callable[[int, Operation], Iterator[Command]]] = {
            Opcode.EMBED: self._embed,
            Opcode.RMS_NORM: self._rms_norm,
            Opcode.LINEAR: self._linear.linear,
            Opcode.HEAD_RMS_NORM: self._head_rms_norm,
            Opcode.ROPE: self._rope,
            Opcode.KV_APPEND: self._kv_append,
            Opcode.ATTENTION: self._attention,
            Opcode.SILU_MUL: self._silu_mul,
            Opcode.ADD: self._add,
            Opcode.LAST_ROWS: self._last_rows,
            Opcode.OUTPUT: self._output,
        }
        for index, operation in enumerate(self._program.operations):
            is_sampled = self._values.rows_of(operation) is Rows.SAMPLED
            if (is_sampled or operation.opcode is Opcode.LAST_ROWS) and not self._shape.num_rows:
                continue
            yield from emitters[operation.opcode](index, operation)

    # --- operations -------------------------------------------------------------------------------------------------

    def _embed(self, _index: int, operation: Operation) -> Iterator[Command]:
        table = self._program.tensor(operation)
        launch = kernels.gather_rows(
            table.format,
            "f32",
            self._values.place_of(operation.out),
            self._values.weight(table),
            table.scales_in(self._memory.image),
            self._memory.step.token_ids,
            num_rows=self._shape.num_tokens,
            num_table_rows=table.shape[0],
            width=table.shape[1],
            group_size=table.group_size,
        )
        yield Command(launch, table.last_piece)

    def _rms_norm(self, _index: int, operation: Operation) -> Iterator[Command]:
        source, weight = operation.inputs[0], self._program.tensor(operation)
        yield from self._values.as_type(source, "f32")
        launch = kernels.rms_norm(
            self._activation,
            self._values.place_of(operation.out),
            self._values.converted(source, "f32"),
            self._values.weight(weight),
            weight_type=TABLE_TYPES[weight.format],
            num_rows=self._values.num_rows_of(source),
            width=self._values.width_of(source),
            epsilon=operation.floats[0],
        )
        yield Command(launch, weight.last_piece)

    def _head_rms_norm(self, _index: int, operation: Operation) -> Iterator[Command]:
        column, num_heads, head_dim = operation.ints[:3]
        weight = self._program.tensor(operation)
        launch = kernels.head_rms_norm(
            self._activation,
            self._values.heads_of(operation.out),
            self._values.weight(weight),
            weight_type=TABLE_TYPES[weight.format],
            num_rows=self._values.num_rows_of(operation.out),
            row_stride=self._values.width_of(operation.out),
            column=column,
            num_heads=num_heads,
            head_dim=head_dim,
            epsilon=operation.floats[0],
        )
        yield Command(launch, weight.last_piece)

    def _rope(self, _index: int, operation: Operation) -> Iterator[Command]:
        column, num_heads, head_dim = operation.ints[:3]
        half, scale, weight = head_dim // 2, operation.floats[0], self._program.tensor(operation)
        key = (weight.offset, scale)
        if key not in self._rope_tables:
            name = f"rope-{len(self._rope_tables)}"
            table = self._rope_tables[key] = self._memory.take(name, 8 * half * self._shape.num_tokens)
            positions = self._memory.step.positions
            launch = kernels.rope_table(
                table, positions, self._values.weight(weight), num_rows=self._shape.num_tokens, half=half, scale=scale
            )
            yield Command(launch, weight.last_piece)
        launch = kernels.rope(
            self._activation,
            self._values.heads_of(operation.out),
            self._rope_tables[key],
            num_rows=self._shape.num_tokens,
            row_stride=self._values.width_of(operation.out),
            column=column,
            num_heads=num_heads,
            half=half,
        )
        yield Command(launch)

    def _layer(self, layer: int, num_kv_heads: int, head_dim: int) -> tuple[Place, int]:
        """The pool from this layer's place in block 0 on, and elements from block to block."""
        elements = 2 * num_kv_heads * KV_BLOCK_TOKENS * head_dim
        offset = layer * elements * ACTIVATION_BYTES[self._activation]
        pool = self._memory.pool
        return pool.part(offset, pool.num_bytes - offset), elements * self._program.num_layers

    def _kv_append(self, _index: int, operation: Operation) -> Iterator[Command]:
        layer, key_column, value_column, num_kv_heads, head_dim = operation.ints[:5]
        source = operation.inputs[0]
        kv_layer, block_stride = self._layer(layer, num_kv_heads, head_dim)
        launch = kernels.kv_append(
            self._activation,
            kv_layer,
            self._values.heads_of(source),
            self._memory.step.slots,
            block_stride=block_stride,
            num_rows=self._shape.num_tokens,
            row_stride=self._values.width_of(source),
            key_column=key_column,
            value_column=value_column,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        yield Command(launch)

    def _attention(self, _index: int, operation: Operation) -> Iterator[Command]:
        layer, num_heads, num_kv_heads, head_dim, window_tokens = operation.ints[:5]
        source, step, activation = operation.inputs[0], self._memory.step, self._activation
        kv_layer, block_stride = self._layer(layer, num_kv_heads, head_dim)
        paged = attention.PagedAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            row_stride=self._values.width_of(source),
            block_stride=block_stride,
            table_width=self._shape.table_width,
            window_tokens=window_tokens,
            scale=operation.floats[0],
        )
        out, queries = self._values.place_of(operation.out), self._values.heads_of(source)
        if self._shape.is_decode and attention.has_decode_kernel(activation, head_dim):
            yield from self._split_attention(paged, out, queries, kv_layer)
            return
        if self._shape.num_tiles and attention.has_prefill_kernel(activation, head_dim):
            rows = (step.block_tables, step.tiles, step.first_rows, step.num_queries, step.context_tokens)
            num_tiles = self._shape.num_tiles
            yield Command(
                attention.prefill_attention(activation, paged, out, queries, kv_layer, *rows, num_tiles=num_tiles)
            )
            return
        launch = attention.row_attention(
            activation,
            paged,
            out,
            queries,
            kv_layer,
            step.block_tables,
            step.sequence_of_row,
            step.positions,
            num_rows=self._shape.num_tokens,
        )
        yield Command(launch)

    def _split_attention(
        self, paged: attention.PagedAttention, out: Place, queries: Place, kv_layer: Place
    ) -> Iterator[Command]:
        step, num_sequences = self._memory.step, self._shape.num_sequences
        longest = self._shape.table_width * KV_BLOCK_TOKENS
        num_splits = attention.choose_num_splits(
            num_sequences, paged.num_kv_heads, longest, self._program.num_processors
        )
        parts = num_sequences * paged.num_heads * num_splits
        partial = self._memory.take("attention-partial", 4 * parts * paged.head_dim)
        statistics = self._memory.take("attention-statistics", 8 * parts)
        counts = {"num_sequences": num_sequences, "num_splits": num_splits}
        tables, first_rows, contexts = step.block_tables, step.first_rows, step.context_tokens
        kind, results = self._activation, (partial, statistics)
        yield Command(
            attention.decode_attention(kind, paged, *results, queries, kv_layer, tables, first_rows, contexts, **counts)
        )
        yield Command(attention.combine_splits(kind, paged, out, *results, first_rows, **counts))

    def _silu_mul(self, _index: int, operation: Operation) -> Iterator[Command]:
        source = operation.inputs[0]
        launch = kernels.silu_mul(
            self._activation,
            self._values.place_of(operation.out),
            self._values.heads_of(source),
            num_rows=self._values.num_rows_of(source),
            width=operation.ints[0],
        )
        yield Command(launch)

    def _add(self, index: int, operation: Operation) -> Iterator[Command]:
        if index in self._linear.fused:
            return
        first, second = operation.inputs
        out, count = (
            self._values.place_of(operation.out),
            self._values.width_of(first) * self._values.num_rows_of(first),
        )
        if self._program.values.buffers[first] != self._program.values.buffers[operation.out]:
            yield from self._values.as_type(first, "f32")
            yield Command(DeviceCopy(out, self._values.converted(first, "f32")))
        kind = self._program.values.types[second]
        yield Command(kernels.add(kind, out, self._values.place_of(second), count=count))

    def _last_rows(self, _index: int, operation: Operation) -> Iterator[Command]:
        source = operation.inputs[0]
        yield Command(self._select(self._values.place_of(operation.out), source))

    def _select(self, out: Place, value: int) -> Launch:
        rows, count, width = self._memory.step.logits_rows, self._shape.num_rows, self._values.width_of(value)
        return kernels.select_rows(
            self._program.values.types[value], out, self._values.place_of(value), rows, num_rows=count, width=width
        )

    def _output(self, _index: int, operation: Operation) -> Iterator[Command]:
        source = operation.inputs[0]
        yield from self._values.as_type(source, "f32")
        self.logits = self._values.converted(source, "f32")
        if not self._selects_rows:
            width = self._values.width_of(source)
            self.logits = self._memory.take("logits", 4 * width * self._shape.num_rows)
            if self._shape.num_rows:
                whole, rows = self._values.converted(source, "f32"), self._memory.step.logits_rows
                count = self._shape.num_rows
                yield Command(kernels.select_rows("f32", self.logits, whole, rows, num_rows=count, width=width))
