"""Checks a model plan before anything is bound: operand shapes, widths of values, which rows a value has."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from guests.abi import NO_TENSOR, NO_VALUE, Opcode
from guests.program import Operation, Program
from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.protocol import BackendError, ModelPlan, WeightTensor


class Rows(Enum):
    """What the rows of a value stand for."""

    TOKENS = "tokens"  # every token of the step, T
    SAMPLED = "sampled"  # one for each sequence that wants logits, or is pooled, S


@dataclass(frozen=True, slots=True)
class ValueShape:
    """Shape of a program value: ``width`` columns for each row."""

    width: int
    rows: Rows


def infer_shapes(program: Program, plan: ModelPlan | EncoderPlan) -> dict[int, ValueShape]:
    """The shape of every value of ``program``, in a plan whose weights fit it.

    Raises:
        BackendError: an operand's shape, column range or layer does not fit; the message names the operation.
    """
    shapes: dict[int, ValueShape] = {}
    for index, operation in enumerate(program.operations):
        checker = _OperationChecker(index, operation, plan, shapes)
        shape = checker.infer()
        if shape is not None:
            shapes[operation.out] = shape
    return shapes


class _OperationChecker:
    """The rules of one operation, given the shapes of the values before it."""

    def __init__(
        self, index: int, operation: Operation, plan: ModelPlan | EncoderPlan, shapes: dict[int, ValueShape]
    ) -> None:
        self._index = index
        self._operation = operation
        self._plan = plan
        self._shapes = shapes

    def infer(self) -> ValueShape | None:
        """Shape of the operation's result; None where it has none."""
        operation = self._operation
        opcode = operation.opcode
        if opcode in (Opcode.EMBED, Opcode.POSITION_EMBED):
            return self._infer_embed()
        source = self._value(0)
        if opcode is Opcode.RMS_NORM:
            self._require_shape(self._tensor(0), (source.width,))
            return source
        if opcode is Opcode.LINEAR:
            return self._infer_linear(source)
        if opcode in (Opcode.HEAD_RMS_NORM, Opcode.ROPE):
            return self._infer_in_place(source)
        if opcode is Opcode.KV_APPEND:
            self._check_kv_append(source)
            return None
        if opcode is Opcode.ATTENTION:
            return self._infer_attention(source)
        if opcode is Opcode.SILU_MUL:
            self._require(source.width == 2 * operation.ints[0], f"input is {source.width} wide")
            return ValueShape(operation.ints[0], source.rows)
        if opcode is Opcode.ADD:
            other = self._value(1)
            self._require(other == source, f"cannot add {source} and {other}")
            return source
        if opcode in (Opcode.LAST_ROWS, Opcode.MEAN_POOL):
            self._require_encoder(opcode is Opcode.MEAN_POOL)
            self._require(source.rows is Rows.TOKENS, "rows were selected before")
            return ValueShape(source.width, Rows.SAMPLED)
        if opcode is Opcode.LAYER_NORM:
            self._require_shape(self._tensor(0), (source.width,))
            self._require_shape(self._tensor(1), (source.width,))
            return source
        if opcode in (Opcode.GELU, Opcode.L2_NORMALISE):
            return source
        if opcode is Opcode.ENCODER_ATTENTION:
            return self._infer_encoder_attention(source)
        self._check_output(source)
        return None

    def _infer_embed(self) -> ValueShape:
        table = self._tensor(0, num_dims=2)
        num_rows, width = table.shape
        if self._operation.opcode is Opcode.POSITION_EMBED:
            needed = self._plan.context_length
            self._require(num_rows >= needed, f"{num_rows} positions for a context of {needed} tokens")
        return ValueShape(width, Rows.TOKENS)

    def _check_output(self, source: ValueShape) -> None:
        plan = self._plan
        if isinstance(plan, EncoderPlan):
            self._require(source.rows is Rows.SAMPLED, "the result of an encoder is one row for each sequence")
            self._require(source.width == plan.vector_size, f"result is {source.width} wide, not {plan.vector_size}")
        else:
            self._require(source.width == plan.vocab_size, f"result is {source.width} wide, not the vocabulary")

    def _infer_encoder_attention(self, source: ValueShape) -> ValueShape:
        num_heads, head_dim = self._operation.ints[:2]
        self._require_encoder(True)
        self._require(source.rows is Rows.TOKENS, "needs token rows")
        self._require(num_heads > 0 and head_dim > 0, f"{num_heads} heads of {head_dim}")
        self._require(source.width == 3 * num_heads * head_dim, f"input is {source.width} wide")
        return ValueShape(num_heads * head_dim, Rows.TOKENS)

    def _require_encoder(self, wanted: bool) -> None:
        if isinstance(self._plan, EncoderPlan) != wanted:
            kind = "ENCODE" if wanted else "PREFILL and DECODE"
            raise BackendError(f"operation {self._index} ({self._operation.opcode.name}): only in {kind} programs")

    def _infer_linear(self, source: ValueShape) -> ValueShape:
        num_outputs = self._operation.ints[0]
        weight = self._tensor(0, num_dims=2)
        self._require_shape(weight, (num_outputs, source.width))
        if self._operation.tensors[1] != NO_TENSOR:
            self._require_shape(self._tensor(1), (num_outputs,))
        return ValueShape(num_outputs, source.rows)

    def _infer_in_place(self, source: ValueShape) -> ValueShape:
        operation = self._operation
        self._require(operation.out == operation.inputs[0], "works in place: out must be its input")
        column, num_heads, head_dim = operation.ints[:3]
        self._require_columns(source, column, num_heads * head_dim)
        is_rope = operation.opcode is Opcode.ROPE
        self._require_shape(self._tensor(0), (head_dim // 2 if is_rope else head_dim,))
        self._require(not is_rope or source.rows is Rows.TOKENS, "needs token rows")
        return source

    def _check_kv_append(self, source: ValueShape) -> None:
        layer, key_column, value_column, num_heads, head_dim = self._operation.ints[:5]
        self._check_kv(layer, num_heads, head_dim)
        self._require(source.rows is Rows.TOKENS, "needs token rows")
        self._require_columns(source, key_column, num_heads * head_dim)
        self._require_columns(source, value_column, num_heads * head_dim)

    def _infer_attention(self, source: ValueShape) -> ValueShape:
        layer, num_heads, num_kv_heads, head_dim, window_tokens = self._operation.ints[:5]
        self._check_kv(layer, num_kv_heads, head_dim)
        self._require(num_heads > 0 and num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads}")
        self._require(window_tokens >= 0, f"window of {window_tokens} tokens")
        self._require(source.rows is Rows.TOKENS, "needs token rows")
        self._require_columns(source, 0, num_heads * head_dim)
        return ValueShape(num_heads * head_dim, Rows.TOKENS)

    def _check_kv(self, layer: int, num_kv_heads: int, head_dim: int) -> None:
        plan = self._plan
        if isinstance(plan, EncoderPlan):
            raise BackendError(f"operation {self._index} ({self._operation.opcode.name}): an encoder keeps no keys")
        self._require(0 <= layer < plan.num_layers, f"layer {layer}: the model has {plan.num_layers}")
        self._require(
            (num_kv_heads, head_dim) == (plan.num_kv_heads, plan.head_dim),
            f"{num_kv_heads} key/value heads of {head_dim}: the model has {plan.num_kv_heads} of {plan.head_dim}",
        )

    def _value(self, position: int) -> ValueShape:
        value = self._operation.inputs[position]
        self._require(value != NO_VALUE, f"input {position} is missing")
        return self._shapes[value]

    def _tensor(self, position: int, *, num_dims: int = 1) -> WeightTensor:
        handle = self._operation.tensors[position]
        self._require(handle != NO_TENSOR, f"tensor {position} is missing")
        tensor = self._plan.tensors[handle]
        self._require(
            len(tensor.shape) == num_dims, f"{tensor.name} has shape {tensor.shape}, expected {num_dims} axes"
        )
        return tensor

    def _require_columns(self, source: ValueShape, column: int, width: int) -> None:
        self._require(
            column >= 0 and width > 0 and column + width <= source.width,
            f"columns {column} to {column + width} of an input that is {source.width} wide",
        )

    def _require_shape(self, tensor: WeightTensor, shape: tuple[int, ...]) -> None:
        self._require(tensor.shape == shape, f"{tensor.name} has shape {tensor.shape}, expected {shape}")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise BackendError(f"operation {self._index} ({self._operation.opcode.name}): {message}")
