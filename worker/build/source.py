"""What an importer gives the snapshot builder: a model's shape, tokeniser and weights, whatever file they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from guests.llama_assets import LlamaConfig, TokenizerSpec
from worker.build.errors import MalformedModelError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

#: Rows of a matrix are read and converted in blocks of about this many float32 bytes, so memory stays bounded.
BLOCK_BYTES: Final = 32 * 1024 * 1024


#: Largest sizes accepted, by field of the configuration; well above any published dense model.
SIZE_LIMITS: Final = {
    "num_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
    "vocab_size": 1 << 22,
    "context_length": 1 << 26,
}


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """How the file itself stores a matrix in blocks of several weights.

    ``types`` are ggml's names, of all that was joined to the matrix. Where it is one, ``row_blocks`` gives the same
    rows as ``SourceTensor.row_blocks``, as they lie in the file: uint8 ``[rows, bytes of a row]``.
    """

    types: frozenset[str]
    row_blocks: Callable[[], Iterator[ByteArray]]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One weight under its canonical name, read when asked for.

    ``row_blocks`` gives consecutive float32 blocks of whole rows (of elements, for a vector) that make up
    ``shape``; each call starts again from the file.
    """

    name: str
    shape: tuple[int, ...]
    row_blocks: Callable[[], Iterator[FloatArray]]
    quantised: QuantisedRows | None = None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    def read(self) -> FloatArray:
        """The whole tensor, as a copy."""
        return np.concatenate(list(self.row_blocks())).reshape(self.shape)


class TensorFile(Protocol):
    """A checkpoint: named tensors that are read a few rows at a time."""

    def names(self) -> Sequence[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, outermost dimension first."""

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows ``start`` to ``stop`` (elements, for a vector) as float32, a copy.

        Raises:
            MalformedModelError: the bytes are not there.
        """


@runtime_checkable
class QuantisedFile(TensorFile, Protocol):
    """A checkpoint whose matrices may lie in blocks."""

    def block_type(self, name: str) -> str:
        """ggml's name of the type; empty: one number after the other."""

    def read_blocks(self, name: str, start: int, stop: int) -> ByteArray:
        """Rows ``start`` to ``stop`` of a matrix as they lie in the file, uint8 ``[rows, bytes of a row]``.

        Raises:
            MalformedModelError: the bytes are not there.
        """


@dataclass(frozen=True, slots=True)
class SpecialTexts:
    """Texts of tokens that chat templates name."""

    bos_token: str | None = None
    eos_token: str | None = None


class ModelSource(Protocol):
    """A model, fully checked: what can be refused has been refused before one of these exists."""

    @property
    def architecture(self) -> str:
        """The source's own name of the architecture, e.g. ``llama`` or ``qwen2``."""

    @property
    def config(self) -> LlamaConfig:
        """Shape of the decoder."""

    @property
    def tokenizer(self) -> TokenizerSpec:
        """The tokeniser; as many tokens as ``config.vocab_size``."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source, if the model has a chat template."""

    @property
    def special_texts(self) -> SpecialTexts:
        """Texts of special tokens."""

    @property
    def tensors(self) -> Sequence[SourceTensor]:
        """All weights under canonical names, in layer order (the order of use)."""


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """The one implementation of :class:`ModelSource`; importers differ in how they fill it."""

    architecture: str
    config: LlamaConfig
    tokenizer: TokenizerSpec
    chat_template: str | None
    special_texts: SpecialTexts
    tensors: tuple[SourceTensor, ...]


def validate_config(config: LlamaConfig) -> None:
    """Check that ``config`` can be a decoder at all, so that later arithmetic on it cannot go wrong.

    Raises:
        MalformedModelError: a size that is zero, negative, odd where it must be even, or beyond any known model.
    """
    for name, limit in SIZE_LIMITS.items():
        value = getattr(config, name)
        if not 0 < value <= limit:
            raise MalformedModelError(f"{name} is {value}: expected 1 to {limit}")
    if config.head_dim % 2 or config.num_heads % config.num_kv_heads:
        raise MalformedModelError(
            f"{config.num_heads} heads over {config.num_kv_heads} key/value heads of width {config.head_dim}: expected "
            "a whole number of query heads for each key/value head, and an even width"
        )
    if not 0 < config.rms_norm_eps < 1 or not math.isfinite(config.rope_scale):
        raise MalformedModelError(f"rms_norm_eps is {config.rms_norm_eps}: expected a small positive number")


#: What every importer offers: opens a path for the length of a ``with`` block.
OpenSource = Callable[[Path], AbstractContextManager[ModelSource]]
