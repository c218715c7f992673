"""What every build ends with: the guest's blobs, further sections and primed prefixes join the weights, signed."""

from __future__ import annotations

from dataclasses import dataclass

from guests.compile import guest_identity
from snapshots.blob_reference import BlobRef
from snapshots.blob_writer import BlobWriter
from snapshots.keyring import KeyRing
from snapshots.manifest import WEIGHTS, Manifest, SnapshotCard, TensorEntry
from snapshots.store import SnapshotStore
from worker.build.further_sections import FurtherSections, store_further_sections
from worker.build.guest_stage import StagedGuest, store_guest
from worker.build.priming import Priming, prime_snapshot


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A weights blob in the store, just written or another snapshot's. ``vector_size`` is 0 but for encoders."""

    ref: BlobRef
    tensors: tuple[TensorEntry, ...]
    card: SnapshotCard
    vector_size: int


@dataclass(frozen=True, slots=True)
class BuildOutput:
    """Where a build's blobs go, and how. ``encrypt``: with the ring's newest encryption key."""

    store: SnapshotStore
    keyring: KeyRing
    encrypt: bool = False
    with_verity: bool = False

    @property
    def encrypt_with(self) -> KeyRing | None:
        return self.keyring if self.encrypt else None

    def add_blob(self) -> BlobWriter:
        """A writer of a new blob.

        Raises:
            SnapshotError: the disk or the key ring refuses.
        """
        return self.store.add_blob(encrypt_with=self.encrypt_with, with_verity=self.with_verity)


def assemble_snapshot(
    name: str,
    weights: StoredWeights,
    guest: StagedGuest,
    output: BuildOutput,
    *,
    further: FurtherSections,
    priming: Priming | None,
) -> Manifest:
    """Store what belongs to the snapshot besides its weights, and publish its manifest. Blocks.

    Raises:
        BuildError: what was to be primed cannot be.
        SnapshotError: the store or the key ring refuses.
    """
    store, keyring = output.store, output.keyring
    encrypt_with, with_verity = output.encrypt_with, output.with_verity
    blobs = store_guest(guest, store, encrypt_with=encrypt_with, with_verity=with_verity)
    others, sections = store_further_sections(guest, further, store, encrypt_with=encrypt_with, with_verity=with_verity)
    manifest = Manifest(
        name=name,
        created_at_s=store.choose_created_at_s(name),
        identity=guest_identity(),
        card=weights.card,
        blobs={WEIGHTS: weights.ref, **blobs, **others},
        tensors=weights.tensors,
        tensor_handles=guest.initialised.tensor_handles,
        programs=guest.programs,
        **sections,
        vector_size=weights.vector_size,
    )
    if priming is not None:
        manifest = prime_snapshot(manifest, store, keyring, priming, encrypt_with=encrypt_with, with_verity=with_verity)
    store.write_manifest(manifest, keyring)
    return manifest
