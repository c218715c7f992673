"""A snapshot over the weights of another: other guest, other primed prefixes, the same weights blob.

The weights' reference is taken over as it is, so that store, sealed memory and page tables hold these bytes once,
however many snapshots name them.
"""

from __future__ import annotations

import math
import time

from snapshots.keyring import KeyRing
from snapshots.manifest import Manifest
from snapshots.store import SnapshotStore
from worker.build.errors import BuildError
from worker.build.further_sections import NO_SECTIONS, FurtherSections
from worker.build.guest_stage import stage_guest
from worker.build.priming import Priming
from worker.build.quantize import WeightFormat
from worker.build.report import BuildReport
from worker.build.snapshot_assembly import BuildOutput, StoredWeights, assemble_snapshot
from worker.build.stored_assets import read_assets
from worker.build.weight_layout import ROPE_TENSOR
from worker.tensor_names import SCALE_SUFFIX


def build_over_weights(
    donor_name: str,
    name: str,
    store: SnapshotStore,
    keyring: KeyRing,
    *,
    guest_wasm: bytes | None = None,
    priming: Priming | None = None,
    further: FurtherSections = NO_SECTIONS,
    encrypt: bool = False,
    with_verity: bool = False,
) -> BuildReport:
    """Build snapshot ``name`` over the weights of the snapshot ``donor_name``. Blocks; no weight is written.

    ``guest_wasm`` is initialised on the assets of the donor's guest; None: the llama guest that ships with glowplug.
    ``encrypt`` is for the other blobs: the weights stay as they are stored.

    Raises:
        BuildError: the donor keeps no assets, its weights would stay unencrypted, or the guest refuses the model.
        SnapshotError: the donor does not verify, or the store or the key ring refuses.
    """
    started_s = time.monotonic()
    donor = store.read_manifest(donor_name, keyring)
    if encrypt and donor.weights.encryption is None:
        raise BuildError(
            f"the weights of {donor_name!r} are not encrypted, and a snapshot over them shares their file: "
            "build it from its source with --encrypt"
        )
    is_encoder = donor.vector_size > 0
    further.validate_for(encodes=is_encoder)
    guest = stage_guest(guest_wasm, read_assets(donor, store, keyring), list_tensor_names(donor), encodes=is_encoder)
    weights = StoredWeights(donor.weights, donor.tensors, donor.card, donor.vector_size)
    output = BuildOutput(store, keyring, encrypt=encrypt, with_verity=with_verity)
    manifest = assemble_snapshot(name, weights, guest, output, further=further, priming=priming)
    names = set(list_tensor_names(donor))
    num_parameters = sum(
        math.prod(tensor.shape) * (2 if tensor.dtype == "U8" else 1)  # int4: two a byte
        for tensor in donor.tensors
        if tensor.name != ROPE_TENSOR and tensor.name in names
    )
    return BuildReport.of(
        manifest,
        weight_format=WeightFormat(donor.card.weight_format),
        num_parameters=num_parameters,
        wall_s=time.monotonic() - started_s,
    )


def list_tensor_names(manifest: Manifest) -> list[str]:
    """Names under which a guest may ask for the stored weights: all but the scales of quantised matrices."""
    names = {tensor.name for tensor in manifest.tensors if tensor.dtype in ("I8", "F8_E4M3", "U8")}
    scales = {name + SCALE_SUFFIX for name in names}
    return [tensor.name for tensor in manifest.tensors if tensor.name not in scales]
