"""The guest's part of a build: initialise it on a model's assets, compile it, store what comes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from guests.abi import ProgramKind
from guests.compile import compile_guest
from guests.errors import GuestError
from guests.initialise import InitialisedGuest, initialise_guest
from guests.shipped import embed_wasm, llama_wasm
from snapshots.blob_reference import BlobRef
from snapshots.keyring import KeyRing
from snapshots.manifest import GUEST_ASSETS, GUEST_CWASM, GUEST_TENSORS, GUEST_WASM, Programs, TensorEntry
from snapshots.store import SnapshotStore
from snapshots.weights_file import TensorSpec, plan_weights, write_weights
from worker.build.errors import BuildError
from worker.build.stored_assets import write_assets


@dataclass(frozen=True, slots=True)
class StagedGuest:
    """A guest that is ready to be stored; nothing of it is in the store yet."""

    initialised: InitialisedGuest
    compiled: bytes
    assets: Mapping[str, bytes]

    @property
    def programs(self) -> Programs:
        """Its recorded programs."""
        recorded = self.initialised.programs
        return Programs(*(recorded.get(kind, b"") for kind in ProgramKind))


def stage_guest(
    wasm: bytes | None, assets: Mapping[str, bytes], tensor_names: Collection[str], *, encodes: bool = False
) -> StagedGuest:
    """Initialise ``wasm`` (None: the one of the guests llama and embed that fits) on ``assets`` and compile it. Blocks.

    ``encodes``: whether the model is an encoder.

    Raises:
        BuildError: the guest is refused, or refuses the model.
    """
    try:
        if wasm is None:
            wasm = embed_wasm() if encodes else llama_wasm()
        guest = initialise_guest(wasm, assets, tensor_names)
        needed = {ProgramKind.ENCODE} if encodes else {ProgramKind.PREFILL, ProgramKind.DECODE}
        missing = needed - guest.programs.keys()
        if missing:
            raise BuildError(f"the guest recorded no {' and no '.join(sorted(kind.name for kind in missing))} program")
        return StagedGuest(guest, compile_guest(guest.baked_wasm), assets)
    except GuestError as error:
        raise BuildError(f"the guest refuses this model: {error}") from error


def store_guest(
    guest: StagedGuest, store: SnapshotStore, *, encrypt_with: KeyRing | None, with_verity: bool
) -> dict[str, BlobRef]:
    """Store the compiled guest, its WebAssembly and its assets; their blobs by role.

    Raises:
        SnapshotError: the store or the key ring refuses.
    """
    with store.add_blob(encrypt_with=encrypt_with, with_verity=with_verity) as writer:
        write_assets(writer, guest.assets)
    baked = guest.initialised.baked_wasm
    return {
        GUEST_CWASM: store.add_blob_bytes(guest.compiled, encrypt_with=encrypt_with, with_verity=with_verity),
        GUEST_WASM: store.add_blob_bytes(baked, encrypt_with=encrypt_with, with_verity=with_verity),
        GUEST_ASSETS: writer.ref,
    }


def store_guest_tensors(
    guest: StagedGuest, store: SnapshotStore, *, encrypt_with: KeyRing | None, with_verity: bool
) -> tuple[dict[str, BlobRef], tuple[TensorEntry, ...]]:
    """Store the tensors that the guest made at init: their blob by role, and their entries; nothing where it made none.

    Raises:
        SnapshotError: the store or the key ring refuses.
    """
    tensors = guest.initialised.tensors
    if not tensors:
        return {}, ()
    layout = plan_weights([TensorSpec(tensor.name, tensor.dtype.name, tensor.shape) for tensor in tensors])
    with store.add_blob(encrypt_with=encrypt_with, with_verity=with_verity) as writer:
        write_weights(writer, layout, (np.frombuffer(tensor.data, np.uint8) for tensor in tensors))
    return {GUEST_TENSORS: writer.ref}, layout.entries
