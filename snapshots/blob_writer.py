"""Writes one blob into the store: digests while writing, and shows nothing until all of it is on disk."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

from snapshots import chunks
from snapshots.blob_reference import MAX_BLOB_BYTES, BlobEncryption, BlobRef
from snapshots.errors import StoreError, describe_disk_error
from snapshots.fs_verity import VerityHasher
from snapshots.keyring import KeyRing

if TYPE_CHECKING:  # cryptography is loaded only where a blob is encrypted
    from snapshots.encryption import BlobCipher

TMP_PREFIX: Final = "writing-"
_FILE_MODE: Final = 0o444


class BlobFolder(Protocol):
    """Where finished blobs go (the store)."""

    def publish_blob(self, tmp_path: Path, ref: BlobRef) -> None:
        """Move the finished file to its address, durably."""


class BlobFile:
    """A blob's file while it is written: temporary, and locked so that a sweep can tell it from a leftover. A context
    manager: what was not published when the block ends is removed.
    """

    def __init__(self, tmp_folder: Path, store: BlobFolder) -> None:
        self._store = store
        self._path = tmp_folder / f"{TMP_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd = create_locked_file(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1
        self._path.unlink(missing_ok=True)  # gone already where it was published

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``. Blocks on the disk.

        Raises:
            StoreError: the disk refused it.
        """
        try:
            write_fully(self._fd, data)
        except OSError as error:
            raise StoreError(f"cannot write {len(data)} bytes to {self._path}: {describe_disk_error(error)}") from error

    def sync(self) -> None:
        """Make what was written durable, still without a name.

        Raises:
            StoreError: the disk refused it.
        """
        try:
            os.fchmod(self._fd, _FILE_MODE)
            os.fsync(self._fd)
        except OSError as error:
            raise StoreError(f"cannot finish blob {self._path}: {describe_disk_error(error)}") from error

    def publish(self, ref: BlobRef) -> None:
        """Move the file, synced, to its address.

        Raises:
            StoreError: the disk refused it.
        """
        try:
            self._store.publish_blob(self._path, ref)
        except OSError as error:
            raise StoreError(f"cannot publish blob {self._path}: {describe_disk_error(error)}") from error


class BlobWriter:
    """A streaming writer; a context manager. A clean exit publishes the blob and sets :attr:`ref`; an exception
    removes the temporary file. ``encrypt_with`` encrypts chunk by chunk, so that no plain byte reaches the disk;
    ``with_verity`` computes the file's fs-verity digest.
    """

    def __init__(
        self,
        tmp_folder: Path,
        store: BlobFolder,
        chunk_bytes: int,
        *,
        encrypt_with: KeyRing | None = None,
        with_verity: bool = False,
    ) -> None:
        """
        Raises:
            KeyRingError: no key to encrypt with.
        """
        self._file = BlobFile(tmp_folder, store)
        self._chunk_bytes = chunk_bytes
        self._encryption: BlobEncryption | None = None
        self._cipher: BlobCipher | None = None
        if encrypt_with is not None:
            from snapshots.encryption import start_encryption

            self._encryption, self._cipher = start_encryption(encrypt_with)
        self._verity = VerityHasher() if with_verity else None
        self._buffer = bytearray()
        self._digests = bytearray()
        self._size_bytes = 0
        self._ref: BlobRef | None = None

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
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._file.__exit__(kind, error, trace)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append ``data``; its length. Blocks on the disk.

        Raises:
            StoreError: the disk is full, or the blob would exceed MAX_BLOB_BYTES.
        """
        view = memoryview(data).cast("B")
        if self._size_bytes + len(view) > MAX_BLOB_BYTES:
            raise StoreError(f"blob larger than {MAX_BLOB_BYTES} bytes")
        self._size_bytes += len(view)
        start = 0
        if self._buffer:
            start = min(self._chunk_bytes - len(self._buffer), len(view))
            self._buffer += view[:start]
            if len(self._buffer) < self._chunk_bytes:
                return len(view)
            self._take_chunks(memoryview(bytes(self._buffer)))
            self._buffer.clear()
        end = start + (len(view) - start) // self._chunk_bytes * self._chunk_bytes
        self._take_chunks(view[start:end])  # whole chunks where they lie; only a remainder is copied
        self._buffer += view[end:]
        return len(view)

    def _take_chunks(self, view: memoryview) -> None:
        """Digest chunks (the last may be shorter), encrypt them if need be, and write them."""
        first = len(self._digests) // chunks.DIGEST_BYTES
        digests = chunks.digest_chunks(view, self._chunk_bytes)
        self._digests += digests
        if self._cipher is None:
            self._write_stored(view)
            return
        for number, (start, end) in enumerate(chunks.iterate_chunks(len(view), self._chunk_bytes)):
            digest = digests[number * chunks.DIGEST_BYTES : (number + 1) * chunks.DIGEST_BYTES]
            self._write_stored(memoryview(self._cipher.encrypt(view[start:end], digest, first + number)))

    def _write_stored(self, stored: memoryview) -> None:
        self._file.write(stored)
        if self._verity is not None:
            self._verity.update(stored)

    def _publish(self) -> None:
        if self._buffer:
            self._take_chunks(memoryview(self._buffer))
        if self._size_bytes == 0:
            raise StoreError("an empty blob cannot be stored: nothing was written")
        digests = bytes(self._digests)
        digest = chunks.digest_blob(self._size_bytes, self._chunk_bytes, digests)
        verity = self._verity.hexdigest() if self._verity is not None else None
        ref = BlobRef(digest, self._size_bytes, self._chunk_bytes, digests, self._encryption, verity)
        self._file.sync()
        self._file.publish(ref)
        self._ref = ref


def create_locked_file(path: Path) -> int:
    """A new file, open for writing and locked by this descriptor.

    Raises:
        StoreError: it cannot be created, or locked.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"cannot create {path}: {describe_disk_error(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise StoreError(f"cannot lock {path}: {describe_disk_error(error)}") from error
    return fd


def write_fully(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; a short write goes on where it stopped."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
