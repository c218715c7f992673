"""Importer of sentence-transformers folders of BERT-family encoders: config.json, safetensors, tokenizer.json, pooling.

What is not exactly the model that the embed guest runs is refused, so that no snapshot gives other vectors than its
model would: other architectures, activations, position embeddings, poolings, and modules behind the pooling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from guests.embed_assets import EncoderConfig, WordPieceSpec
from worker.build.errors import BuildError, MalformedModelError, UnsupportedModelError
from worker.build.safetensors_file import SafetensorsCheckpoint, read_capped, resolve_inside
from worker.build.source import BLOCK_BYTES, FloatArray, SourceTensor, TensorFile
from worker.build.wordpiece_import import read_wordpiece

MODEL_TYPE: Final = "bert"
#: Endings of tensors that are no weights of the encoder: a buffer, and the head of BERT's own training task.
IGNORED: Final = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")
MODULES: Final = {
    "sentence_transformers.models.Transformer",
    "sentence_transformers.models.Pooling",
    "sentence_transformers.models.Normalize",
}
#: Canonical name of each linear layer and norm of a layer, and the checkpoint's.
LAYER_PARTS: Final = (
    ("qkv", ("attention.self.query", "attention.self.key", "attention.self.value")),
    ("o", ("attention.output.dense",)),
    ("attn_norm", ("attention.output.LayerNorm",)),
    ("up", ("intermediate.dense",)),
    ("down", ("output.dense",)),
    ("mlp_norm", ("output.LayerNorm",)),
)


class _BertConfig(msgspec.Struct, frozen=True):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False


class _Module(msgspec.Struct, frozen=True):
    type: str
    path: str = ""


class _Pooling(msgspec.Struct, frozen=True):
    word_embedding_dimension: int
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False
    include_prompt: bool = True


class _SentenceConfig(msgspec.Struct, frozen=True):
    max_seq_length: int | None = None
    do_lower_case: bool = False


class _ModelType(msgspec.Struct, frozen=True):
    model_type: str = "(none)"


@dataclass(frozen=True, slots=True)
class ImportedEncoder:
    """An encoder, fully checked: what can be refused has been refused before one of these exists."""

    architecture: str
    config: EncoderConfig
    tokenizer: WordPieceSpec
    tensors: tuple[SourceTensor, ...]  # all weights under canonical names, in order of use


def is_encoder(folder: Path) -> bool:
    """Whether ``folder`` says that it holds a BERT-family encoder.

    Raises:
        MalformedModelError: its config.json is missing or damaged.
    """
    return bool(_read_json(folder, "config.json", _ModelType).model_type == MODEL_TYPE)


@contextmanager
def open_encoder(folder: Path) -> Iterator[ImportedEncoder]:
    """The encoder in ``folder``, checked; tensors can be read inside the ``with`` block.

    Raises:
        MalformedModelError: a file is missing, damaged, or outside the folder.
        UnsupportedModelError: a variant that the embed guest does not run.
    """
    with SafetensorsCheckpoint(folder, ignored=IGNORED) as checkpoint:
        try:
            config = _read_config(folder)
            tokenizer = read_wordpiece(read_capped(resolve_inside(folder, "tokenizer.json")), config.vocab_size)
            encoder = ImportedEncoder(MODEL_TYPE, config, tokenizer, _arrange(checkpoint, config))
        except BuildError as error:
            raise error if str(folder) in str(error) else type(error)(f"{folder}: {error}") from error
        yield encoder


def _read_config(folder: Path) -> EncoderConfig:
    bert: _BertConfig = _read_json(folder, "config.json", _BertConfig)
    if bert.hidden_act != "gelu":
        raise UnsupportedModelError(f"activation {bert.hidden_act!r}: only gelu, the exact one, is supported")
    if bert.position_embedding_type != "absolute" or bert.is_decoder:
        raise UnsupportedModelError(
            f"position embeddings {bert.position_embedding_type!r}, is_decoder {bert.is_decoder}: "
            "only encoders with absolute positions are supported"
        )
    if bert.num_attention_heads <= 0 or bert.hidden_size % bert.num_attention_heads:
        raise MalformedModelError(f"config.json: {bert.num_attention_heads} heads of {bert.hidden_size} columns")
    sentence: _SentenceConfig = _read_optional(folder, "sentence_bert_config.json", _SentenceConfig)
    longest = sentence.max_seq_length or bert.max_position_embeddings
    return EncoderConfig(
        num_layers=bert.num_hidden_layers,
        hidden_size=bert.hidden_size,
        intermediate_size=bert.intermediate_size,
        num_heads=bert.num_attention_heads,
        vocab_size=bert.vocab_size,
        num_positions=bert.max_position_embeddings,
        context_length=min(longest, bert.max_position_embeddings),
        layer_norm_eps=bert.layer_norm_eps,
        normalise=_read_pooling(folder, bert.hidden_size),
    )


def _read_pooling(folder: Path, hidden_size: int) -> bool:
    """Whether vectors are normalised; the pooling before that must be the mean.

    Raises:
        UnsupportedModelError: another pooling, or more than pooling and normalisation.
        MalformedModelError: the folder describes no pooling.
    """
    modules: list[_Module] = _read_json(folder, "modules.json", list[_Module])
    unknown = [module.type for module in modules if module.type not in MODULES]
    if unknown:
        raise UnsupportedModelError(f"modules.json: {unknown[0]!r} behind the encoder is not supported")
    kinds = [module.type.rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedModelError(
            f"modules.json lists {', '.join(kinds)}: expected Transformer, Pooling and perhaps Normalize"
        )
    pooling: _Pooling = _read_json(folder / modules[1].path, "config.json", _Pooling)
    chosen = [name for name in pooling.__struct_fields__ if name.startswith("pooling_mode") and getattr(pooling, name)]
    if chosen != ["pooling_mode_mean_tokens"]:
        raise UnsupportedModelError(f"pooling {', '.join(chosen) or 'none'}: only the mean of all tokens is supported")
    if pooling.word_embedding_dimension != hidden_size:
        raise MalformedModelError(
            f"the pooling is {pooling.word_embedding_dimension} wide and the encoder {hidden_size}: not of one model"
        )
    return kinds[2:] == ["Normalize"]


def _arrange(file: TensorFile, config: EncoderConfig) -> tuple[SourceTensor, ...]:
    """Canonical tensors in order of use, read from ``file`` when asked for.

    The first row of the token-type table, which every token of a single text gets, is added to the position table.

    Raises:
        MalformedModelError: a tensor is missing or has another shape than the configuration says.
        UnsupportedModelError: the file holds tensors that this architecture does not have.
    """
    prefix = "bert." if any(name.startswith("bert.") for name in file.names()) else ""
    hidden = config.hidden_size
    arranged = _Arranged(file, prefix)
    arranged.add("embed.weight", (config.vocab_size, hidden), "embeddings.word_embeddings.weight")
    arranged.add_positions("position.weight", (config.num_positions, hidden))
    arranged.add("embed_norm.weight", (hidden,), "embeddings.LayerNorm.weight")
    arranged.add("embed_norm.bias", (hidden,), "embeddings.LayerNorm.bias")
    widths = {"up": (config.intermediate_size, hidden), "down": (hidden, config.intermediate_size)}
    for index in range(config.num_layers):
        for ours, theirs in LAYER_PARTS:
            sources = [f"encoder.layer.{index}.{name}" for name in theirs]
            rows, columns = widths.get(ours, (hidden, hidden))
            shape = (rows,) if ours.endswith("norm") else (rows, columns)
            arranged.add(f"layers.{index}.{ours}.weight", shape, *(f"{name}.weight" for name in sources))
            arranged.add(f"layers.{index}.{ours}.bias", (rows,), *(f"{name}.bias" for name in sources))
    unknown = sorted(set(file.names()) - arranged.used)
    if unknown:
        raise UnsupportedModelError(f"tensors that a BERT encoder does not have: {', '.join(unknown[:3])}")
    return tuple(arranged.tensors)


class _Arranged:
    """Tensors under canonical names, as they are listed."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix
        self.tensors: list[SourceTensor] = []
        self.used: set[str] = set()

    def add(self, name: str, shape: tuple[int, ...], *sources: str) -> None:
        """A tensor made of one or more of the file's, each of ``shape``, one below the other."""
        names = [self._check(source, shape) for source in sources]
        file, num_rows = self._file, shape[0]

        def row_blocks() -> Iterator[FloatArray]:
            for source in names:
                yield from _read_blocks(file, source, num_rows, shape[1:])

        self.tensors.append(SourceTensor(name, (num_rows * len(names), *shape[1:]), row_blocks))

    def add_positions(self, name: str, shape: tuple[int, int]) -> None:
        """The position table with the first token type's row in each of its own."""
        table = self._check("embeddings.position_embeddings.weight", shape)
        types = self._prefix + "embeddings.token_type_embeddings.weight"
        num_types = self._file.shape(types)[0] if types in self._file.names() else 1
        self._check("embeddings.token_type_embeddings.weight", (num_types, shape[1]))
        file = self._file

        def row_blocks() -> Iterator[FloatArray]:
            first_type = file.read_rows(types, 0, 1)
            for block in _read_blocks(file, table, shape[0], shape[1:]):
                yield np.add(block, first_type, dtype=np.float32)

        self.tensors.append(SourceTensor(name, shape, row_blocks))

    def _check(self, name: str, shape: tuple[int, ...]) -> str:
        full = self._prefix + name
        if full not in self._file.names():
            raise MalformedModelError(f"tensor {full} is missing")
        if self._file.shape(full) != shape:
            raise MalformedModelError(
                f"tensor {full} has shape {self._file.shape(full)}: the configuration says {shape}"
            )
        self.used.add(full)
        return full


def _read_blocks(file: TensorFile, name: str, num_rows: int, rest: Sequence[int]) -> Iterator[FloatArray]:
    row_bytes = 4 * (rest[0] if rest else 1)
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield file.read_rows(name, start, min(start + step, num_rows))


def _read_json(folder: Path, name: str, kind: Any) -> Any:
    data = read_capped(resolve_inside(folder, name))
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedModelError(f"{folder / name}: {error}") from error


def _read_optional(folder: Path, name: str, kind: type[Any]) -> Any:
    return _read_json(folder, name, kind) if (folder / name).exists() else kind()
