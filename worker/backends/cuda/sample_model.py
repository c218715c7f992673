"""Llama-shaped decoders of any size with made-up weights: what warm-up runs, and what ``gpu-check`` measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.program import Operation, Program
from snapshots.chunks import DEFAULT_CHUNK_BYTES, digest_chunks
from worker.backends.protocol import ModelPlan, WeightBlob, WeightTensor

_EPSILON: Final = 1e-5
_ALIGNMENT: Final = 4096  # of tensors, as a snapshot's writer has it
_DTYPES: Final[dict[str, Any]] = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
    "int4": np.uint8,  # int4: two a byte
}
_GROUP: Final = 32  # of int4


@dataclass(frozen=True, slots=True)
class SampleShape:
    """Sizes of a decoder. ``is_full``: with biases and norms of heads, so that it has every operation there is."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    is_full: bool = False

    @property
    def qkv_width(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


TINY: Final = SampleShape(1, 128, 2, 2, 64, 128, 64, 64, is_full=True)
#: The shapes of Llama 3.2 1B and Llama 3 8B, with output matrices of their own.
LLAMA_1B: Final = SampleShape(16, 2048, 32, 8, 64, 8192, 128_256, 8192)
LLAMA_8B: Final = SampleShape(32, 4096, 32, 8, 128, 14_336, 128_256, 8192)

#: Names and shapes of an operation's weights.
Weights = Sequence[tuple[str, tuple[int, ...]]]

#: Fills one tensor's array in place; the first argument is its name.
Fill = Callable[[str, npt.NDArray[Any]], None]


def make_sample_plan(
    shape: SampleShape, stored: str, fill: Fill | None = None, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> ModelPlan:
    """A plan of ``shape`` whose matrices are stored as ``stored`` (``f32``, ``bf16``, ``f16``, ``int8``, ``fp8`` or
    ``int4``), in one blob with digests. Without ``fill`` matrices are 0, so that nothing overflows. Cost: a write and a
    hash of all bytes."""
    recorder = _Recorder(shape)
    operations = recorder.record()
    layout = [_Stored.of(name, dims, stored) for name, dims in recorder.tensors.items()]
    starts = list(accumulate((-(-one.num_bytes // _ALIGNMENT) * _ALIGNMENT for one in layout), initial=0))
    data = np.zeros(starts.pop(), np.uint8)
    tensors = []
    for start, one in zip(starts, layout, strict=True):
        array = data[start : start + one.num_bytes].view(one.dtype).reshape(one.shape)
        if len(one.shape) == 1:
            array[...] = 0 if one.name.endswith("bias") else 1
        if fill is not None:
            fill(one.name, array)
        tensors.append(WeightTensor(one.name, array, one.scale))
    return ModelPlan(
        Program(ProgramKind.PREFILL, recorder.num_values, operations),
        Program(ProgramKind.DECODE, recorder.num_values, operations),
        tuple(tensors),
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        blob=WeightBlob(data, chunk_bytes, digest_chunks(data.data, chunk_bytes)),
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a weight lies in the blob; scales lie elsewhere."""

    name: str
    dtype: Any
    shape: tuple[int, ...]
    scale: npt.NDArray[Any] | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)

    @classmethod
    def of(cls, name: str, dims: tuple[int, ...], stored: str) -> _Stored:
        dtype = np.dtype(_DTYPES["f32" if len(dims) == 1 else stored])
        if dtype == np.uint8:
            rows, width = dims
            return cls(name, dtype, (rows, width // 2), np.full((rows, width // _GROUP), 0.01, np.float16))
        is_scaled = dtype.itemsize == 1
        return cls(name, dtype, dims, np.full(dims[0], 0.01, np.float32) if is_scaled else None)


class _Recorder:
    """Records the operations; ``tensors`` gets the shape of every weight, handles in order."""

    def __init__(self, shape: SampleShape) -> None:
        self._shape = shape
        self._operations: list[Operation] = []
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.num_values = 0

    def record(self) -> tuple[Operation, ...]:
        shape = self._shape
        hidden = self._emit(Opcode.EMBED, weights=[("embed", (shape.vocab_size, shape.hidden_size))])
        for layer in range(shape.num_layers):
            hidden = self._attend(layer, hidden)
            normed = self._norm(f"{layer}.mlp_norm", hidden)
            gate_up = self._linear(f"{layer}.gate_up", normed, 2 * shape.intermediate_size, shape.hidden_size)
            product = self._emit(Opcode.SILU_MUL, gate_up, ints=(shape.intermediate_size,))
            down = self._linear(f"{layer}.down", product, shape.hidden_size, shape.intermediate_size)
            hidden = self._emit(Opcode.ADD, hidden, down)
        last = self._norm("norm", self._emit(Opcode.LAST_ROWS, hidden))
        logits = self._linear("lm_head", last, shape.vocab_size, shape.hidden_size)
        self._emit(Opcode.OUTPUT, logits, out=NO_VALUE)
        return tuple(self._operations)

    def _attend(self, layer: int, hidden: int) -> int:
        shape = self._shape
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        key, value = heads * head_dim, (heads + kv_heads) * head_dim
        normed = self._norm(f"{layer}.norm", hidden)
        bias = [(f"{layer}.qkv.bias", (shape.qkv_width,))] if shape.is_full else []
        qkv = self._linear(f"{layer}.qkv", normed, shape.qkv_width, shape.hidden_size, bias)
        if shape.is_full:
            weights, ints = [(f"{layer}.head_norm", (head_dim,))], (0, heads, head_dim)
            self._emit(Opcode.HEAD_RMS_NORM, qkv, out=qkv, weights=weights, ints=ints, number=_EPSILON)
        frequencies = [("inverse_frequencies", (head_dim // 2,))]
        ints = (0, heads + kv_heads, head_dim)
        self._emit(Opcode.ROPE, qkv, out=qkv, weights=frequencies, ints=ints, number=1.0)
        self._emit(Opcode.KV_APPEND, qkv, out=NO_VALUE, ints=(layer, key, value, kv_heads, head_dim))
        scale = head_dim**-0.5
        attended = self._emit(Opcode.ATTENTION, qkv, ints=(layer, heads, kv_heads, head_dim, 0), number=scale)
        projected = self._linear(f"{layer}.o", attended, shape.hidden_size, heads * head_dim)
        return self._emit(Opcode.ADD, hidden, projected)

    def _norm(self, name: str, source: int) -> int:
        return self._emit(Opcode.RMS_NORM, source, weights=[(name, (self._shape.hidden_size,))], number=_EPSILON)

    def _linear(
        self,
        name: str,
        source: int,
        num_outputs: int,
        width: int,
        bias: Weights = (),
    ) -> int:
        weights: Weights = [(name, (num_outputs, width)), *bias]
        return self._emit(Opcode.LINEAR, source, weights=weights, ints=(num_outputs,))

    def _emit(
        self,
        opcode: Opcode,
        *inputs: int,
        out: int | None = None,
        weights: Weights = (),
        ints: tuple[int, ...] = (),
        number: float = 0.0,
    ) -> int:
        if out is None:
            out, self.num_values = self.num_values, self.num_values + 1
        handles = []
        for name, dims in weights:
            self.tensors.setdefault(name, dims)
            handles.append(list(self.tensors).index(name))
        first, second = (*inputs, NO_VALUE, NO_VALUE)[:2]
        one, two, three = (*handles, NO_TENSOR, NO_TENSOR, NO_TENSOR)[:3]
        a, b, c, d, e, f = (*ints, 0, 0, 0, 0, 0, 0)[:6]
        operation = Operation(opcode, out, (first, second), (one, two, three), (a, b, c, d, e, f), (number, 0.0))
        self._operations.append(operation)
        return out
