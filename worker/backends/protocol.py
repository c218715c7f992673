"""What a device backend is: it binds a guest's tensor programs to weights and runs steps over KV slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from guests.program import Program

if TYPE_CHECKING:  # the encoder's protocol is made of the types here
    from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan

FloatArray = npt.NDArray[np.float32]


class BackendError(Exception):
    """A program or weight that the backend cannot run; the message names the operation or tensor."""


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """A weight where it lies in mapped memory; a view, never a copy.

    ``data`` has the stored shape; dtype float32, ml_dtypes.bfloat16, or int8. ``scale`` [N] float32 belongs to
    int8 weights (value = data * scale per output channel).
    """

    name: str
    data: npt.NDArray[Any]
    scale: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """All that a backend needs to bind a model. ``tensors[h]`` is the weight behind handle h of the programs."""

    prefill: Program
    decode: Program
    tensors: tuple[WeightTensor, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # tokens


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One sequence's share of a step.

    ``slot`` is its KV slot, ``start`` the position of ``token_ids[0]`` (= tokens already in the slot);
    ``wants_logits``: the last token's logits are a row of the step's result.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    wants_logits: bool = True


class BoundModel(Protocol):
    """A model bound to a device. Used by one thread, the engine's."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Device bytes that one token takes in a KV slot, all layers."""

    def prepare_step(self, num_tokens: int) -> None:
        """Do ahead what a first step of ``num_tokens`` tokens of one sequence would do before it computes."""

    def open_slot(self, max_tokens: int) -> int:
        """Reserve a KV slot for up to ``max_tokens`` tokens; its number. The caller keeps the budget."""

    def close_slot(self, slot: int) -> None:
        """Give a slot's memory back. Idempotent."""

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` tokens' keys and values of slot ``source`` into the empty slot ``target``."""

    def capture_prefix(self, slot: int, num_tokens: int) -> FloatArray:
        """Keys and values of a slot's first ``num_tokens`` tokens as host memory, a copy: float32
        ``[layers, 2, kv heads, tokens, head_dim]``, keys rotated. The same for every backend."""

    def restore_prefix(self, slot: int, keys_values: FloatArray) -> None:
        """Fill the empty slot ``slot`` with what :meth:`capture_prefix` gave, perhaps in another process and on
        another backend. ``keys_values`` may be strided and read-only; it is copied."""

    def step(self, inputs: tuple[SequenceInput, ...]) -> FloatArray:
        """Run one step: appends each sequence's keys and values to its slot and returns logits ``[S, V]``
        float32, one row per input with ``wants_logits``, in order. The array is valid until the next call.
        """

    def statistics(self) -> Mapping[str, int]:
        """Counters, with units in their names."""

    def close(self) -> None:
        """Free device memory. Idempotent."""


class Backend(Protocol):
    """A device kind.

    ``binds_before_fork``: :meth:`bind` and ``prepare_step`` touch no device and start no thread, so that a zygote may
    call them and its children go on with the result. :meth:`warm` is for the children alone.
    """

    name: str
    binds_before_fork: bool

    def warm(self) -> None:
        """No-op launch: create whatever the first real call would otherwise wait for (thread pool, context)."""

    def bind(self, plan: ModelPlan) -> BoundModel:
        """Bind ``plan``'s programs; no weight is copied.

        Raises:
            BackendError: an operation, dtype or shape that this backend cannot run.
        """

    def bind_encoder(self, plan: EncoderPlan) -> BoundEncoder:
        """Bind an encoder's program; no weight is copied.

        Raises:
            BackendError: see :meth:`bind`.
        """
