"""Writes one blob into the store: digests while writing, and shows nothing until all of it is on disk."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from snapshots import chunks
from snapshots.errors import StoreError
from snapshots.manifest import MAX_BLOB_BYTES, BlobRef

TMP_PREFIX: Final = "writing-"
_FILE_MODE: Final = 0o444


class BlobFolder(Protocol):
    """Where finished blobs go (the store)."""

    def publish_blob(self, tmp_path: Path, ref: BlobRef) -> None:
        """Move the finished file to its address, durably."""


class BlobWriter:
    """A streaming writer; a context manager. A clean exit publishes the blob and sets :attr:`ref`; an exception
    removes the temporary file. The file is locked while written, so that a sweep can tell it from a leftover.
    """

    def __init__(self, tmp_folder: Path, store: BlobFolder, chunk_bytes: int) -> None:
        self._store = store
        self._chunk_bytes = chunk_bytes
        self._path = tmp_folder / f"{TMP_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        self._buffer = bytearray()
        self._digests = bytearray()
        self._size_bytes = 0
        self._ref: BlobRef | None = None
        self._fd = -1

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""
        return self._size_bytes

    @property
    def ref(self) -> BlobRef:
        """The published blob.

        Raises:
            StoreError: the writer has not been left cleanly yet.
        """
        if self._ref is None:
            raise StoreError("this blob is not finished: its reference exists after the `with` block ended cleanly")
        return self._ref

    def __enter__(self) -> Self:
        self._fd = create_locked_file(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as os_error:
            raise StoreError(f"cannot finish blob {self._path}: {os_error.strerror}") from os_error
        finally:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)  # gone already where it was published

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append ``data``; its length. Blocks on the disk.

        Raises:
            StoreError: the disk is full, or the blob would exceed MAX_BLOB_BYTES.
        """
        view = memoryview(data).cast("B")
        if self._size_bytes + len(view) > MAX_BLOB_BYTES:
            raise StoreError(f"blob larger than {MAX_BLOB_BYTES} bytes")
        self._digest(view)
        try:
            write_fully(self._fd, view)
        except OSError as error:
            raise StoreError(f"cannot write {len(view)} bytes to {self._path}: {error.strerror}") from error
        self._size_bytes += len(view)
        return len(view)

    def _digest(self, view: memoryview) -> None:
        """Digest whole chunks where they lie; only a chunk's remainder is copied to the buffer."""
        start = 0
        if self._buffer:
            start = min(self._chunk_bytes - len(self._buffer), len(view))
            self._buffer += view[:start]
            if len(self._buffer) < self._chunk_bytes:
                return
            self._digests += chunks.digest_chunk(self._buffer)
            self._buffer.clear()
        end = start + (len(view) - start) // self._chunk_bytes * self._chunk_bytes
        self._digests += chunks.digest_chunks(view[start:end], self._chunk_bytes)
        self._buffer += view[end:]

    def _publish(self) -> None:
        if self._buffer:
            self._digests += chunks.digest_chunk(self._buffer)
        if self._size_bytes == 0:
            raise StoreError("an empty blob cannot be stored: nothing was written")
        digests = bytes(self._digests)
        digest = chunks.digest_blob(self._size_bytes, self._chunk_bytes, digests)
        ref = BlobRef(digest, self._size_bytes, self._chunk_bytes, digests)
        os.fchmod(self._fd, _FILE_MODE)
        os.fsync(self._fd)
        self._store.publish_blob(self._path, ref)
        self._ref = ref


def create_locked_file(path: Path) -> int:
    """A new file, open for writing and locked by this descriptor.

    Raises:
        StoreError: it cannot be created.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreError(f"cannot create {path}: {error.strerror}") from error
    return fd


def write_fully(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; a short write goes on where it stopped."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
