"""The reference backend: float32 NumPy, one plain function an operation. Every other backend is tested against it.

Written to be read, not to be fast: weights that are stored as bf16 or int8 are converted to float32 when bound (the
only backend that copies weights), and nothing is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import ml_dtypes
import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR, Opcode, ProgramKind
from guests.program import Operation, Program
from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan, TokenSpan, lay_out
from worker.backends.gguf_blocks import dequantise_blocks
from worker.backends.host_sampling import sample_rows
from worker.backends.kv_blocks import KvBlocks, Runs
from worker.backends.kv_blocks_model import KvBlocksModel
from worker.backends.numpy_encoder import ENCODER_FUNCTIONS
from worker.backends.program_shapes import infer_shapes
from worker.backends.protocol import (
    BackendError,
    BoundModel,
    FloatArray,
    ModelPlan,
    SequenceInput,
    WeightTensor,
)
from worker.backends.sampling_rows import SampledToken, SamplingRow


@dataclass(slots=True)
class _SequenceShare:
    """Rows ``rows`` of the step belong to one sequence, at positions ``start`` on; ``token_rows`` of the KV memory
    hold its tokens from position 0 to the last of the step."""

    token_rows: npt.NDArray[np.int64]
    rows: slice
    start: int


@dataclass(slots=True)
class _Step:
    """What the operations of one step read and write."""

    token_ids: npt.NDArray[np.int64]  # [T]
    positions: npt.NDArray[np.float32]  # [T]
    last_rows: npt.NDArray[np.int64]  # [S]
    shares: list[_SequenceShare]
    values: list[FloatArray]
    spans: list[TokenSpan] = field(default_factory=list)  # of an encoder's step, which has no shares
    memory: KvBlocks | None = None  # an encoder has none


_Call = Callable[[_Step], None]


class NumpyBackend:
    """Reference backend on NumPy float32."""

    name = "numpy"
    binds_before_fork = True
    waits_for_weights = False  # it reads all of them when it binds

    def warm(self) -> None:
        """One small product, so that BLAS has its buffers."""
        np.ones((8, 8), np.float32) @ np.ones((8, 8), np.float32)

    def bind(self, plan: ModelPlan) -> BoundModel:
        """Convert the weights to float32 and prebind both programs.

        Raises:
            BackendError: a shape or dtype that does not fit; the message names the operation or tensor.
        """
        return NumpyModel(plan)

    def bind_encoder(self, plan: EncoderPlan) -> BoundEncoder:
        """Convert the weights to float32 and prebind the program.

        Raises:
            BackendError: see :meth:`bind`.
        """
        return NumpyEncoder(plan)


class NumpyModel(KvBlocksModel):
    """A model on the reference backend. Engine thread only."""

    def __init__(self, plan: ModelPlan) -> None:
        weights = [_convert_weight(tensor) for tensor in plan.tensors]
        self._num_values = {ProgramKind.PREFILL: plan.prefill.num_values, ProgramKind.DECODE: plan.decode.num_values}
        self._calls = {
            ProgramKind.PREFILL: _bind_program(plan.prefill, plan, weights),
            ProgramKind.DECODE: _bind_program(plan.decode, plan, weights),
        }
        self._blocks = KvBlocks(plan.num_layers, plan.num_kv_heads, plan.head_dim, plan.context_length)
        self._logits: FloatArray = np.empty((0, plan.vocab_size), np.float32)
        self._num_steps = 0
        self._num_tokens = 0

    def prepare_step(self, num_tokens: int) -> None:
        """Nothing: steps of every size are the same code."""

    def step(self, inputs: tuple[SequenceInput, ...]) -> None:
        """See :class:`~worker.backends.protocol.BoundModel`."""
        kind = ProgramKind.DECODE if all(len(i.token_ids) == 1 for i in inputs) else ProgramKind.PREFILL
        step = self._gather(inputs, self._num_values[kind])
        for call in self._calls[kind]:
            call(step)
        self._num_steps += 1
        self._num_tokens += len(step.token_ids)
        self._logits = step.values[-1]

    def logits(self) -> FloatArray:
        return self._logits

    def sample(self, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        return sample_rows(self._logits, rows)

    def statistics(self) -> Mapping[str, int]:
        return {
            "num_steps": self._num_steps,
            "num_tokens": self._num_tokens,
            "kv_resident_bytes": self._blocks.resident_bytes,
            "kv_spare_bytes": self._blocks.spare_bytes,
        }

    def close(self) -> None:
        self._calls.clear()  # with them every reference to a weight
        self._blocks.close()

    def _gather(self, inputs: tuple[SequenceInput, ...], num_values: int) -> _Step:
        shares: list[_SequenceShare] = []
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for item, runs in zip(inputs, self._blocks.find_runs(inputs), strict=True):
            first_row = len(token_ids)
            token_ids += item.token_ids
            positions += range(item.start, item.start + len(item.token_ids))
            shares.append(_SequenceShare(_list_rows(runs), slice(first_row, len(token_ids)), item.start))
            last_rows += range(len(token_ids) - item.num_logits, len(token_ids))
        empty: FloatArray = np.empty((0, 0), np.float32)
        return _Step(
            np.array(token_ids, np.int64),
            np.array(positions, np.float32),
            np.array(last_rows, np.int64),
            shares,
            [empty] * (num_values + 1),  # the extra one is the result
            memory=self._blocks,
        )


class NumpyEncoder:
    """An encoder on the reference backend. Engine thread only."""

    def __init__(self, plan: EncoderPlan) -> None:
        weights = [_convert_weight(tensor) for tensor in plan.tensors]
        self._num_values = plan.program.num_values
        self._calls = _bind_program(plan.program, plan, weights)
        self._num_steps = 0
        self._num_tokens = 0

    def encode(self, sequences: tuple[tuple[int, ...], ...]) -> FloatArray:
        """See :class:`~worker.backends.encoder_protocol.BoundEncoder`; the result is a fresh array."""
        token_ids, positions, spans = lay_out(sequences)
        empty: FloatArray = np.empty((0, 0), np.float32)
        step = _Step(
            np.array(token_ids, np.int64),
            np.array(positions, np.float32),
            np.empty(0, np.int64),
            [],
            [empty] * (self._num_values + 1),
            spans,
        )
        for call in self._calls:
            call(step)
        self._num_steps += 1
        self._num_tokens += len(token_ids)
        return step.values[-1]

    def prepare_step(self, num_tokens: int) -> None:
        """Nothing: steps of this backend need no preparation."""

    def statistics(self) -> Mapping[str, int]:
        return {"num_steps": self._num_steps, "num_tokens": self._num_tokens}

    def close(self) -> None:
        self._calls.clear()  # with them every reference to a weight


def _list_rows(runs: Runs) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(begin, end) for begin, end in runs])


def _planes_of(step: _Step, layer: int) -> tuple[FloatArray, FloatArray]:
    """Keys and values of a layer, views ``[kv heads, token rows, head_dim]``."""
    if step.memory is None:
        raise BackendError("an operation on the KV cache in a program that has none")
    planes = step.memory.layers[layer]
    return planes[: len(planes) // 2], planes[len(planes) // 2 :]


def _convert_weight(tensor: WeightTensor) -> FloatArray:
    data = tensor.data
    if tensor.block_type:
        return dequantise_blocks(data, tensor.block_type)
    if data.dtype == np.float32:
        return data
    if data.dtype == ml_dtypes.bfloat16:
        return data.astype(np.float32)
    if data.dtype == np.int8:
        if tensor.scale is None:
            raise BackendError(f"{tensor.name}: int8 weights need a scale for each output channel")
        return data.astype(np.float32) * tensor.scale.astype(np.float32)[:, None]
    if data.dtype == ml_dtypes.float8_e4m3fn and tensor.scale is not None:
        return data.astype(np.float32) * tensor.scale.astype(np.float32)[:, None]
    if data.dtype == np.float16:
        return data.astype(np.float32)
    if tensor.is_int4 and tensor.scale is not None:
        return unpack_int4(data, tensor.scale)
    raise BackendError(
        f"{tensor.name}: dtype {data.dtype}, or its scales are missing (this backend runs float32, bfloat16, float16, "
        "int8, fp8, int4 and GGUF's blocks)"
    )


def unpack_int4(data: npt.NDArray[np.uint8], scale: npt.NDArray[np.float16]) -> FloatArray:
    """``[N, K]`` float32 of ``data`` ``[N, K / 2]`` and ``scale`` ``[N, K / group]``."""
    codes = np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1).astype(np.float32) - np.float32(8)
    return codes * np.repeat(scale.astype(np.float32), codes.shape[1] // scale.shape[1], axis=1)


def _bind_program(program: Program, plan: ModelPlan | EncoderPlan, weights: list[FloatArray]) -> list[_Call]:
    infer_shapes(program, plan)
    calls: list[_Call] = []
    selected_rows = False
    for operation in program.operations:
        selected_rows |= operation.opcode in (Opcode.LAST_ROWS, Opcode.MEAN_POOL)
        tensors = [weights[handle] for handle in operation.tensors if handle != NO_TENSOR]
        calls.append(partial(_FUNCTIONS[operation.opcode], operation, tensors))
    if not selected_rows:
        calls.append(_select_result_rows)
    return calls


def _select_result_rows(step: _Step) -> None:
    step.values[-1] = step.values[-1][step.last_rows]


def _embed(operation: Operation, tensors: list[FloatArray], step: _Step) -> None:
    step.values[operation.out] = tensors[0][step.token_ids]  # [T, D]


def _normalise(rows: FloatArray, weight: FloatArray, epsilon: float) -> FloatArray:
    mean_square = np.mean(rows * rows, axis=-1, keepdims=True, dtype=np.float32)
    normalised: FloatArray = np.divide(rows, np.sqrt(mean_square + np.float32(epsilon)), dtype=np.float32)
    return normalised * weight


def _rms_norm(operation: Operation, tensors: list[FloatArray], step: _Step) -> None:
    source = step.values[operation.inputs[0]]
    step.values[operation.out] = _normalise(source, tensors[0], operation.floats[0])


def _linear(operation: Operation, tensors: list[FloatArray], step: _Step) -> None:
    product = step.values[operation.inputs[0]] @ tensors[0].T  # [T, N]
    step.values[operation.out] = product + tensors[1] if len(tensors) > 1 else product


def _split_heads(rows: FloatArray, column: int, num_heads: int, head_dim: int) -> FloatArray:
    """View of columns ``[column, column + num_heads * head_dim)`` as ``[T, heads, head_dim]``."""
    return rows[:, column : column + num_heads * head_dim].reshape(len(rows), num_heads, head_dim)


def _head_rms_norm(operation: Operation, tensors: list[FloatArray], step: _Step) -> None:
    column, num_heads, head_dim = operation.ints[:3]
    rows = step.values[operation.out]
    heads = _split_heads(rows, column, num_heads, head_dim)
    normalised = _normalise(heads, tensors[0], operation.floats[0])
    rows[:, column : column + num_heads * head_dim] = normalised.reshape(len(rows), -1)


def _rope(operation: Operation, tensors: list[FloatArray], step: _Step) -> None:
    """Rotary embedding, half-split pairs. Source: Su et al. 2021, arXiv:2104.09864, equation 34."""
    column, num_heads, head_dim = operation.ints[:3]
    angles = step.positions[:, None] * tensors[0]  # [T, head_dim / 2]
    scale = np.float32(operation.floats[0])
    cosine = (np.cos(angles) * scale)[:, None, :]
    sine = (np.sin(angles) * scale)[:, None, :]
    rows = step.values[operation.out]
    heads = _split_heads(rows, column, num_heads, head_dim)
    first, second = heads[..., : head_dim // 2], heads[..., head_dim // 2 :]
    rotated = np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    rows[:, column : column + num_heads * head_dim] = rotated.reshape(len(rows), -1)


def _kv_append(operation: Operation, _tensors: list[FloatArray], step: _Step) -> None:
    layer, key_column, value_column, num_heads, head_dim = operation.ints[:5]
    rows = step.values[operation.inputs[0]]
    keys = _split_heads(rows, key_column, num_heads, head_dim)
    values = _split_heads(rows, value_column, num_heads, head_dim)
    key_planes, value_planes = _planes_of(step, layer)
    for share in step.shares:
        new_rows = share.token_rows[share.start :]
        key_planes[:, new_rows] = keys[share.rows].transpose(1, 0, 2)
        value_planes[:, new_rows] = values[share.rows].transpose(1, 0, 2)


def _attention(operation: Operation, _tensors: list[FloatArray], step: _Step) -> None:
    layer, num_heads, num_kv_heads, head_dim, window_tokens = operation.ints[:5]
    queries = _split_heads(step.values[operation.inputs[0]], 0, num_heads, head_dim)
    result = np.empty_like(queries)  # [T, heads, head_dim]
    key_planes, value_planes = _planes_of(step, layer)
    for share in step.shares:
        visible = _causal_mask(share.start, len(share.token_rows), window_tokens)
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            keys = key_planes[kv_head, share.token_rows]
            scores = queries[share.rows, head] @ keys.T * np.float32(operation.floats[0])
            weights = _softmax(np.where(visible, scores, np.float32(-np.inf)))
            result[share.rows, head] = weights @ value_planes[kv_head, share.token_rows]
    step.values[operation.out] = result.reshape(len(result), num_heads * head_dim)


def _causal_mask(start: int, num_keys: int, window_tokens: int) -> npt.NDArray[np.bool_]:
    """Which keys ``[num_keys]`` each query at positions ``start`` on may see."""
    query_positions = np.arange(start, num_keys)[:, None]
    key_positions = np.arange(num_keys)[None, :]
    visible: npt.NDArray[np.bool_] = key_positions <= query_positions
    if window_tokens > 0:
        visible &= key_positions > query_positions - window_tokens
    return visible


def _softmax(scores: FloatArray) -> FloatArray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: FloatArray = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def _silu_mul(operation: Operation, _tensors: list[FloatArray], step: _Step) -> None:
    source = step.values[operation.inputs[0]]
    gate, up = source[:, : operation.ints[0]], source[:, operation.ints[0] :]
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then rightly 0
        sigmoid: FloatArray = np.reciprocal(1 + np.exp(-gate), dtype=np.float32)
    step.values[operation.out] = gate * sigmoid * up


def _add(operation: Operation, _tensors: list[FloatArray], step: _Step) -> None:
    step.values[operation.out] = step.values[operation.inputs[0]] + step.values[operation.inputs[1]]


def _last_rows(operation: Operation, _tensors: list[FloatArray], step: _Step) -> None:
    step.values[operation.out] = step.values[operation.inputs[0]][step.last_rows]


def _output(operation: Operation, _tensors: list[FloatArray], step: _Step) -> None:
    step.values[-1] = step.values[operation.inputs[0]]


_FUNCTIONS: Mapping[Opcode, Callable[[Operation, list[FloatArray], _Step], None]] = {
    Opcode.EMBED: _embed,
    Opcode.RMS_NORM: _rms_norm,
    Opcode.LINEAR: _linear,
    Opcode.HEAD_RMS_NORM: _head_rms_norm,
    Opcode.ROPE: _rope,
    Opcode.KV_APPEND: _kv_append,
    Opcode.ATTENTION: _attention,
    Opcode.SILU_MUL: _silu_mul,
    Opcode.ADD: _add,
    Opcode.LAST_ROWS: _last_rows,
    Opcode.OUTPUT: _output,
    **ENCODER_FUNCTIONS,
}
