"""Bounds-checked access to a guest's linear memory."""

from __future__ import annotations

import ctypes
from ctypes import byref

from guests import binding
from guests.errors import GuestContractError


class GuestMemory:
    """Copies in and out of linear memory; no view of it ever leaves this class.

    The base never moves (4 GiB are reserved and the configuration forbids moving) and memory never shrinks, so both
    are read once, and the size again only when an access lies beyond the known one.
    """

    __slots__ = ("_base", "_context", "_memory", "_size_bytes")

    def __init__(self, context: int, memory: binding.Memory) -> None:
        self._context: int | None = context
        self._memory = memory
        self._base: int = binding.memory_data(context, byref(memory)) or 0
        self._size_bytes: int = binding.memory_data_size(context, byref(memory))

    def check(self, pointer: int, size: int) -> None:
        """Make sure that ``size`` bytes at ``pointer`` exist.

        Raises:
            GuestContractError: out of range, or the instance is gone.
        """
        if pointer < 0 or size < 0 or pointer + size > self._size_bytes:
            self._recheck(pointer, size)

    def read(self, pointer: int, size: int) -> bytes:
        """Copy of ``size`` bytes at ``pointer``.

        Raises:
            GuestContractError: out of range, or the instance is gone.
        """
        if pointer < 0 or size < 0 or pointer + size > self._size_bytes:
            self._recheck(pointer, size)
        return ctypes.string_at(self._base + pointer, size)

    def write(self, pointer: int, data: bytes) -> None:
        """Copy ``data`` to ``pointer``.

        Raises:
            GuestContractError: out of range, or the instance is gone.
        """
        if pointer < 0 or pointer + len(data) > self._size_bytes:
            self._recheck(pointer, len(data))
        ctypes.memmove(self._base + pointer, data, len(data))

    def size_bytes(self) -> int:
        """Current size."""
        if self._context is not None:
            self._size_bytes = binding.memory_data_size(self._context, byref(self._memory))
        return self._size_bytes

    def _recheck(self, pointer: int, size: int) -> None:
        if self._context is None:
            raise GuestContractError("the guest's memory is gone: its instance was closed")
        if pointer < 0 or size < 0 or pointer + size > self.size_bytes():
            raise GuestContractError(
                f"guest pointer {pointer:#x} with {size} bytes lies outside its memory of {self._size_bytes} bytes"
            )

    def close(self) -> None:
        """Forget the memory; every later access raises. Idempotent."""
        self._context, self._base, self._size_bytes = None, 0, 0
