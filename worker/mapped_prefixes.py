"""A snapshot's primed prefixes in a worker: views of sealed memory, found by token ids."""

from __future__ import annotations

import numpy as np

from snapshots.manifest import Manifest
from snapshots.mapping import MappedBytes, map_sealed
from worker.engine.prefixes import PrefixIndex, PrimedPrefixArray


class MappedPrefixes:
    """The index of a snapshot's prefixes and the mapping that its arrays look into; empty where there are none."""

    def __init__(self, manifest: Manifest, fd: int) -> None:
        """Map ``fd``, which stays the caller's. Nothing is read: pages come in when a prefix is adopted.

        Raises:
            MappingError: the snapshot has prefixes, and ``fd`` is not their sealed memory.
        """
        self.index = PrefixIndex()
        self._mapped: MappedBytes | None = None
        ref = manifest.primed_prefixes
        if ref is None:
            return
        mapped = self._mapped = map_sealed(fd, ref.size_bytes)
        shape = manifest.prefix_shape
        self.index = PrefixIndex(
            PrimedPrefixArray(
                prefix.unpack_token_ids(),
                mapped.array(np.float32, shape.array_shape(prefix.num_tokens), prefix.offset),
            )
            for prefix in manifest.prefixes
        )

    def set_inherited(self, inherited: bool) -> None:
        """Whether children forked from now on have this mapping.

        Raises:
            MappingError: the kernel refused.
        """
        if self._mapped is not None:
            self._mapped.set_inherited(inherited)

    def close(self) -> None:
        """Unmap. Idempotent.

        Requires: no array of the index is referenced elsewhere.

        Raises:
            MappingError: one is; the memory stays mapped.
        """
        self.index = PrefixIndex()
        if self._mapped is not None:
            self._mapped.close()
