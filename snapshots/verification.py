"""Checks blob files against their references, every chunk, and says all that is wrong (not only the first)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from snapshots import chunks
from snapshots.blob_reference import BlobRef
from snapshots.errors import BlobCorrupt, KeyRingError, StoreError
from snapshots.fs_verity import compare_verity, measure_verity
from snapshots.keyring import KeyRing
from snapshots.regular_files import open_regular_file
from snapshots.stored_chunks import StoredChunks


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
        raise BlobCorrupt(
            label, f"its file cannot be opened: {error.strerror}"
        ) from error  # no path: clients read this
    if status.st_size != ref.file_bytes:
        os.close(fd)
        raise BlobCorrupt(label, f"has {status.st_size} bytes, the manifest says {ref.file_bytes}")
    return fd


def verify_blobs(
    files: Sequence[tuple[str, Path, BlobRef]],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    keyring: KeyRing | None = None,
    num_threads: int | None = None,
) -> list[Problem]:
    """Problems of all ``(label, path, ref)``, in order; ``on_progress(done_bytes, total_bytes)`` per chunk. Blocks.

    ``keyring`` holds the keys of encrypted blobs. Memory: a chunk for each thread.
    """
    total_bytes = sum(ref.size_bytes for _, _, ref in files)
    problems: list[Problem] = []
    done_bytes = 0
    with ThreadPoolExecutor(num_threads or chunks.available_cores(), thread_name_prefix="verify") as pool:
        for label, path, ref in files:
            try:
                stored = StoredChunks(ref, label, keyring)
                fd = open_blob_file(path, ref, label)
            except BlobCorrupt as error:
                problems.append(Problem(label, error.what))
                continue
            except KeyRingError as error:
                problems.append(Problem(label, f"cannot be checked: {error}"))
                continue
            try:
                for found, num_bytes in pool.map(partial(_verify_chunk, stored, fd), stored):
                    problems += found
                    done_bytes += num_bytes
                    if on_progress is not None:
                        on_progress(done_bytes, total_bytes)
                problems += _verify_verity(fd, ref, label)
            finally:
                os.close(fd)
    return problems


def _verify_chunk(stored: StoredChunks, fd: int, index: int) -> tuple[list[Problem], int]:
    start, end = stored.plain_span(index)
    try:
        stored.open(stored.read(fd, index), index)
    except BlobCorrupt as error:
        return [Problem(f"{stored.label}, chunk {index} at byte {start}", error.what)], end - start
    except StoreError as error:
        return [Problem(f"{stored.label}, chunk {index} at byte {start}", str(error))], end - start
    return [], end - start


def _verify_verity(fd: int, ref: BlobRef, label: str) -> list[Problem]:
    """The kernel's digest of the file, where it has one, must be the signed one."""
    try:
        finding = compare_verity(measure_verity(fd), ref)
    except OSError:
        return []  # not offered here
    return [Problem(label, f"its fs-verity digest is {finding.detail}")] if finding.state == "differs" else []


def verify_blob(
    path: Path, ref: BlobRef, label: str, *, keyring: KeyRing | None = None, num_threads: int | None = None
) -> None:
    """Check one blob file on disk, for blobs that are kept but not used (what is used is verified in memory). Blocks.

    Raises:
        BlobCorrupt: missing, not regular, of another size, or a chunk differs.
    """
    os.close(open_blob_file(path, ref, label))  # its own errors say more than a finding does
    problems = verify_blobs([(label, path, ref)], keyring=keyring, num_threads=num_threads)
    if problems:
        raise BlobCorrupt(label, f"{problems[0].where.removeprefix(label + ', ')}: {problems[0].what}")
