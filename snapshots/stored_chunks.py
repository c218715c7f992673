"""How a blob's chunks lie in its file: as they are, or encrypted with a tag behind each. The one place that knows."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from snapshots import chunks
from snapshots.blob_reference import TAG_BYTES, BlobRef
from snapshots.cold_reading import ColdReader
from snapshots.errors import BlobCorrupt, KeyRingError, StoreError
from snapshots.keyring import KeyRing

if TYPE_CHECKING:  # cryptography is loaded only where a blob is encrypted: it costs a start 20 ms
    from snapshots.encryption import BlobCipher

#: What reading into memory says where there is none.
_NO_MEMORY: Final = frozenset({errno.EFAULT, errno.ENOMEM})
NOT_SIGNED: Final = "its bytes are not the signed ones"
NOT_AUTHENTIC: Final = "its encrypted bytes are not those that the key holder wrote"


class StoredChunks:
    """Chunks of one blob in their stored form. ``label`` is for errors. Safe from any thread."""

    def __init__(self, ref: BlobRef, label: str, keyring: KeyRing | None = None) -> None:
        """
        Raises:
            KeyRingError: the blob is encrypted and ``keyring`` does not hold its key.
        """
        self.ref = ref
        self.label = label
        self._cipher = _open_cipher(ref, label, keyring)
        self._tag_bytes = 0 if self._cipher is None else TAG_BYTES

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.ref.num_chunks))

    def plain_span(self, index: int) -> tuple[int, int]:
        """First byte of chunk ``index`` and the byte behind it, of the blob."""
        start = index * self.ref.chunk_bytes
        return start, min(start + self.ref.chunk_bytes, self.ref.size_bytes)

    def stored_span(self, index: int) -> tuple[int, int]:
        """The same, of the file."""
        start, end = self.plain_span(index)
        return start + index * self._tag_bytes, end + (index + 1) * self._tag_bytes

    def read(self, fd: int, index: int) -> bytes:
        """Chunk ``index`` in its stored form, as it is in the file: not verified yet.

        Raises:
            BlobCorrupt: the file ends early.
            StoreError: the disk cannot read it.
        """
        start, end = self.stored_span(index)
        parts = []
        try:
            while start < end and (part := os.pread(fd, end - start, start)):
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise self._unreadable(index, error) from error
        if start < end:
            raise self.corrupt(index, "the file became shorter while it was read")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, fd: int, index: int, into: memoryview, cold: ColdReader | None = None) -> None:
        """Read chunk ``index``, decrypt it if need be, and verify its digest in ``into``, where it stays. ``cold``
        reads the same file past the page cache, where it can.

        Raises:
            BlobCorrupt: ``into`` then holds nothing of use.
            StoreError: the disk cannot read it.
            OSError: no memory behind ``into``.
        """
        if self._cipher is None:
            if cold is None or not cold.read(self.stored_span(index)[0], into):
                self._read_fully(fd, index, into)
        else:
            self._decrypt(self.read(fd, index), index, into)
        if chunks.digest_chunk(into) != self.ref.chunk_digest(index):
            raise self.corrupt(index, NOT_SIGNED)

    def open(self, stored: bytes, index: int) -> bytes | bytearray:
        """Plain, verified bytes of chunk ``index`` out of its stored form.

        Raises:
            BlobCorrupt: they are not the signed ones.
        """
        plain: bytes | bytearray = stored
        if self._cipher is not None:
            start, end = self.plain_span(index)
            plain = bytearray(end - start)
            self._decrypt(stored, index, memoryview(plain))
        if chunks.digest_chunk(plain) != self.ref.chunk_digest(index):
            raise self.corrupt(index, NOT_SIGNED)
        return plain

    def store(self, plain: bytes, index: int) -> bytes:
        """Stored form of chunk ``index``, from its plain bytes, which are verified first: only the content that was
        encrypted at the start may meet its key and nonce again, and then gives the same ciphertext.

        Raises:
            BlobCorrupt: they are not the signed ones.
        """
        if chunks.digest_chunk(plain) != self.ref.chunk_digest(index):
            raise self.corrupt(index, NOT_SIGNED)
        return plain if self._cipher is None else self._cipher.encrypt(plain, self.ref.chunk_digest(index), index)

    def corrupt(self, index: int, what: str) -> BlobCorrupt:
        """The error for chunk ``index``."""
        return BlobCorrupt(self.label, what, chunk=index, offset=self.plain_span(index)[0])

    def _unreadable(self, index: int, error: OSError) -> StoreError:
        place = f"chunk {index} at byte {self.plain_span(index)[0]}"
        return StoreError(f"blob {self.label}, {place} cannot be read: {error.strerror}; check the disk")

    def _decrypt(self, stored: bytes, index: int, into: memoryview) -> None:
        from snapshots.encryption import ChunkNotAuthentic

        assert self._cipher is not None
        try:
            self._cipher.decrypt_into(stored, self.ref.chunk_digest(index), index, into)
        except ChunkNotAuthentic:
            raise self.corrupt(index, NOT_AUTHENTIC) from None

    def _read_fully(self, fd: int, index: int, into: memoryview) -> None:
        # preadv rather than a copy in user space: when memory runs out it fails with EFAULT, where a store to a
        # mapping would be a SIGBUS.
        start, _ = self.stored_span(index)
        done = 0
        while done < len(into):
            try:
                count = os.preadv(fd, [into[done:]], start + done)
            except OSError as error:
                if error.errno in _NO_MEMORY:
                    raise
                raise self._unreadable(index, error) from error
            if count == 0:
                raise self.corrupt(index, "the file became shorter while it was read")
            done += count


def _open_cipher(ref: BlobRef, label: str, keyring: KeyRing | None) -> BlobCipher | None:
    if ref.encryption is None:
        return None
    if keyring is None:
        raise KeyRingError(f"blob {label} is encrypted with key {ref.encryption.key_id!r}, and no key ring is at hand")
    from snapshots.encryption import open_cipher

    return open_cipher(ref.encryption, keyring)
