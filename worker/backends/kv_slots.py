"""Memory for keys and values: one anonymous mapping a sequence, paged in by use, kept warm for the next one."""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np

from worker.backends.protocol import BackendError, FloatArray

#: Slots come in powers of two of this many tokens, so that a freed one fits the next request.
MIN_SLOT_TOKENS: Final = 256
#: Physical memory of freed slots kept for reuse, so that a new sequence takes no page faults. What is beyond goes
#: back to the system at once.
MAX_SPARE_BYTES: Final = 64 * 1024 * 1024


class KvSlot:
    """Keys and values of one sequence, float32.

    The mapping is ``[layers, 2, kv heads, capacity tokens, head_dim]``: a layer's keys lie before its values, and
    one head's keys are a plain matrix for BLAS. ``layers[i]`` is ``[2 * kv heads, capacity, head_dim]``; ``keys`` and
    ``values`` are ``[layers, kv heads, capacity, head_dim]``. All are views.
    """

    __slots__ = ("_memory", "capacity_tokens", "keys", "layers", "most_tokens", "num_tokens", "values")

    def __init__(self, capacity_tokens: int, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        shape = (num_layers, 2, num_kv_heads, capacity_tokens, head_dim)
        num_bytes = 4 * int(np.prod(shape))
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        both: FloatArray = np.frombuffer(self._memory, dtype=np.float32).reshape(shape)
        self.keys: FloatArray = both[:, 0]
        self.values: FloatArray = both[:, 1]
        self.layers: list[FloatArray] = list(both.reshape(num_layers, 2 * num_kv_heads, capacity_tokens, head_dim))
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        self.most_tokens = 0  # ever held, by this sequence or an earlier one

    def set_num_tokens(self, num_tokens: int) -> None:
        """Record that positions below ``num_tokens`` are written."""
        self.num_tokens = num_tokens
        self.most_tokens = max(self.most_tokens, num_tokens)

    def validate_append(self, start: int, num_tokens: int) -> None:
        """Check that ``num_tokens`` tokens may be written from position ``start`` on.

        Raises:
            BackendError: a gap before ``start``, nothing to write, or beyond the slot's capacity.
        """
        if num_tokens < 1 or start > self.num_tokens:
            raise BackendError(f"{num_tokens} tokens at position {start} of a slot that holds {self.num_tokens}")
        if start + num_tokens > self.capacity_tokens:
            raise BackendError(
                f"{num_tokens} tokens at position {start}: the slot was opened for {self.capacity_tokens}"
            )

    @property
    def resident_bytes(self) -> int:
        """Physical memory that the slot holds: what was ever written, in whole pages for each layer and head."""
        num_planes = len(self.layers) * len(self.layers[0])
        plane_bytes = self.most_tokens * self.layers[0].strides[1]
        return num_planes * -(-plane_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class KvSlots:
    """All slots of a bound model. Used by the engine thread only.

    Pages are taken by first use, 4 KiB each: with huge pages the first token of a short prompt would zero the
    whole slot, because every layer and head has its own stretch of it.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, context_length: int) -> None:
        self._shape = (num_layers, num_kv_heads, head_dim)
        self._context_length = context_length
        self._open: dict[int, KvSlot] = {}
        self._spare: list[KvSlot] = []
        self._next_slot = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        num_layers, num_kv_heads, head_dim = self._shape
        return 2 * num_layers * num_kv_heads * head_dim * 4

    def open(self, max_tokens: int) -> int:
        """Number of a slot for up to ``max_tokens`` tokens; a spare one where one is large enough.

        Raises:
            BackendError: more tokens than the model's context.
        """
        if not 0 < max_tokens <= self._context_length:
            raise BackendError(f"slot of {max_tokens} tokens: the context is {self._context_length} tokens")
        slot = self._take_spare(max_tokens) or KvSlot(self._choose_capacity(max_tokens), *self._shape)
        slot.num_tokens = 0
        number = self._next_slot
        self._next_slot += 1
        self._open[number] = slot
        return number

    def close(self, number: int) -> None:
        """Give a slot back; its memory stays mapped as a spare while spares are small. Idempotent."""
        slot = self._open.pop(number, None)
        if slot is None:
            return
        if self.spare_bytes + slot.resident_bytes <= MAX_SPARE_BYTES:
            self._spare.append(slot)

    def get(self, number: int) -> KvSlot:
        """The open slot ``number``.

        Raises:
            BackendError: no such slot is open.
        """
        try:
            return self._open[number]
        except KeyError:
            raise BackendError(f"KV slot {number} is not open") from None

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` tokens of one open slot to another.

        Raises:
            BackendError: ``source`` holds fewer tokens, or ``target`` is too small.
        """
        from_slot, to_slot = self.get(source), self.get(target)
        if num_tokens > from_slot.num_tokens or num_tokens > to_slot.capacity_tokens:
            raise BackendError(
                f"prefix of {num_tokens} tokens: the source holds {from_slot.num_tokens}, "
                f"the target has room for {to_slot.capacity_tokens}"
            )
        to_slot.keys[:, :, :num_tokens] = from_slot.keys[:, :, :num_tokens]
        to_slot.values[:, :, :num_tokens] = from_slot.values[:, :, :num_tokens]
        to_slot.set_num_tokens(num_tokens)

    def capture_prefix(self, number: int, num_tokens: int) -> FloatArray:
        """A copy of the first ``num_tokens`` tokens of an open slot, ``[layers, 2, kv heads, tokens, head_dim]``.

        Raises:
            BackendError: the slot holds fewer tokens.
        """
        slot = self.get(number)
        if num_tokens > slot.num_tokens:
            raise BackendError(f"prefix of {num_tokens} tokens: the slot holds {slot.num_tokens}")
        both: FloatArray = np.stack((slot.keys[:, :, :num_tokens], slot.values[:, :, :num_tokens]), axis=1)
        return both

    def restore_prefix(self, number: int, keys_values: FloatArray) -> None:
        """Copy what :meth:`capture_prefix` gave into an empty open slot.

        Raises:
            BackendError: of another model's shape, or more tokens than the slot was opened for.
        """
        slot = self.get(number)
        num_layers, num_kv_heads, head_dim = self._shape
        num_tokens = keys_values.shape[3] if keys_values.ndim == 5 else 0
        if keys_values.shape != (num_layers, 2, num_kv_heads, num_tokens, head_dim):
            raise BackendError(f"prefix of shape {keys_values.shape} for a model of {self._shape}")
        if num_tokens > slot.capacity_tokens:
            raise BackendError(f"prefix of {num_tokens} tokens: the slot has room for {slot.capacity_tokens}")
        slot.keys[:, :, :num_tokens] = keys_values[:, 0]
        slot.values[:, :, :num_tokens] = keys_values[:, 1]
        slot.set_num_tokens(num_tokens)

    def close_all(self) -> None:
        """Drop every slot and spare. A mapping ends with the last array that looks into it."""
        self._open.clear()
        self._spare.clear()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def open_bytes(self) -> int:
        """Physical bytes of open slots."""
        return sum(slot.resident_bytes for slot in self._open.values())

    @property
    def spare_bytes(self) -> int:
        """Physical bytes of spare slots."""
        return sum(slot.resident_bytes for slot in self._spare)

    def _choose_capacity(self, max_tokens: int) -> int:
        capacity = MIN_SLOT_TOKENS
        while capacity < max_tokens:
            capacity *= 2
        return min(capacity, max(self._context_length, 1))

    def _take_spare(self, max_tokens: int) -> KvSlot | None:
        fitting = [slot for slot in self._spare if slot.capacity_tokens >= max_tokens]
        if not fitting:
            return None
        smallest = min(fitting, key=lambda slot: slot.capacity_tokens)
        self._spare.remove(smallest)
        return smallest
