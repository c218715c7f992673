"""A snapshot's post-processor in a worker: a Python guest, loaded from sealed memory before the fork, restored after.

Imported only for snapshots that have one: the component runtime takes 50 ms to import.
"""

from __future__ import annotations

from typing import Final

from guests.component import ComponentEngine, PostProcessor
from guests.runtime import MEBIBYTE, InstanceLimits
from snapshots.manifest import POST_PROCESSOR, Manifest
from snapshots.mapping import map_sealed
from worker.spawn_order import SpawnedFds

#: It runs between the steps of all sequences, on a line of text: a second is long.
LIMITS: Final = InstanceLimits(memory_bytes=256 * MEBIBYTE, result_bytes=4 * MEBIBYTE, call_deadline_ms=1_000)


class PreparedPostProcessor:
    """Its machine code, mapped. May be forked: no thread, no state. Closed by its owner."""

    def __init__(self, manifest: Manifest, fds: SpawnedFds) -> None:
        """``fds`` stay the caller's.

        Raises:
            MappingError: not sealed memory of the manifest's size.
            GuestIncompatible: compiled by another runtime.
        """
        fd = fds.find(POST_PROCESSOR, manifest.worker_roles)
        with map_sealed(fd, manifest.blobs[POST_PROCESSOR].size_bytes):  # checks seals and size
            self._engine = ComponentEngine()
            try:
                self._component = self._engine.load(f"/proc/self/fd/{fd}")
            except BaseException:
                self._engine.close()
                raise
        self._instance: PostProcessor | None = None

    def resume(self, seed: int) -> PostProcessor:
        """An instance of this worker's own; closed with this object. Starts a thread, for deadlines.

        Raises:
            GuestError: it cannot be resumed.
        """
        self._engine.start_ticker()
        self._instance = PostProcessor(self._engine, self._component, seed, LIMITS)
        return self._instance

    def close(self) -> None:
        """Free instance, code and engine. Idempotent."""
        if self._instance is not None:
            self._instance.close()
        self._component = None
        self._engine.close()
