"""What a build puts into a snapshot beside model and guest: tensors that the guest made, kernels, a post-processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from guests.component import compile_component
from guests.errors import GuestError
from snapshots.blob_reference import BlobRef
from snapshots.keyring import KeyRing
from snapshots.manifest import POST_PROCESSOR
from snapshots.store import SnapshotStore
from worker.build.errors import BuildError
from worker.build.guest_stage import StagedGuest, store_guest_tensors
from worker.build.kernel_files import KernelFile, read_kernel_file, store_kernels

MAX_COMPONENT_BYTES: Final = 128 << 20


@dataclass(frozen=True, slots=True)
class FurtherSections:
    """What was asked for. ``post_processor``: machine code of a Python guest."""

    kernels: tuple[KernelFile, ...] = ()
    post_processor: bytes | None = None

    def validate_for(self, *, encodes: bool) -> None:
        """Check that a model of this kind has a use for it.

        Raises:
            BuildError: an encoder writes no text.
        """
        if encodes and self.post_processor is not None:
            raise BuildError("an encoder writes no text that could be post-processed: build it without --postprocess")


#: Nothing was asked for.
NO_SECTIONS: Final = FurtherSections()


def read_further_sections(kernels: Sequence[Path], post_processor: Path | None) -> FurtherSections:
    """Read and check the files; a component is compiled, which takes seconds.

    Raises:
        BuildError: one of them is refused.
        OSError: one cannot be read.
    """
    code = None
    if post_processor is not None:
        with post_processor.open("rb") as file:
            component = file.read(MAX_COMPONENT_BYTES + 1)
        if len(component) > MAX_COMPONENT_BYTES:
            raise BuildError(f"{post_processor}: more than {MAX_COMPONENT_BYTES} bytes")
        try:
            code = compile_component(component)
        except GuestError as error:
            raise BuildError(f"{post_processor} is no post-processor: {error}") from error
    return FurtherSections(tuple(map(read_kernel_file, kernels)), code)


def store_further_sections(
    guest: StagedGuest,
    wanted: FurtherSections,
    store: SnapshotStore,
    *,
    encrypt_with: KeyRing | None,
    with_verity: bool,
) -> tuple[dict[str, BlobRef], dict[str, Any]]:
    """Store all of it: blobs by role, and the manifest's fields that go with them.

    Raises:
        SnapshotError: the store or the key ring refuses.
    """
    made, made_entries = store_guest_tensors(guest, store, encrypt_with=encrypt_with, with_verity=with_verity)
    images, image_entries = store_kernels(wanted.kernels, store, encrypt_with=encrypt_with, with_verity=with_verity)
    blobs = {**made, **images}
    if wanted.post_processor is not None:
        code = wanted.post_processor
        blobs[POST_PROCESSOR] = store.add_blob_bytes(code, encrypt_with=encrypt_with, with_verity=with_verity)
    return blobs, {"guest_tensors": made_entries, "kernels": image_entries}
