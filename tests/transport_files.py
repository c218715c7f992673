"""Transport files taken apart into frames and put together again, for tests that change them."""

from __future__ import annotations

import struct
from pathlib import Path

import zstandard

from snapshots import transport_format

TABLE_ENTRY = struct.Struct("<II")


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files, the lock aside."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def rebuild_transport(path: Path, frames: list[bytes], *, lie: dict[int, tuple[int, int]] | None = None) -> None:
    """Write a transport file of these frames with a seek table that fits them, apart from what ``lie`` says."""
    entries = [(len(frames[0]), 0)] + [(len(frame), _content_bytes(frame)) for frame in frames[1:]]
    for index, entry in (lie or {}).items():
        entries[index] = entry
    path.write_bytes(b"".join(frames) + transport_format.pack_seek_table(entries))


def _content_bytes(frame: bytes) -> int:
    if frame.startswith(transport_format.SEALED_MAGIC.to_bytes(4, "little")):
        return 0
    return zstandard.get_frame_parameters(frame).content_size


def split_transport(path: Path) -> list[bytes]:
    """Frames of a transport file, without its seek table."""
    data = path.read_bytes()
    (num_frames,) = struct.unpack_from("<I", data, len(data) - 9)
    table_at = len(data) - 9 - num_frames * TABLE_ENTRY.size
    frames, position = [], 0
    for number in range(num_frames):
        size, _ = TABLE_ENTRY.unpack_from(data, table_at + number * TABLE_ENTRY.size)
        frames.append(data[position : position + size])
        position += size
    return frames
