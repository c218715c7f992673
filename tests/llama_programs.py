"""Builds the tensor programs of a Llama-family decoder in Python, so that backend and engine tests need no guest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from block_fixtures import random_blocks

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.llama_assets import LlamaConfig
from guests.program import Operation, Program, validate_program
from snapshots.block_types import BLOCK_TYPES, fits_blocks
from worker.backends.protocol import BoundModel, FloatArray, ModelPlan, SequenceInput, WeightTensor
from worker.build.quantize import quantize_groups_to_int4, quantize_rows_to_fp8

TINY = LlamaConfig(
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=96,
    context_length=128,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
)


@dataclass
class ProgramRecorder:
    """Records operations as a guest would; values and handles are numbered in order of first use."""

    kind: ProgramKind
    handles: dict[str, int]
    operations: list[Operation] = field(default_factory=list)
    num_values: int = 0

    def record(
        self,
        opcode: Opcode,
        *inputs: int,
        tensors: tuple[str, ...] = (),
        ints: tuple[int, ...] = (),
        floats: tuple[float, ...] = (),
        in_place: bool = False,
        has_result: bool = True,
    ) -> int:
        """Append one operation; the value it defines (NO_VALUE if none)."""
        out = inputs[0] if in_place else NO_VALUE
        if has_result and not in_place:
            out = self.num_values
            self.num_values += 1
        handles = [self.handles.setdefault(name, len(self.handles)) for name in tensors]
        self.operations.append(
            Operation(
                opcode,
                out,
                (*inputs, NO_VALUE, NO_VALUE)[:2],  # type: ignore[arg-type]  # two by construction
                (*handles, NO_TENSOR, NO_TENSOR, NO_TENSOR)[:3],  # type: ignore[arg-type]  # three
                (*ints, 0, 0, 0, 0, 0, 0)[:6],  # type: ignore[arg-type]  # six
                (*floats, 0.0, 0.0)[:2],  # type: ignore[arg-type]  # two
            )
        )
        return out

    def finish(self) -> Program:
        """The checked program."""
        program = Program(self.kind, self.num_values, tuple(self.operations))
        validate_program(program, num_tensors=len(self.handles))
        return program


def record_llama(config: LlamaConfig, kind: ProgramKind, handles: dict[str, int]) -> Program:
    """The program that the llama guest records for ``config``; new tensor names are added to ``handles``."""
    recorder = ProgramRecorder(kind, handles)
    hidden = recorder.record(Opcode.EMBED, tensors=("embed.weight",))
    for layer in range(config.num_layers):
        hidden = _record_attention(recorder, config, layer, hidden)
        hidden = _record_mlp(recorder, config, layer, hidden)
    last = recorder.record(Opcode.LAST_ROWS, hidden)
    normed = recorder.record(Opcode.RMS_NORM, last, tensors=("norm.weight",), floats=(config.rms_norm_eps,))
    head = "embed.weight" if config.tie_embeddings else "lm_head.weight"
    logits = recorder.record(Opcode.LINEAR, normed, tensors=(head,), ints=(config.vocab_size,))
    recorder.record(Opcode.OUTPUT, logits, has_result=False)
    return recorder.finish()


def _record_attention(recorder: ProgramRecorder, config: LlamaConfig, layer: int, hidden: int) -> int:
    name = f"layers.{layer}"
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    key_column, value_column = heads * head_dim, (heads + kv_heads) * head_dim
    eps = config.rms_norm_eps
    normed = recorder.record(Opcode.RMS_NORM, hidden, tensors=(f"{name}.attn_norm.weight",), floats=(eps,))
    qkv_tensors = (f"{name}.qkv.weight",) + ((f"{name}.qkv.bias",) if config.qkv_bias else ())
    qkv = recorder.record(Opcode.LINEAR, normed, tensors=qkv_tensors, ints=((heads + 2 * kv_heads) * head_dim,))
    for part, column, num_heads in (("q", 0, heads), ("k", key_column, kv_heads)):
        if config.qk_norm:
            weight = f"{name}.{part}_norm.weight"
            ints = (column, num_heads, head_dim)
            recorder.record(Opcode.HEAD_RMS_NORM, qkv, tensors=(weight,), ints=ints, floats=(eps,), in_place=True)
        recorder.record(
            Opcode.ROPE,
            qkv,
            tensors=("rope.inv_freq",),
            ints=(column, num_heads, head_dim),
            floats=(config.rope_scale,),
            in_place=True,
        )
    recorder.record(Opcode.KV_APPEND, qkv, ints=(layer, key_column, value_column, kv_heads, head_dim), has_result=False)
    window_tokens = config.sliding_window if layer >= config.sliding_window_from_layer else 0
    attended = recorder.record(
        Opcode.ATTENTION,
        qkv,
        ints=(layer, heads, kv_heads, head_dim, window_tokens),
        floats=(head_dim**-0.5,),
    )
    o_tensors = (f"{name}.o.weight",) + ((f"{name}.o.bias",) if config.output_bias else ())
    projected = recorder.record(Opcode.LINEAR, attended, tensors=o_tensors, ints=(config.hidden_size,))
    return recorder.record(Opcode.ADD, hidden, projected)


def _record_mlp(recorder: ProgramRecorder, config: LlamaConfig, layer: int, hidden: int) -> int:
    name = f"layers.{layer}"
    width = config.intermediate_size
    normed = recorder.record(
        Opcode.RMS_NORM, hidden, tensors=(f"{name}.mlp_norm.weight",), floats=(config.rms_norm_eps,)
    )
    gate_up = recorder.record(Opcode.LINEAR, normed, tensors=(f"{name}.gate_up.weight",), ints=(2 * width,))
    product = recorder.record(Opcode.SILU_MUL, gate_up, ints=(width,))
    down = recorder.record(Opcode.LINEAR, product, tensors=(f"{name}.down.weight",), ints=(config.hidden_size,))
    return recorder.record(Opcode.ADD, hidden, down)


def build_plan(config: LlamaConfig, weights: dict[str, WeightTensor]) -> ModelPlan:
    """A plan of ``weights`` (by canonical name) with both programs recorded."""
    handles: dict[str, int] = {}
    prefill = record_llama(config, ProgramKind.PREFILL, handles)
    decode = record_llama(config, ProgramKind.DECODE, handles)
    return ModelPlan(
        prefill=prefill,
        decode=decode,
        tensors=tuple(weights[name] for name in handles),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a model of ``config``, by canonical name."""
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    qkv_width = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "rope.inv_freq": (head_dim // 2,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        shapes |= {
            f"{name}.attn_norm.weight": (hidden,),
            f"{name}.qkv.weight": (qkv_width, hidden),
            f"{name}.o.weight": (hidden, config.num_heads * head_dim),
            f"{name}.mlp_norm.weight": (hidden,),
            f"{name}.gate_up.weight": (2 * width, hidden),
            f"{name}.down.weight": (hidden, width),
        }
        if config.qkv_bias:
            shapes[f"{name}.qkv.bias"] = (qkv_width,)
        if config.output_bias:
            shapes[f"{name}.o.bias"] = (hidden,)
        if config.qk_norm:
            shapes |= {f"{name}.q_norm.weight": (head_dim,), f"{name}.k_norm.weight": (head_dim,)}
    return shapes


def random_plan(config: LlamaConfig, *, dtype: str = "float32", seed: int = 0) -> ModelPlan:
    """A model of ``config`` with random weights; matrices stored as ``dtype`` (float32, bfloat16, int8,
    fp8, int4 or gguf, which ask for widths of a multiple of 32; gguf: each type of blocks that fits, in turn)."""
    rng = np.random.default_rng(seed)
    weights: dict[str, WeightTensor] = {}
    for name, shape in weight_shapes(config).items():
        if name == "rope.inv_freq":
            data = (10_000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32)
            weights[name] = WeightTensor(name, data)
        elif len(shape) == 1:
            centre = 0.0 if name.endswith("bias") else 1.0
            weights[name] = WeightTensor(name, rng.normal(centre, 0.1, shape).astype(np.float32))
        elif dtype == "gguf":
            types = [one for one in BLOCK_TYPES if fits_blocks(one, shape)]
            block_type = types[sum(bool(weight.block_type) for weight in weights.values()) % len(types)]
            blocks = random_blocks(rng, (shape[0], shape[1]), block_type, 1.5 * shape[1] ** -0.5)
            weights[name] = WeightTensor(name, blocks, block_type=block_type)
        else:
            matrix = rng.normal(0.0, 1.5 * shape[1] ** -0.5, shape).astype(np.float32)
            weights[name] = store_matrix(name, matrix, dtype)
    return build_plan(config, weights)


def store_matrix(name: str, matrix: npt.NDArray[np.float32], dtype: str) -> WeightTensor:
    """``matrix`` as a snapshot stores it."""
    if dtype == "int8":
        scale = np.abs(matrix).max(axis=1) / 127
        data: npt.NDArray[Any] = np.rint(matrix / scale[:, None]).astype(np.int8)
        return WeightTensor(name, data, scale.astype(np.float32))
    if dtype == "fp8":
        return WeightTensor(name, *quantize_rows_to_fp8(matrix))
    if dtype == "int4":
        return WeightTensor(name, *quantize_groups_to_int4(matrix))
    return WeightTensor(name, matrix.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32))


def compute_logits(bound: BoundModel, *inputs: SequenceInput) -> FloatArray:
    """Run one step; a copy of its logits ``[R, V]``."""
    bound.step(inputs)
    return bound.logits().copy()
