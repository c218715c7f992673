"""Compiled guests at run time: engine, module, instance.

Signatures first (the bodies follow in the next commit).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class InstanceLimits:
    """What one instance may take. ``call_deadline_ms`` counts only while the engine's ticker runs."""

    memory_bytes: int = 512 * MEBIBYTE
    table_elements: int = 65_536
    call_deadline_ms: int = 5_000


class GuestEngine:
    """Wasmtime engine with the pinned configuration. Created before fork; starts no thread by itself."""

    def load(self, path: str) -> GuestModule:
        """Map a compiled guest. ``path`` must be ``/proc/self/fd/N`` of a sealed, verified memory file.

        Raises:
            GuestIncompatible: made by another Wasmtime, configuration or CPU, or not a compiled module.
        """
        raise NotImplementedError

    def start_ticker(self) -> None:
        """Start the thread that makes call deadlines pass (10 ms resolution). Idempotent; after fork only."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the ticker and free the engine. Idempotent."""
        raise NotImplementedError


class GuestModule:
    """A compiled guest, ready to instantiate. Shareable between threads."""

    def instantiate(self, limits: InstanceLimits = InstanceLimits()) -> GuestInstance:  # noqa: B008  # frozen value
        """A fresh instance in the snapshotted state; the caller calls ``gp_resume``."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the module. Idempotent."""
        raise NotImplementedError


class GuestInstance:
    """One sandboxed instance. One thread at a time; dropped after any trap."""

    @property
    def is_closed(self) -> bool:
        """True after :meth:`close` or a trap."""
        raise NotImplementedError

    def call(self, name: str, *arguments: int) -> int:
        """Call an ABI export. Pointers and handles are unsigned."""
        raise NotImplementedError

    def read(self, pointer: int, size: int) -> bytes:
        """Copy of ``size`` bytes of guest memory, bounds-checked."""
        raise NotImplementedError

    def write(self, pointer: int, data: bytes) -> None:
        """Copy ``data`` into guest memory, bounds-checked."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the instance. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
