"""Framing of a transport file: a snapshot in one file, compressed chunk by chunk (byte table: FORMAT.md).

It is a zstd file in the seekable format: a skippable frame with our header and the signed manifest, one frame a chunk,
and a skippable frame with the seek table. So any zstd reader can decompress it (to the blobs, one behind the other),
and any reader of the seekable format finds a chunk without those before it. Where a blob is encrypted, the file has
version 2: a salt in the header, and each chunk of such a blob, compressed and encrypted, in a skippable frame.

Source: RFC 8878 for frames; contrib/seekable_format/zstd_seekable_compression_format.md of the zstd repository.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from snapshots.blob_reference import SALT_BYTES, TAG_BYTES, BlobRef
from snapshots.errors import TransportError
from snapshots.manifest import MAX_MANIFEST_BYTES, Manifest
from snapshots.stored_chunks import StoredChunks

MAGIC: Final = b"\x89GPXPRT\n"
PLAIN_VERSION: Final = 1
ENCRYPTED_VERSION: Final = 2
SKIPPABLE_MAGIC: Final = 0x184D2A50
SEALED_MAGIC: Final = 0x184D2A51  # a skippable frame too
TABLE_MAGIC: Final = 0x184D2A5E
FOOTER_MAGIC: Final = 0x8F92EAB1
FRAME: Final = struct.Struct("<II")  # magic, payload bytes
HEADER: Final = struct.Struct("<8sHHI")  # magic, version, reserved (0), manifest bytes
ENTRY: Final = struct.Struct("<II")  # compressed bytes, decompressed bytes
FOOTER: Final = struct.Struct("<IBI")  # frames, descriptor (0: no checksums), magic
MIN_MANIFEST_BYTES: Final = 48
#: A zstd frame is at most this much larger than its content: its header, and 3 bytes for each block of 128 KiB.
FRAME_OVERHEAD_BYTES: Final = 32


class Header(NamedTuple):
    """The first frame: the manifest's container file, not verified yet, and the salt (empty in version 1)."""

    container: bytes
    salt: bytes

    @property
    def frame_bytes(self) -> int:
        return FRAME.size + HEADER.size + len(self.salt) + len(self.container)


class Frame(NamedTuple):
    """One chunk's frame: which chunk it is, where the frame lies in the file, and what it is to unpack to."""

    stored: StoredChunks
    chunk: int
    offset: int
    compressed_bytes: int
    content_bytes: int


def list_blobs(manifest: Manifest) -> list[tuple[str, BlobRef]]:
    """(role, blob) in file order: by role, each blob once however many roles it has."""
    by_address: dict[str, tuple[str, BlobRef]] = {}
    for role, ref in sorted(manifest.blobs.items()):
        by_address.setdefault(ref.address, (role, ref))
    return list(by_address.values())


def list_chunks(blobs: list[StoredChunks]) -> Iterator[tuple[StoredChunks, int]]:
    """Every chunk of every blob, in file order."""
    for stored in blobs:
        for index in stored:
            yield stored, index


def max_frame_bytes(content_bytes: int) -> int:
    """Upper bound of a zstd frame's size."""
    return content_bytes + (content_bytes >> 7) + FRAME_OVERHEAD_BYTES


def pack_header(container: bytes, salt: bytes = b"") -> bytes:
    """The first frame: our header, the salt of a file with encrypted blobs, and the manifest's container file."""
    version = ENCRYPTED_VERSION if salt else PLAIN_VERSION
    payload = HEADER.pack(MAGIC, version, 0, len(container)) + salt + container
    return FRAME.pack(SKIPPABLE_MAGIC, len(payload)) + payload


def pack_seek_table(entries: list[tuple[int, int]]) -> bytes:
    """The last frame; ``entries`` are (compressed, decompressed) bytes of every frame before it."""
    table = b"".join(ENTRY.pack(*entry) for entry in entries) + FOOTER.pack(len(entries), 0, FOOTER_MAGIC)
    return FRAME.pack(TABLE_MAGIC, len(table)) + table


def read_header(fd: int, file_bytes: int) -> Header:
    """The first frame.

    Raises:
        TransportError: not a transport file, another version, over a cap, cut off.
    """
    start = os.pread(fd, FRAME.size + HEADER.size, 0)
    if len(start) < FRAME.size + HEADER.size:
        raise TransportError(f"{file_bytes} bytes are no transport file: at least {FRAME.size + HEADER.size}")
    frame_magic, payload_bytes = FRAME.unpack_from(start)
    magic, version, reserved, container_bytes = HEADER.unpack_from(start, FRAME.size)
    if frame_magic != SKIPPABLE_MAGIC or magic != MAGIC:
        raise TransportError(f"not a transport file: starts with {start[: FRAME.size + 8]!r}")
    if version not in (PLAIN_VERSION, ENCRYPTED_VERSION) or reserved != 0:
        raise TransportError(
            f"transport format version {version} (reserved field {reserved}); this software reads versions "
            f"{PLAIN_VERSION} and {ENCRYPTED_VERSION}: export it with the same release of glowplug"
        )
    if not MIN_MANIFEST_BYTES <= container_bytes <= MAX_MANIFEST_BYTES:
        raise TransportError(f"manifest of {container_bytes} bytes, {MIN_MANIFEST_BYTES} to {MAX_MANIFEST_BYTES}")
    salt_bytes = SALT_BYTES if version == ENCRYPTED_VERSION else 0
    if payload_bytes != HEADER.size + salt_bytes + container_bytes or FRAME.size + payload_bytes > file_bytes:
        raise TransportError(f"first frame of {payload_bytes} bytes does not hold a manifest of {container_bytes}")
    rest = os.pread(fd, salt_bytes + container_bytes, FRAME.size + HEADER.size)
    if len(rest) != salt_bytes + container_bytes:
        raise TransportError("cut off inside the manifest")
    return Header(rest[salt_bytes:], rest[:salt_bytes])


def read_frames(fd: int, file_bytes: int, header: Header, blobs: list[StoredChunks]) -> list[Frame]:
    """Every chunk's frame, from the seek table, checked against the verified manifest's chunks and the file's size.

    Requires: ``blobs`` come from a verified manifest, so that the size of the table is known before it is read.

    Raises:
        TransportError: truncated, extended, or a table that contradicts the manifest.
    """
    expected = list(list_chunks(blobs))
    table_at, entries = _read_seek_table(fd, file_bytes, 1 + len(expected), header.frame_bytes)
    if entries[0] != (header.frame_bytes, 0):
        raise TransportError("the seek table contradicts the first frame")
    frames = []
    position = header.frame_bytes
    for (stored, index), (frame_bytes, listed_bytes) in zip(expected, entries[1:], strict=True):
        is_sealed = bool(header.salt) and stored.ref.encryption is not None
        start, end = stored.plain_span(index) if is_sealed else stored.stored_span(index)
        most = max_frame_bytes(end - start) + (FRAME.size + TAG_BYTES if is_sealed else 0)
        least = FRAME.size + TAG_BYTES if is_sealed else 0
        if listed_bytes != (0 if is_sealed else end - start) or not least < frame_bytes <= most:
            raise TransportError(
                f"blob {stored.label}, chunk {index}: a frame of {frame_bytes} bytes, listed as {listed_bytes} "
                f"unpacked; the manifest says {end - start}"
            )
        frames.append(Frame(stored, index, position, frame_bytes, end - start))
        position += frame_bytes
    if position != table_at:
        raise TransportError(f"frames end at byte {position}, the seek table starts at {table_at}")
    return frames


def _read_seek_table(fd: int, file_bytes: int, num_frames: int, least_at: int) -> tuple[int, list[tuple[int, int]]]:
    """Where the table starts, and its entries."""
    table_bytes = num_frames * ENTRY.size + FOOTER.size
    table_at = file_bytes - FRAME.size - table_bytes
    table = os.pread(fd, FRAME.size + table_bytes, table_at) if table_at >= least_at else b""
    if len(table) != FRAME.size + table_bytes:
        raise TransportError(f"truncated: {file_bytes} bytes cannot hold {num_frames} frames and their seek table")
    footer = FOOTER.unpack_from(table, len(table) - FOOTER.size)
    if FRAME.unpack_from(table) != (TABLE_MAGIC, table_bytes) or footer != (num_frames, 0, FOOTER_MAGIC):
        raise TransportError(f"no seek table of {num_frames} frames at byte {table_at}: truncated, extended or changed")
    return table_at, [ENTRY.unpack_from(table, FRAME.size + n * ENTRY.size) for n in range(num_frames)]
