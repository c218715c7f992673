"""A decoder of a few kilobytes, with every operation that the GPU backend has kernels for: what warm-up runs."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.program import Operation, Program
from worker.backends.protocol import ModelPlan, WeightTensor

_HEADS, _HEAD_DIM, _VOCABULARY, _CONTEXT = 2, 64, 64, 64
_WIDTH: Final = _HEADS * _HEAD_DIM
_DTYPES: Final[dict[str, Any]] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "int8": np.int8}


def make_tiny_plan(stored: str) -> ModelPlan:
    """A plan whose matrices are stored as ``stored`` (``f32``, ``bf16``, ``f16`` or ``int8``); all weights are 0 or 1,
    so that nothing overflows."""
    tensors = (
        WeightTensor("norm", np.ones(_WIDTH, np.float32)),
        WeightTensor("head_norm", np.ones(_HEAD_DIM, np.float32)),
        WeightTensor("inverse_frequencies", np.ones(_HEAD_DIM // 2, np.float32)),
        WeightTensor("bias", np.zeros(3 * _WIDTH, np.float32)),
        _matrix("embed", _VOCABULARY, _WIDTH, stored),
        _matrix("qkv", 3 * _WIDTH, _WIDTH, stored),
        _matrix("o", _WIDTH, _WIDTH, stored),
        _matrix("gate_up", 2 * _WIDTH, _WIDTH, stored),
    )
    operations = _record()
    return ModelPlan(
        Program(ProgramKind.PREFILL, 12, operations),
        Program(ProgramKind.DECODE, 12, operations),
        tensors,
        num_layers=1,
        num_kv_heads=_HEADS,
        head_dim=_HEAD_DIM,
        vocab_size=_VOCABULARY,
        context_length=_CONTEXT,
    )


def _matrix(name: str, num_rows: int, width: int, stored: str) -> WeightTensor:
    data: npt.NDArray[Any] = np.zeros((num_rows, width), _DTYPES[stored])
    return WeightTensor(name, data, np.ones(num_rows, np.float32) if stored == "int8" else None)


def _record() -> tuple[Operation, ...]:
    norm, head_norm, frequencies, bias, embed, qkv, o, gate_up = range(8)
    epsilon = 1e-5

    def make(
        opcode: Opcode,
        out: int,
        *inputs: int,
        tensors: tuple[int, ...] = (),
        ints: tuple[int, ...] = (),
        x: float = 0.0,
    ) -> Operation:
        first, second = (*inputs, NO_VALUE, NO_VALUE)[:2]
        one, two, three = (*tensors, NO_TENSOR, NO_TENSOR, NO_TENSOR)[:3]
        a, b, c, d, e, f = (*ints, 0, 0, 0, 0, 0, 0)[:6]
        return Operation(opcode, out, (first, second), (one, two, three), (a, b, c, d, e, f), (x, 0.0))

    key, value = _WIDTH, 2 * _WIDTH
    return (
        make(Opcode.EMBED, 0, tensors=(embed,)),
        make(Opcode.RMS_NORM, 1, 0, tensors=(norm,), x=epsilon),
        make(Opcode.LINEAR, 2, 1, tensors=(qkv, bias), ints=(3 * _WIDTH,)),
        make(Opcode.HEAD_RMS_NORM, 2, 2, tensors=(head_norm,), ints=(0, _HEADS, _HEAD_DIM), x=epsilon),
        make(Opcode.ROPE, 2, 2, tensors=(frequencies,), ints=(0, 2 * _HEADS, _HEAD_DIM), x=1.0),
        make(Opcode.KV_APPEND, NO_VALUE, 2, ints=(0, key, value, _HEADS, _HEAD_DIM)),
        make(Opcode.ATTENTION, 3, 2, ints=(0, _HEADS, _HEADS, _HEAD_DIM, 0), x=0.125),
        make(Opcode.LINEAR, 4, 3, tensors=(o,), ints=(_WIDTH,)),
        make(Opcode.ADD, 5, 0, 4),
        make(Opcode.LINEAR, 6, 1, tensors=(gate_up,), ints=(2 * _WIDTH,)),
        make(Opcode.SILU_MUL, 7, 6, ints=(_WIDTH,)),
        make(Opcode.LINEAR, 8, 7, tensors=(o,), ints=(_WIDTH,)),
        make(Opcode.ADD, 9, 8, 5),
        make(Opcode.LAST_ROWS, 10, 9),
        make(Opcode.LINEAR, 11, 10, tensors=(embed,), ints=(_VOCABULARY,)),
        make(Opcode.OUTPUT, NO_VALUE, 11),
    )
