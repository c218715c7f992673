"""Framing of a transport file: a snapshot in one file, compressed chunk by chunk (byte table: FORMAT.md).

It is a zstd file in the seekable format: a skippable frame with our header and the signed manifest, one frame a chunk,
and a skippable frame with the seek table. So any zstd reader can decompress it (to the blobs, one behind the other),
and any reader of the seekable format finds a chunk without those before it.

Source: RFC 8878 for frames; contrib/seekable_format/zstd_seekable_compression_format.md of the zstd repository.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from snapshots.errors import TransportError
from snapshots.manifest import MAX_MANIFEST_BYTES, BlobRef, Manifest
from snapshots.stored_chunks import StoredChunks

MAGIC: Final = b"\x89GPXPRT\n"
FORMAT_VERSION: Final = 1
SKIPPABLE_MAGIC: Final = 0x184D2A50
TABLE_MAGIC: Final = 0x184D2A5E
FOOTER_MAGIC: Final = 0x8F92EAB1
FRAME: Final = struct.Struct("<II")  # magic, payload bytes
HEADER: Final = struct.Struct("<8sHHI")  # magic, version, reserved (0), manifest bytes
ENTRY: Final = struct.Struct("<II")  # compressed bytes, decompressed bytes
FOOTER: Final = struct.Struct("<IBI")  # frames, descriptor (0: no checksums), magic
MIN_MANIFEST_BYTES: Final = 48
#: A zstd frame is at most this much larger than its content: its header, and 3 bytes for each block of 128 KiB.
FRAME_OVERHEAD_BYTES: Final = 32


class Frame(NamedTuple):
    """One chunk's frame: which chunk it is, and where the frame lies in the file."""

    stored: StoredChunks
    chunk: int
    offset: int
    compressed_bytes: int
    stored_bytes: int


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


def max_frame_bytes(stored_bytes: int) -> int:
    """Upper bound of a frame's size."""
    return stored_bytes + (stored_bytes >> 7) + FRAME_OVERHEAD_BYTES


def pack_header(container: bytes) -> bytes:
    """The first frame: our header and the manifest's container file."""
    payload = HEADER.pack(MAGIC, FORMAT_VERSION, 0, len(container)) + container
    return FRAME.pack(SKIPPABLE_MAGIC, len(payload)) + payload


def pack_seek_table(entries: list[tuple[int, int]]) -> bytes:
    """The last frame; ``entries`` are (compressed, decompressed) bytes of every frame before it."""
    table = b"".join(ENTRY.pack(*entry) for entry in entries) + FOOTER.pack(len(entries), 0, FOOTER_MAGIC)
    return FRAME.pack(TABLE_MAGIC, len(table)) + table


def read_header(fd: int, file_bytes: int) -> bytes:
    """The manifest's container file, not verified yet.

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
    if version != FORMAT_VERSION or reserved != 0:
        raise TransportError(
            f"transport format version {version} (reserved field {reserved}); this software reads version "
            f"{FORMAT_VERSION}: export it with the same release of glowplug"
        )
    if not MIN_MANIFEST_BYTES <= container_bytes <= MAX_MANIFEST_BYTES:
        raise TransportError(f"manifest of {container_bytes} bytes, {MIN_MANIFEST_BYTES} to {MAX_MANIFEST_BYTES}")
    if payload_bytes != HEADER.size + container_bytes or FRAME.size + payload_bytes > file_bytes:
        raise TransportError(f"first frame of {payload_bytes} bytes does not hold a manifest of {container_bytes}")
    container = os.pread(fd, container_bytes, FRAME.size + HEADER.size)
    if len(container) != container_bytes:
        raise TransportError("cut off inside the manifest")
    return container


def read_frames(fd: int, file_bytes: int, container_bytes: int, blobs: list[StoredChunks]) -> list[Frame]:
    """Every chunk's frame, from the seek table, checked against the verified manifest's chunks and the file's size.

    Requires: ``blobs`` come from a verified manifest, so that the size of the table is known before it is read.

    Raises:
        TransportError: truncated, extended, or a table that contradicts the manifest.
    """
    expected = [(stored, index) for stored, index in list_chunks(blobs)]
    num_frames = 1 + len(expected)
    table_bytes = num_frames * ENTRY.size + FOOTER.size
    table_at = file_bytes - FRAME.size - table_bytes
    header_bytes = FRAME.size + HEADER.size + container_bytes
    table = os.pread(fd, FRAME.size + table_bytes, table_at) if table_at >= header_bytes else b""
    if len(table) != FRAME.size + table_bytes:
        raise TransportError(f"truncated: {file_bytes} bytes cannot hold {num_frames} frames and their seek table")
    if FRAME.unpack_from(table) != (TABLE_MAGIC, table_bytes) or FOOTER.unpack_from(
        table, len(table) - FOOTER.size
    ) != (
        num_frames,
        0,
        FOOTER_MAGIC,
    ):
        raise TransportError(f"no seek table of {num_frames} frames at byte {table_at}: truncated, extended or changed")
    entries = list(ENTRY.iter_unpack(table[FRAME.size : -FOOTER.size]))
    if entries[0] != (header_bytes, 0):
        raise TransportError("the seek table contradicts the first frame")
    frames = []
    position = header_bytes
    for (stored, index), (compressed_bytes, stored_bytes) in zip(expected, entries[1:], strict=True):
        start, end = stored.stored_span(index)
        if stored_bytes != end - start or not 0 < compressed_bytes <= max_frame_bytes(end - start):
            raise TransportError(
                f"blob {stored.label}, chunk {index}: a frame of {compressed_bytes} bytes that says it holds "
                f"{stored_bytes}; the manifest says {end - start}"
            )
        frames.append(Frame(stored, index, position, compressed_bytes, stored_bytes))
        position += compressed_bytes
    if position != table_at:
        raise TransportError(f"frames end at byte {position}, the seek table starts at {table_at}")
    return frames
