"""How a chunk lies in a transport file: compressed, and for an encrypted blob compressed, then encrypted.

Ciphertext does not shrink, so an encrypted chunk is opened, compressed and encrypted again under a key of the export's
own (a fresh salt in its header: exports at two levels, or by two releases of zstd, are other bytes under other keys).
Import reverses that, verifies the plain bytes, and encrypts them as the signed manifest says; AES-GCM is a function of
key, nonce and content, so the blob's file comes out bit for bit.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import zstandard

from snapshots.blob_reference import TAG_BYTES
from snapshots.errors import TransportError
from snapshots.keyring import KeyRing
from snapshots.stored_chunks import StoredChunks
from snapshots.transport_format import FRAME, SEALED_MAGIC, Frame

if TYPE_CHECKING:  # cryptography is loaded only where a blob is encrypted: it costs a start 20 ms
    from snapshots.encryption import ChunkCipher


class ExportCiphers:
    """The export's cipher of each encrypted blob. ``salt`` is the file's; without one (version 1) there are none."""

    def __init__(self, blobs: list[StoredChunks], keyring: KeyRing, salt: bytes) -> None:
        """
        Raises:
            KeyRingError: the key of an encrypted blob is missing.
        """
        self._by_address: dict[str, ChunkCipher] = {}
        for stored in blobs:
            if salt and stored.ref.encryption is not None:
                from snapshots.encryption import open_export_cipher

                self._by_address[stored.ref.address] = open_export_cipher(stored.ref, salt, keyring)

    def of(self, stored: StoredChunks) -> ChunkCipher | None:
        """The cipher of a blob's frames, or none where they are plain zstd frames."""
        return self._by_address.get(stored.ref.address)


class ChunkPacker(threading.local):
    """Makes frames. One compressor a thread: they must not be shared, and one of a high level takes megabytes."""

    def __init__(self, level: int, ciphers: ExportCiphers) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._ciphers = ciphers

    def pack(self, work: tuple[int, StoredChunks, int]) -> tuple[bytes, int, int]:
        """Frame of a chunk of the open blob file, what the seek table says it unpacks to, and its stored size.

        The chunk is verified first.

        Raises:
            BlobCorrupt: it is not the signed one.
        """
        fd, stored, index = work
        stored_chunk = stored.read(fd, index)
        plain = stored.open(stored_chunk, index)
        cipher = self._ciphers.of(stored)
        if cipher is None:
            return self._compressor.compress(stored_chunk), len(stored_chunk), len(stored_chunk)
        sealed = cipher.encrypt(self._compressor.compress(plain), stored.ref.chunk_digest(index), index)
        return FRAME.pack(SEALED_MAGIC, len(sealed)) + sealed, 0, len(stored_chunk)


class ChunkUnpacker(threading.local):
    """Opens frames of one transport file. One decompressor a thread."""

    def __init__(self, fd: int, ciphers: ExportCiphers) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._fd = fd
        self._ciphers = ciphers

    def unpack(self, frame: Frame) -> tuple[Frame, bytes]:
        """A chunk in its stored form, verified. What the frame says of its size is checked before it is unpacked.

        Raises:
            TransportError: not a frame of this chunk.
            BlobCorrupt: its bytes are not the signed ones.
        """
        data = os.pread(self._fd, frame.compressed_bytes, frame.offset)
        place = f"blob {frame.stored.label}, chunk {frame.chunk} (frame at byte {frame.offset})"
        if len(data) != frame.compressed_bytes:
            raise TransportError(f"{place}: the file became shorter while it was read")
        cipher = self._ciphers.of(frame.stored)
        if cipher is None:
            stored_chunk = self._decompress(data, frame.content_bytes, place)
            frame.stored.open(stored_chunk, frame.chunk)
            return frame, stored_chunk
        plain = self._decompress(self._decrypt(cipher, data, frame, place), frame.content_bytes, place)
        return frame, frame.stored.store(plain, frame.chunk)

    def _decrypt(self, cipher: ChunkCipher, data: bytes, frame: Frame, place: str) -> bytearray:
        from snapshots.encryption import ChunkNotAuthentic

        if data[: FRAME.size] != FRAME.pack(SEALED_MAGIC, len(data) - FRAME.size):
            raise TransportError(f"{place}: not a frame with an encrypted chunk of {len(data) - FRAME.size} bytes")
        compressed = bytearray(len(data) - FRAME.size - TAG_BYTES)
        digest = frame.stored.ref.chunk_digest(frame.chunk)
        try:
            cipher.decrypt_into(memoryview(data)[FRAME.size :], digest, frame.chunk, compressed)
        except ChunkNotAuthentic:
            raise TransportError(
                f"{place}: its encrypted bytes are not those of this export, or were encrypted with another key under "
                f"the same id"
            ) from None
        return compressed

    def _decompress(self, data: bytes | bytearray, content_bytes: int, place: str) -> bytes:
        try:
            parameters = zstandard.get_frame_parameters(data)
            if parameters.content_size != content_bytes or parameters.dict_id != 0:
                raise TransportError(
                    f"{place}: says it unpacks to {parameters.content_size} bytes; the manifest says {content_bytes}"
                )
            content = self._decompressor.decompress(data, max_output_size=content_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise TransportError(f"{place}: {error}") from error
        if len(content) != content_bytes:
            raise TransportError(f"{place}: unpacks to {len(content)} bytes, expected {content_bytes}")
        return content
