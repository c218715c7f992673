"""From a checkpoint's tensors to canonical ones: names, fusion, order, and the undoing of GGUF's q/k permutation.

Canonical names (the guest asks for these): ``embed.weight``; for each layer ``attn_norm.weight``, ``qkv.weight``
(query rows, key rows, value rows), ``qkv.bias``, ``q_norm.weight``, ``k_norm.weight``, ``o.weight``, ``o.bias``,
``mlp_norm.weight``, ``gate_up.weight`` (gate rows first), ``gate_up.bias``, ``down.weight``, ``down.bias``;
``norm.weight``, ``lm_head.weight`` (absent when tied), ``rope.inv_freq``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from guests.llama_assets import LlamaConfig
from worker.build.errors import MalformedModelError, UnsupportedModelError
from worker.build.source import (
    BLOCK_BYTES,
    ByteArray,
    FloatArray,
    QuantisedFile,
    QuantisedRows,
    SourceTensor,
    TensorFile,
)

ROPE_TENSOR = "rope.inv_freq"
Rows = TypeVar("Rows", FloatArray, ByteArray)


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """How a file format names the tensors of a Llama-family decoder.

    ``layer`` is a format string with ``{i}`` that ends in a dot; the other layer fields follow it, without
    ``.weight`` or ``.bias``. ``interleaved_qk``: query and key rows lie in GGUF's order for the ``llama``
    architecture, where the two halves of a rotary pair are neighbours.
    """

    embed: str
    norm: str
    lm_head: str
    layer: str
    attn_norm: str
    q: str
    k: str
    v: str
    q_norm: str
    k_norm: str
    o: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    ignored: tuple[str, ...] = ()  # endings of tensors that carry no weight of the model
    interleaved_qk: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """A checkpoint tensor that is (a share of the rows of) a canonical one."""

    file_name: str
    shape: tuple[int, ...]
    head_rows: int = 0  # > 0: un-permute within heads of this many rows


@dataclass(slots=True)
class _Layout:
    """Canonical tensors in order, as they are listed."""

    tensors: list[tuple[str, list[_Part]]] = field(default_factory=list)

    def add(self, name: str, *parts: _Part) -> None:
        self.tensors.append((name, list(parts)))


def arrange_tensors(
    file: TensorFile, names: CheckpointNames, config: LlamaConfig, inv_freq: FloatArray
) -> tuple[SourceTensor, ...]:
    """Canonical tensors of ``config`` in order of use, read from ``file`` when asked for.

    Raises:
        MalformedModelError: a tensor is missing or has another shape than the configuration says.
        UnsupportedModelError: the file holds tensors that this architecture does not have.
    """
    layout = _Layout()
    embed_shape = (config.vocab_size, config.hidden_size)
    layout.add("embed.weight", _Part(names.embed + ".weight", embed_shape))
    for index in range(config.num_layers):
        _add_layer(layout, names, config, index)
    layout.add("norm.weight", _Part(names.norm + ".weight", (config.hidden_size,)))
    if not config.tie_embeddings:
        layout.add("lm_head.weight", _Part(names.lm_head + ".weight", embed_shape))
    parts = [part for _, parts in layout.tensors for part in parts]
    _check_parts(file, parts)
    _refuse_unknown(file, names, parts)
    rope = SourceTensor(ROPE_TENSOR, inv_freq.shape, lambda: iter((inv_freq,)))  # first: every step begins with it
    return (rope, *(_source_tensor(file, name, parts) for name, parts in layout.tensors))


def _add_layer(layout: _Layout, names: CheckpointNames, config: LlamaConfig, index: int) -> None:
    hidden, width = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix, ours = names.layer.format(i=index), f"layers.{index}."
    head_rows = config.head_dim if names.interleaved_qk else 0

    def weight(name: str, *shape: int, head_rows: int = 0) -> _Part:
        return _Part(f"{prefix}{name}.weight", shape, head_rows)

    def bias(name: str, rows: int, head_rows: int = 0) -> _Part:
        return _Part(f"{prefix}{name}.bias", (rows,), head_rows)

    layout.add(ours + "attn_norm.weight", weight(names.attn_norm, hidden))
    layout.add(
        ours + "qkv.weight",
        weight(names.q, q_rows, hidden, head_rows=head_rows),
        weight(names.k, kv_rows, hidden, head_rows=head_rows),
        weight(names.v, kv_rows, hidden),
    )
    if config.qkv_bias:
        layout.add(
            ours + "qkv.bias",
            bias(names.q, q_rows, head_rows),
            bias(names.k, kv_rows, head_rows),
            bias(names.v, kv_rows),
        )
    if config.qk_norm:
        layout.add(ours + "q_norm.weight", weight(names.q_norm, config.head_dim))
        layout.add(ours + "k_norm.weight", weight(names.k_norm, config.head_dim))
    layout.add(ours + "o.weight", weight(names.o, hidden, q_rows))
    if config.output_bias:
        layout.add(ours + "o.bias", bias(names.o, hidden))
    layout.add(ours + "mlp_norm.weight", weight(names.mlp_norm, hidden))
    layout.add(ours + "gate_up.weight", weight(names.gate, width, hidden), weight(names.up, width, hidden))
    if config.mlp_bias:
        layout.add(ours + "gate_up.bias", bias(names.gate, width), bias(names.up, width))
    layout.add(ours + "down.weight", weight(names.down, hidden, width))
    if config.mlp_bias:
        layout.add(ours + "down.bias", bias(names.down, hidden))


def _check_parts(file: TensorFile, parts: Iterable[_Part]) -> None:
    present = set(file.names())
    for part in parts:
        if part.file_name not in present:
            raise MalformedModelError(f"tensor {part.file_name} is missing")
        shape = file.shape(part.file_name)
        if shape != part.shape:
            raise MalformedModelError(f"tensor {part.file_name} has shape {shape}: the configuration says {part.shape}")


def _refuse_unknown(file: TensorFile, names: CheckpointNames, parts: Iterable[_Part]) -> None:
    """A tensor that we would not use means a model that computes something else than we would."""
    used = {part.file_name for part in parts}
    ignored = (*names.ignored, names.lm_head + ".weight")  # tied models may store the head a second time
    unknown = sorted(name for name in file.names() if name not in used and not name.endswith(ignored))
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UnsupportedModelError(
            f"{len(unknown)} tensors are no part of a dense Llama, Mistral, Qwen2 or Qwen3 decoder: {shown}"
        )


def _source_tensor(file: TensorFile, name: str, parts: list[_Part]) -> SourceTensor:
    rows = sum(part.shape[0] for part in parts)
    shape, quantised = (rows, *parts[0].shape[1:]), None
    if isinstance(file, QuantisedFile) and len(shape) == 2:
        types = frozenset(file.block_type(part.file_name) for part in parts)
        if types != {""}:
            quantised = QuantisedRows(types, partial(_read_parts, file.read_blocks, parts))
    return SourceTensor(name, shape, partial(_read_parts, file.read_rows, parts), quantised)


def _read_parts(read: Callable[[str, int, int], Rows], parts: list[_Part]) -> Iterator[Rows]:
    for part in parts:
        num_rows, row_bytes = part.shape[0], 4 * math.prod(part.shape[1:])
        unit = max(part.head_rows, 1)
        block_rows = max(BLOCK_BYTES // row_bytes // unit, 1) * unit
        for start in range(0, num_rows, block_rows):
            block = read(part.file_name, start, min(start + block_rows, num_rows))
            yield split_rotary_halves(block, part.head_rows) if part.head_rows else block


def split_rotary_halves(rows: Rows, head_rows: int) -> Rows:
    """Undo GGUF's permutation: within each head, from (pair, half) to (half, pair) order. A copy."""
    heads = rows.reshape(-1, head_rows // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)
