"""Compiled device code that a build puts into a snapshot: fat binaries and cubins, checked by their first bytes.

A fat binary (``NAME.fatbin``) holds code for several architectures; it is listed under the architecture ``fatbin``, and
the driver chooses. A cubin is for one, which its file's name says: ``NAME.sm_90.cubin``. glowplug's own kernels
(``kernels.fatbin`` with ``kernels.json`` beside it, as ``glowplug kernels build --out`` leaves them) are named by their
sources, so that workers know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshots.blob_reference import BlobRef
from snapshots.keyring import KeyRing
from snapshots.manifest import KERNELS
from snapshots.sections import CompiledKernel, fill_up, plan_kernels
from snapshots.store import SnapshotStore
from worker.backends.kernels.manifest import (
    FATBIN,
    FATBIN_NAME,
    MANIFEST_NAME,
    StaleKernelsError,
    load_manifest,
    name_in_snapshots,
    verify_kernels,
)
from worker.build.errors import BuildError

MAX_KERNEL_BYTES: Final = 256 << 20  # of one file
CUBIN: Final = "cubin"
#: What files begin with. Source: fatbinary_section.h of the CUDA toolkit; System V ABI, ELF header.
MAGICS: Final = {FATBIN: b"\x50\xed\x55\xba", CUBIN: b"\x7fELF"}


@dataclass(frozen=True, slots=True)
class KernelFile:
    """A file's content, and what it is listed as."""

    name: str
    architecture: str
    data: bytes


def read_kernel_file(path: Path) -> KernelFile:
    """Read a ``.fatbin`` or ``.cubin``. Its code is not looked at: it runs with the rights of whoever signs it.

    Raises:
        BuildError: too large, or neither by its name or its first bytes.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in MAGICS:
        raise BuildError(f"{path}: expected NAME.fatbin, or NAME.sm_90.cubin with the architecture in its name")
    with path.open("rb") as file:
        data = file.read(MAX_KERNEL_BYTES + 1)
    if len(data) > MAX_KERNEL_BYTES:
        raise BuildError(f"{path}: more than {MAX_KERNEL_BYTES} bytes")
    if not data.startswith(MAGICS[kind]):
        raise BuildError(f"{path}: begins with {data[:4]!r}, a {kind} with {MAGICS[kind]!r}")
    name, architecture = path.stem, FATBIN
    if kind == CUBIN:
        name, _, architecture = path.stem.rpartition(".")
        if not name:
            raise BuildError(f"{path}: a cubin's name says its architecture, as in NAME.sm_90.cubin")
    own_manifest = path.with_name(MANIFEST_NAME)
    if path.name == FATBIN_NAME and own_manifest.exists():
        name = _name_own_kernels(path)
    return KernelFile(name, architecture, data)


def _name_own_kernels(path: Path) -> str:
    """
    Raises:
        BuildError: the file is not what its manifest says, or of other sources than this glowplug's.
    """
    try:
        return name_in_snapshots(load_manifest(verify_kernels(path.parent).parent))
    except StaleKernelsError as error:
        raise BuildError(f"{path}: {error}") from error


def store_kernels(
    kernels: Sequence[KernelFile], store: SnapshotStore, *, encrypt_with: KeyRing | None, with_verity: bool
) -> tuple[dict[str, BlobRef], tuple[CompiledKernel, ...]]:
    """Store ``kernels``: their blob by role, and their entries; nothing where there are none.

    Raises:
        SnapshotError: the store or the key ring refuses.
    """
    if not kernels:
        return {}, ()
    entries = plan_kernels((kernel.name, kernel.architecture, kernel.data) for kernel in kernels)
    with store.add_blob(encrypt_with=encrypt_with, with_verity=with_verity) as writer:
        for kernel in kernels:
            writer.write(memoryview(kernel.data))
            writer.write(memoryview(fill_up(len(kernel.data))))
    return {KERNELS: writer.ref}, tuple(entries)
