"""Checks blob files against their references, every chunk, and says all that is wrong (not only the first)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from snapshots import chunks
from snapshots.errors import BlobCorrupt
from snapshots.manifest import BlobRef
from snapshots.regular_files import open_regular_file


class Problem(NamedTuple):
    """One thing that is wrong with a snapshot: where, and what."""

    where: str
    what: str


def open_blob_file(path: Path, ref: BlobRef, label: str) -> int:
    """A read-only descriptor of a blob's file, checked to be a regular file of the signed size. The caller closes.

    Raises:
        BlobCorrupt: missing, a symlink, not a regular file, or another size.
    """
    try:
        fd, status = open_regular_file(path)
    except OSError as error:
        raise BlobCorrupt(label, f"cannot open {path}: {error.strerror}") from error
    if status.st_size != ref.size_bytes:
        os.close(fd)
        raise BlobCorrupt(label, f"has {status.st_size} bytes, the manifest says {ref.size_bytes}")
    return fd


def verify_blobs(
    files: Sequence[tuple[str, Path, BlobRef]],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    num_threads: int | None = None,
) -> list[Problem]:
    """Problems of all ``(label, path, ref)``, in order; ``on_progress(done_bytes, total_bytes)`` per chunk. Blocks."""
    total_bytes = sum(ref.size_bytes for _, _, ref in files)
    problems: list[Problem] = []
    done_bytes = 0
    with ThreadPoolExecutor(num_threads or chunks.available_cores(), thread_name_prefix="verify") as pool:
        for label, path, ref in files:
            try:
                fd = open_blob_file(path, ref, label)
            except BlobCorrupt as error:
                problems.append(Problem(label, error.what))
                continue
            try:
                spans = list(chunks.iterate_chunks(ref.size_bytes, ref.chunk_bytes))
                digests = pool.map(lambda span, fd=fd: _digest_span(fd, *span), spans)
                for index, ((start, end), digest) in enumerate(zip(spans, digests, strict=True)):
                    if digest != ref.chunk_digest(index):
                        problems.append(
                            Problem(f"{label}, chunk {index} at byte {start}", "its bytes are not the signed ones")
                        )
                    done_bytes += end - start
                    if on_progress is not None:
                        on_progress(done_bytes, total_bytes)
            finally:
                os.close(fd)
    return problems


def verify_blob(path: Path, ref: BlobRef, label: str, *, num_threads: int | None = None) -> None:
    """Check one blob file on disk, for blobs that are kept but not used (what is used is verified in memory). Blocks.

    Raises:
        BlobCorrupt: missing, not regular, of another size, or a chunk differs.
    """
    os.close(open_blob_file(path, ref, label))  # its own errors say more than a finding does
    problems = verify_blobs([(label, path, ref)], num_threads=num_threads)
    if problems:
        raise BlobCorrupt(label, f"{problems[0].where.removeprefix(label + ', ')}: {problems[0].what}")


def _digest_span(fd: int, start: int, end: int) -> bytes:
    """Digest of bytes ``start`` to ``end``; a file that has shrunk since gives another digest, hence a problem."""
    parts = []
    while start < end and (part := os.pread(fd, end - start, start)):
        parts.append(part)
        start += len(part)
    return chunks.digest_chunk(parts[0] if len(parts) == 1 else b"".join(parts))
