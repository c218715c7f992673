"""A snapshot's compiled kernels as a device backend gets them: out of sealed memory, checked against their digests."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from snapshots.errors import BlobCorrupt
from snapshots.manifest import KERNELS, Manifest
from snapshots.mapping import map_sealed
from worker.spawn_order import SpawnedFds


def read_kernels(manifest: Manifest, fds: SpawnedFds, architectures: tuple[str, ...]) -> dict[str, bytes]:
    """Images by kernel name, copies, for the first of ``architectures`` in which each is there; empty: none are.

    Raises:
        MappingError: the snapshot has kernels, and ``fds`` not their sealed memory.
        BlobCorrupt: an image is not the signed one.
    """
    ref = manifest.blobs.get(KERNELS)
    if ref is None:
        return {}
    images: dict[str, bytes] = {}
    with map_sealed(fds.find(KERNELS, manifest.worker_roles), ref.size_bytes) as mapped:
        for architecture in architectures:
            for kernel in manifest.kernels:
                if kernel.architecture != architecture or kernel.name in images:
                    continue
                data = mapped.array(np.uint8, (kernel.size_bytes,), kernel.offset).tobytes()
                if blake3(data).hexdigest() != kernel.digest:
                    raise BlobCorrupt(KERNELS, f"{kernel.name!r} for {architecture} is not the kernel that was signed")
                images[kernel.name] = data
    return images
