"""The assets that a snapshot's guest was initialised with, kept so that another guest can be put over its weights.

They are a blob of their own: a safetensors file whose tensors are the assets, bytes of type U8, named as the guest
asks for them. No worker maps it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from snapshots.blob_writer import BlobWriter
from snapshots.keyring import KeyRing
from snapshots.manifest import GUEST_ASSETS, Manifest
from snapshots.mapping import seal_blob
from snapshots.store import SnapshotStore
from snapshots.weights_file import TensorSpec, plan_weights, read_weights_header, write_weights
from worker.build.errors import BuildError


def write_assets(writer: BlobWriter, assets: Mapping[str, bytes]) -> None:
    """Write ``assets`` as the blob's content. None of them is empty."""
    layout = plan_weights([TensorSpec(name, "U8", (len(data),)) for name, data in assets.items()])
    write_weights(writer, layout, (np.frombuffer(data, np.uint8) for data in assets.values()))


def read_assets(manifest: Manifest, store: SnapshotStore, keyring: KeyRing) -> dict[str, bytes]:
    """The assets of a snapshot, verified.

    Raises:
        BuildError: the snapshot was built without them.
        SnapshotError: the blob is missing or corrupt.
    """
    ref = manifest.blobs.get(GUEST_ASSETS)
    if ref is None:
        raise BuildError(
            f"snapshot {manifest.name!r} does not hold its guest's assets: build it again from its source first"
        )
    sealed = seal_blob(store.blob_path(ref), ref, keyring=keyring)
    try:
        return {
            entry.name: os.pread(sealed.fd, entry.size_bytes, entry.offset) for entry in read_weights_header(sealed.fd)
        }
    finally:
        os.close(sealed.fd)
