"""What a device backend is: it binds a guest's tensor programs to weights and runs steps over KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from guests.program import Program
from snapshots.block_types import BLOCK_TYPES
from worker.backends.sampling_rows import SampledToken, SamplingRow

if TYPE_CHECKING:  # the encoder's protocol is made of the types here
    from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan

FloatArray = npt.NDArray[np.float32]
#: A snapshot's device code: images by kernel name, for the first of these architectures that has each.
ReadKernels = Callable[[tuple[str, ...]], dict[str, bytes]]

#: Tokens of one block of the KV cache. At a head width of 64, float32, one head's keys of a block are one 4 KiB page.
KV_BLOCK_TOKENS: Final = 16


class BackendError(Exception):
    """A program or weight that the backend cannot run; the message names the operation or tensor."""


class BackendLost(BackendError):
    """Nothing that this process asks of the device will succeed any more: the worker must end."""


class BackendFull(BackendError):
    """The device has no room for it now. What was there before is as it was."""


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """A weight where it lies in mapped memory; a view, never a copy.

    ``data`` has the stored shape; dtype float32, ml_dtypes.bfloat16, float16, int8, ml_dtypes.float8_e4m3fn, or uint8
    for two 4-bit weights a byte (the earlier one in the low half, value = bits - 8). ``scale`` belongs to the last
    three: [N] float32 of output channels for int8 and fp8, [N, K / group] float16 of neighbouring weights for 4 bits;
    value = stored value * scale. With ``block_type``, a name of snapshots.block_types, ``data`` is uint8
    ``[N, bytes of a row]``: GGUF's blocks as they lie in the file. ``wait_verified``, where there is one, must return
    before a byte of either is read: the memory is still being filled (reading it early ends the process).
    """

    name: str
    data: npt.NDArray[Any]
    scale: npt.NDArray[Any] | None = None
    wait_verified: Callable[[], None] | None = None
    block_type: str = ""

    @property
    def is_int4(self) -> bool:
        """Whether a byte of ``data`` holds two weights, with their scales elsewhere."""
        return self.data.dtype == np.uint8 and not self.block_type

    @property
    def shape(self) -> tuple[int, ...]:
        """What a program sees: ``[N, K]`` of a matrix, however it is stored."""
        stored = self.data.shape
        if self.block_type:
            block = BLOCK_TYPES[self.block_type]
            return (*stored[:-1], stored[-1] // block.num_bytes * block.num_weights)
        return (*stored[:-1], 2 * stored[-1]) if self.is_int4 else stored


@dataclass(frozen=True, slots=True)
class WeightBlob:
    """The memory that a plan's weights lie in, with its signed digests: what a device backend copies as a whole.

    ``chunk_digests`` are packed BLAKE3 digests, one for each ``chunk_bytes`` of ``data``. ``wait_verified(end)``, where
    there is one, must return before a byte below ``end`` is read.
    """

    data: npt.NDArray[np.uint8]
    chunk_bytes: int
    chunk_digests: bytes
    wait_verified: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """All that a backend needs to bind a model. ``tensors[h]`` is the weight behind handle h of the programs; ``blob``
    is where most of them lie, None: nowhere in particular."""

    prefill: Program
    decode: Program
    tensors: tuple[WeightTensor, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # tokens
    blob: WeightBlob | None = None


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One sequence's share of a step.

    ``block_table`` names its KV blocks in order of position (block ``i`` holds positions ``16 * i`` to
    ``16 * i + 15``) and covers all tokens of the share. A backend may remember what it found out about a table by the
    object's identity: a changed table is a new object. ``start`` is the position of ``token_ids[0]``; everything
    before it is in the blocks. The logits of the last ``num_logits`` tokens are rows of the step's result.
    """

    block_table: Sequence[int]
    start: int
    token_ids: tuple[int, ...]
    num_logits: int = 1


class BoundModel(Protocol):
    """A model bound to a device. Used by one thread, the engine's, which owns the numbers of the KV blocks: who may
    read and write which block is its business, the backend only keeps their memory."""

    @property
    def kv_block_bytes(self) -> int:
        """Device bytes of one KV block, all layers."""

    def prepare_step(self, num_tokens: int) -> None:
        """Do ahead what a first step of ``num_tokens`` tokens of one sequence would do before it computes."""

    def open_kv(self, num_blocks: int) -> None:
        """Make room for blocks 0 to ``num_blocks - 1``; once, before the first step, and never before a fork. On a CPU
        this is address space, paged in by first use.

        Raises:
            BackendError: opened before, or no room.
        """

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, ``(source, target)`` each."""

    def release_blocks(self, blocks: Sequence[int]) -> None:
        """The contents of these blocks are no longer needed: their memory may go back to the system."""

    def capture_prefix(self, block_table: Sequence[int], num_tokens: int) -> FloatArray:
        """Keys and values of a table's first ``num_tokens`` tokens as host memory, a copy: float32
        ``[layers, 2, kv heads, tokens, head_dim]``, keys rotated. The same for every backend."""

    def restore_prefix(self, block_table: Sequence[int], keys_values: FloatArray) -> None:
        """Fill the blocks of a table, from the first one's first token on, with what :meth:`capture_prefix` gave,
        perhaps in another process and on another backend. ``keys_values`` may be strided and read-only; it is copied.

        Raises:
            BackendError: of another model's shape, or more tokens than the table has room for.
        """

    def step(self, inputs: tuple[SequenceInput, ...]) -> None:
        """Run one step: writes each sequence's keys and values to its blocks. Its logits, ``num_logits`` rows for each
        input, in order, stay on the device until the next step.

        Raises:
            BackendError: no tokens, a table that does not cover them, or a sequence beyond the context.
        """

    def logits(self) -> FloatArray:
        """The logits of the latest step, ``[R, V]`` float32 on the host. The array is valid until the next step."""

    def sample(self, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token for each of ``rows``, in order, from the logits of the latest step. A row's token depends on
        its logits and its :class:`SamplingRow` alone, and several may name the same logits."""

    def statistics(self) -> Mapping[str, int]:
        """Counters, with units in their names."""

    def close(self) -> None:
        """Free device memory. Idempotent."""


@runtime_checkable
class Parkable(Protocol):
    """A bound model that can leave its device and come back. Requires of all: no sequence is running."""

    def park(self, *, keeps_kv: bool = False, locks_source: bool = True) -> None:
        """Return the device memory of weights, and of KV blocks unless they are kept; the weights' host copy stays, and
        is page-locked for the way back unless ``locks_source`` is off. Idempotent; asked again, it may still lock."""

    def unpark(self) -> None:
        """Begin to bring the weights back, verified (steps wait for what they need of them), with empty KV blocks
        where they were not kept.

        Raises:
            BackendFull: there is no room; still parked.
            BackendLost: the device failed.
        """

    def watch_kv(self, on_dropped: Callable[[], None]) -> None:
        """Have ``on_dropped`` called when the contents of all KV blocks are gone."""

    def read_free_bytes(self) -> int:
        """Device memory that no process has, as the driver counts."""


class Backend(Protocol):
    """A device kind.

    ``binds_before_fork``: :meth:`bind` and ``prepare_step`` touch no device and start no thread, so that a zygote may
    call them and its children go on with the result. :meth:`warm` is for the children alone.

    ``waits_for_weights``: it minds :attr:`WeightTensor.wait_verified`, so that it may have weights early. Else it is
    bound when all of them are verified.
    """

    name: str
    binds_before_fork: bool
    waits_for_weights: bool

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
