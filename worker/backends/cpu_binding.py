"""Binds the operations of a tensor program to buffers and weights: lists of calls that a step only runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR, NO_VALUE, Opcode
from guests.program import Operation
from worker.backends.cpu_attention import bind_attention, bind_kv_append
from worker.backends.cpu_attention_scratch import AttentionScratch, AttentionShape, SequenceShare
from worker.backends.cpu_buffers import RowBuffers
from worker.backends.cpu_encoder import (
    bind_encoder_attention,
    bind_gelu,
    bind_l2_normalise,
    bind_layer_norm,
)
from worker.backends.cpu_linear import LinearWeight, Staging
from worker.backends.cpu_operations import (
    RopeTable,
    bind_add,
    bind_bias,
    bind_embed,
    bind_head_rms_norm,
    bind_rms_norm,
    bind_rope,
    bind_silu_mul,
    make_rope_table,
)
from worker.backends.encoder_protocol import EncoderPlan, TokenSpan
from worker.backends.kv_blocks import KvBlocks
from worker.backends.program_shapes import Rows
from worker.backends.protocol import BackendError, FloatArray, ModelPlan

Call = Callable[[], None]

#: What reads no weight of its own layer: layers that use the same buffers share one call.
_REPEATED: Final = frozenset({Opcode.ROPE, Opcode.SILU_MUL, Opcode.ADD, Opcode.GELU})

#: Between the two parts: what gives rows other than tokens.
_SELECTING: Final = frozenset({Opcode.LAST_ROWS, Opcode.MEAN_POOL})


@dataclass(slots=True)
class StepTokens:
    """The tokens of the step in progress; calls read them when they run."""

    shares: list[SequenceShare]  # one list object for the life of the model
    scratch: AttentionScratch
    spans: list[TokenSpan] = field(default_factory=list)  # of an encoder; one list object as well
    memory: KvBlocks | None = None  # an encoder has none

    def require_memory(self) -> KvBlocks:
        """The KV blocks; they may still be closed.

        Raises:
            BackendError: the program is an encoder's.
        """
        if self.memory is None:
            raise BackendError("an operation on the KV cache in a program that has none")
        return self.memory


@dataclass(slots=True)
class BoundTokens:
    """The token part for one T. ``token_ids`` and ``positions`` are filled before the calls run."""

    token_ids: npt.NDArray[np.int64]
    positions: FloatArray
    calls: list[Call] = field(default_factory=list)
    waits: set[int] = field(default_factory=set)  # identities of those among them that a first run alone needs
    #: (source, destination value): what LAST_ROWS copies selected columns of, or MEAN_POOL averages, and where to
    selections: list[tuple[FloatArray, int]] = field(default_factory=list)
    result: FloatArray | None = None  # where the program has no LAST_ROWS


@dataclass(slots=True)
class BoundRows:
    """The part behind LAST_ROWS for one S."""

    targets: dict[int, FloatArray]
    calls: list[Call] = field(default_factory=list)
    waits: set[int] = field(default_factory=set)  # as in BoundTokens
    result: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """What binding needs to know of a program, for any number of rows."""

    operations: list[Operation]
    plan: ModelPlan | EncoderPlan
    linear_weights: dict[int, LinearWeight]
    tokens: StepTokens
    rows_of: dict[int, Rows]
    buffer_of: dict[Rows, dict[int, int]]
    buffers: dict[Rows, RowBuffers]
    vectors: dict[int, FloatArray] = field(default_factory=dict)  # one-dimensional weights, by handle


@dataclass(slots=True)
class _Staged:
    """A staging area and the value that is in it at this point of the program."""

    staging: Staging
    value: int = NO_VALUE
    calls: dict[int, Call] = field(default_factory=dict)  # that stage a view, by its identity


class ProgramBinder:
    """Binds one part of a program to views of ``num_rows`` rows."""

    def __init__(self, compiled: CompiledProgram, num_rows: int, rows: Rows) -> None:
        self._compiled = compiled
        self._num_rows = num_rows
        self._rows = rows
        self._calls: list[Call] = []
        self._staged: dict[tuple[Hashable, int], _Staged] = {}  # by kind and width
        self._scratch: dict[tuple[int, ...], FloatArray] = {}  # by shape
        self._views: dict[int, FloatArray] = {}  # by buffer
        self._repeated: dict[Hashable, Call] = {}
        self._rope_tables: dict[tuple[int, float], RopeTable] = {}
        self._table_waits: list[Call] = []  # for the weights that tables are made of
        self._waits: set[int] = set()  # identities of all waits among the calls
        self._token_ids = np.zeros(num_rows, np.int64)
        self._positions: FloatArray = np.zeros(num_rows, np.float32)

    def bind_tokens(self) -> BoundTokens:
        """The token part."""
        bound = BoundTokens(self._token_ids, self._positions)
        for operation in self._compiled.operations:
            source_is_token = self._compiled.rows_of.get(operation.inputs[0], Rows.TOKENS) is Rows.TOKENS
            if operation.opcode in _SELECTING:
                bound.selections.append((self._columns(operation.inputs[0]), operation.out))
            elif operation.opcode is Opcode.OUTPUT:
                bound.result = self._columns(operation.inputs[0]) if source_is_token else None
            elif source_is_token:
                self._bind(operation)
        bound.calls = self._table_waits + [table.update for table in self._rope_tables.values()] + self._calls
        bound.waits = self._waits
        return bound

    def bind_rows(self) -> BoundRows:
        """The part behind LAST_ROWS."""
        bound = BoundRows({})
        for operation in self._compiled.operations:
            if operation.opcode in _SELECTING:
                bound.targets[operation.out] = self._columns(operation.out)
            elif self._compiled.rows_of.get(operation.inputs[0]) is not Rows.SAMPLED:
                continue
            elif operation.opcode is Opcode.OUTPUT:
                bound.result = self._columns(operation.inputs[0])
            else:
                self._bind(operation)
        bound.calls, bound.waits = self._calls, self._waits
        return bound

    def _bind(self, operation: Operation) -> None:
        self._wait_weights(operation)
        binders: dict[Opcode, Callable[[Operation], Call | None]] = {
            Opcode.EMBED: self._bind_embed,
            Opcode.RMS_NORM: self._bind_rms_norm,
            Opcode.LINEAR: self._bind_linear,
            Opcode.HEAD_RMS_NORM: self._bind_head_rms_norm,
            Opcode.ROPE: self._bind_rope,
            Opcode.KV_APPEND: self._bind_kv_append,
            Opcode.ATTENTION: self._bind_attention,
            Opcode.SILU_MUL: self._bind_silu_mul,
            Opcode.ADD: self._bind_add,
            Opcode.LAYER_NORM: self._bind_layer_norm,
            Opcode.GELU: self._bind_gelu,
            Opcode.POSITION_EMBED: self._bind_position_embed,
            Opcode.ENCODER_ATTENTION: self._bind_encoder_attention,
            Opcode.L2_NORMALISE: self._bind_l2_normalise,
        }
        call = self._bind_once(operation, binders[operation.opcode])
        if call is not None:
            self._calls.append(call)
        # The value was written: what was staged of it before is stale.
        for staged in self._staged.values():
            if staged.value == operation.out:
                staged.value = NO_VALUE

    def _bind_once(self, operation: Operation, bind: Callable[[Operation], Call | None]) -> Call | None:
        """What ``bind`` makes. Layers do the same to the same buffers: where no weight is read, in one object, since
        every object that a zygote binds is in the page tables of all its workers."""
        if operation.opcode not in _REPEATED:
            return bind(operation)
        buffers = tuple(id(self._columns(value)) for value in (*operation.inputs, operation.out) if value != NO_VALUE)
        key = (operation.opcode, buffers, operation.tensors, operation.ints, operation.floats)
        call = self._repeated.get(key)
        if call is None and (call := bind(operation)) is not None:
            self._repeated[key] = call
        return call

    def _wait_weights(self, operation: Operation) -> None:
        """Where weights are still being filled in, the first step waits for each before the operation that reads it.
        Binding reads none: it makes views."""
        for handle in operation.tensors:
            wait = self._compiled.plan.tensors[handle].wait_verified if handle != NO_TENSOR else None
            if wait is not None:
                self._calls.append(wait)
                self._waits.add(id(wait))

    def _columns(self, value: int) -> FloatArray:
        """Feature-major view ``[width, rows]`` of a value."""
        buffer = self._compiled.buffer_of[self._rows][value]
        found = self._views.get(buffer)
        if found is None:
            found = self._views[buffer] = self._compiled.buffers[self._rows].view(buffer, self._num_rows)
        return found

    def _heads(self, value: int, column: int, num_heads: int, head_dim: int) -> FloatArray:
        columns = self._columns(value)[column : column + num_heads * head_dim]
        return columns.reshape(num_heads, head_dim, self._num_rows)

    def _take_scratch(self, shape: tuple[int, ...]) -> FloatArray:
        """Memory that lasts for one call; all operations share it, so that few pages are touched by a first step."""
        found = self._scratch.get(shape)
        if found is None:
            found = self._scratch[shape] = np.empty(shape, np.float32)
        return found

    def _vector(self, operation: Operation, position: int = 0) -> FloatArray:
        """A one-dimensional weight as float32."""
        handle = operation.tensors[position]
        found = self._compiled.vectors.get(handle)
        if found is None:
            data = self._compiled.plan.tensors[handle].data
            found = self._compiled.vectors[handle] = np.ascontiguousarray(data, np.float32)
        return found

    def _bind_embed(self, operation: Operation) -> Call:
        table = self._compiled.plan.tensors[operation.tensors[0]]
        return bind_embed(table, self._token_ids, self._columns(operation.out))

    def _bind_position_embed(self, operation: Operation) -> Call:
        table = self._compiled.plan.tensors[operation.tensors[0]]
        positions, indices = self._positions, np.zeros(self._num_rows, np.int64)
        embed = bind_embed(table, indices, self._columns(operation.out))

        def embed_positions() -> None:
            np.copyto(indices, positions, casting="unsafe")
            embed()

        return embed_positions

    def _bind_layer_norm(self, operation: Operation) -> Call:
        source, out = self._columns(operation.inputs[0]), self._columns(operation.out)
        weight, bias = self._vector(operation), self._vector(operation, 1)
        return bind_layer_norm(source, weight, bias, operation.floats[0], out)

    def _bind_gelu(self, operation: Operation) -> Call:
        return bind_gelu(self._columns(operation.inputs[0]), self._columns(operation.out))

    def _bind_encoder_attention(self, operation: Operation) -> Call:
        source, out = self._columns(operation.inputs[0]), self._columns(operation.out)
        spans = self._compiled.tokens.spans
        return bind_encoder_attention(source, out, spans, operation.ints[0], operation.floats[0])

    def _bind_l2_normalise(self, operation: Operation) -> Call:
        source, out = self._columns(operation.inputs[0]), self._columns(operation.out)
        return bind_l2_normalise(source, operation.floats[0], out)

    def _bind_rms_norm(self, operation: Operation) -> Call:
        source, out = self._columns(operation.inputs[0]), self._columns(operation.out)
        factors = self._take_scratch((1, self._num_rows))
        return bind_rms_norm(source, self._vector(operation), operation.floats[0], out, factors)

    def _bind_head_rms_norm(self, operation: Operation) -> Call:
        heads = self._heads(operation.out, *operation.ints[:3])
        return bind_head_rms_norm(heads, self._vector(operation), operation.floats[0], self._take_scratch(heads.shape))

    def _bind_linear(self, operation: Operation) -> Call | None:
        weight = self._compiled.linear_weights[operation.tensors[0]]
        staging = self._stage(operation.inputs[0], weight)
        out = self._columns(operation.out)
        self._calls.append(weight.bind(staging, out))
        if operation.tensors[1] == NO_TENSOR:
            return None
        return bind_bias(out, self._vector(operation, 1))

    def _stage(self, value: int, weight: LinearWeight) -> Staging:
        """Where ``value`` is staged for ``weight``'s class: once for all products in a row that multiply with it."""
        columns = self._columns(value)
        key = (weight.describe_staging(self._num_rows), len(columns))
        staged = self._staged.get(key)
        if staged is None:
            staged = self._staged[key] = _Staged(weight.make_staging((len(columns), self._num_rows)))
        if staged.value != value:
            staged.value = value
            call = staged.calls.get(id(columns))  # views live as long as this binder
            if call is None:
                call = staged.calls[id(columns)] = staged.staging.bind_stage(columns)
            self._calls.append(call)
        return staged.staging

    def _bind_rope(self, operation: Operation) -> Call:
        key = (operation.tensors[0], operation.floats[0])
        table = self._rope_tables.get(key)
        if table is None:
            table = make_rope_table(self._vector(operation), operation.floats[0], self._positions)
            self._rope_tables[key] = table
            wait = self._compiled.plan.tensors[operation.tensors[0]].wait_verified
            if wait is not None:
                self._table_waits.append(wait)
                self._waits.add(id(wait))
        heads = self._heads(operation.out, *operation.ints[:3])
        return bind_rope(heads, table, self._take_scratch(heads.shape))

    def _bind_kv_append(self, operation: Operation) -> Call:
        layer, key_column, value_column, num_heads, head_dim = operation.ints[:5]
        columns = self._columns(operation.inputs[0])
        tokens = self._compiled.tokens
        memory, shares = tokens.require_memory(), tokens.shares
        return bind_kv_append(columns, memory, shares, layer, (key_column, value_column), (num_heads, head_dim))

    def _bind_attention(self, operation: Operation) -> Call:
        shape = AttentionShape(*operation.ints[:5], operation.floats[0])
        tokens = self._compiled.tokens
        out = self._columns(operation.out)
        source, queries = self._columns(operation.inputs[0]), self._take_scratch(out.shape)
        return bind_attention(source, out, queries, tokens.require_memory(), tokens.shares, shape, tokens.scratch)

    def _bind_silu_mul(self, operation: Operation) -> Call:
        return bind_silu_mul(self._columns(operation.inputs[0]), self._columns(operation.out))

    def _bind_add(self, operation: Operation) -> Call:
        left, right = (self._columns(value) for value in operation.inputs)
        return bind_add(left, right, self._columns(operation.out))
