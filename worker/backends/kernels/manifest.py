"""What the shipped fatbin is: digests of it and its sources, architectures, what each kernel takes of a processor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from worker.backends.kernels.sources import KERNELS_FOLDER, compute_source_digest

FATBIN_NAME: Final = "kernels.fatbin"
MANIFEST_NAME: Final = "kernels.json"
FATBIN: Final = "fatbin"  # the architecture under which snapshots list one


class StaleKernelsError(Exception):
    """The fatbin is not what the manifest or the sources say; the message names the remedy."""


class KernelResources(msgspec.Struct, frozen=True):
    """What ptxas said of a kernel for one architecture."""

    registers: int
    stack_bytes: int
    spill_bytes: int


class KernelManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written beside the fatbin. ``architectures`` have machine code; ``ptx_architecture`` is compiled by the driver
    for what is newer. Digests are SHA-256 in hexadecimal."""

    compiler: str
    source_digest: str
    fatbin_digest: str
    architectures: tuple[int, ...]
    ptx_architecture: int
    resources: dict[str, dict[int, KernelResources]]  # by kernel, by architecture

    def describe_architectures(self) -> str:
        """``sm_80, sm_90 and PTX of compute_80``."""
        return ", ".join(f"sm_{a}" for a in self.architectures) + f" and PTX of compute_{self.ptx_architecture}"

    def runs_on(self, architecture: int) -> bool:
        """Whether a device of this compute capability (89 for 8.9) can run the fatbin: by machine code of its major
        version and at most its minor one, or by PTX. Source: CUDA C++ Programming Guide, "Binary Compatibility"."""
        binary = any(a // 10 == architecture // 10 and a <= architecture for a in self.architectures)
        return binary or architecture >= self.ptx_architecture

    def needs_driver_compiler(self, architecture: int) -> bool:
        """Whether such a device would have the driver compile the PTX, which takes seconds, once."""
        return not any(a // 10 == architecture // 10 and a <= architecture for a in self.architectures)


def name_in_snapshots(manifest: KernelManifest) -> str:
    """The name under which a snapshot holds the kernels of these sources: no worker takes those of others."""
    return f"glowplug-{manifest.source_digest[:16]}"


def load_manifest(folder: Path = KERNELS_FOLDER) -> KernelManifest:
    """The manifest in ``folder``.

    Raises:
        StaleKernelsError: it is missing or not a manifest.
    """
    path = folder / MANIFEST_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=KernelManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise StaleKernelsError(f"{path.name}: {error}; run `glowplug kernels build`") from error


def verify_kernels(folder: Path = KERNELS_FOLDER, *, source_digest: str | None = None) -> Path:
    """The fatbin in ``folder``, after its bytes and its sources were compared with the manifest. Reads about 1 MB.

    Raises:
        StaleKernelsError: the fatbin was changed, or built from other sources.
    """
    manifest = load_manifest(folder)
    path = folder / FATBIN_NAME
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StaleKernelsError(f"{path.name}: {error}; run `glowplug kernels build`") from error
    if found != manifest.fatbin_digest:
        raise StaleKernelsError(f"{path.name} has digest {found[:12]}, its manifest says {manifest.fatbin_digest[:12]}")
    expected = source_digest or compute_source_digest()
    if expected != manifest.source_digest:
        raise StaleKernelsError(
            f"{path.name} was built from sources {manifest.source_digest[:12]}, these are {expected[:12]}: "
            "run `glowplug kernels build`"
        )
    return path


def encode_manifest(manifest: KernelManifest) -> bytes:
    """JSON, one line for each kernel's resources."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
