"""How an agent seals and verifies blobs; the modules behind it are loaded once the agent is registered."""

from __future__ import annotations

from pathlib import Path

from snapshots.blob_reference import BlobRef
from snapshots.keyring import KeyRing
from snapshots.verification import verify_blob
from worker.sealed_cache import FillingFile, SealedFile


def seal_blob(keyring: KeyRing, path: Path, ref: BlobRef, label: str) -> SealedFile:
    """The verified bytes of a blob in sealed memory. Blocks."""
    # Imported late: it loads NumPy, without which an agent is registered 60 ms sooner.
    from snapshots.mapping import seal_blob

    return seal_blob(path, ref, label=label, keyring=keyring)


def begin_fill(keyring: KeyRing, limit_bytes_per_s: float, path: Path, ref: BlobRef, label: str) -> FillingFile:
    """A memory file that is being filled with verified bytes. Returns before it is full."""
    from snapshots.filling import FillingBlob  # as above: NumPy

    return FillingBlob(path, ref, label=label, keyring=keyring, limit_bytes_per_s=limit_bytes_per_s)


def verify_file(keyring: KeyRing, path: Path, ref: BlobRef, label: str) -> None:
    """Compare a blob on disk with its reference. Blocks."""
    verify_blob(path, ref, label, keyring=keyring)


def verify_sealed(fd: int, ref: BlobRef) -> None:
    """Compare sealed memory with its reference once more. Blocks."""
    from snapshots.mapping import verify_sealed  # as above: NumPy

    verify_sealed(fd, ref)


def load_sealing() -> None:
    """Import what the first sealing needs, in a thread, before it is needed."""
    import snapshots.filling  # noqa: F401
    import worker.jobs  # noqa: F401  # likewise: for the end of the first worker
