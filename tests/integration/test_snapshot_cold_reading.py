"""Reading past the page cache: the same bytes with and without it, tails and refusals included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshots import cold_reading
from snapshots.blob_reference import BlobRef
from snapshots.cold_reading import ALIGNMENT, ColdReader
from snapshots.errors import BlobCorrupt
from snapshots.mapping import map_sealed, seal_blob
from tests.snapshot_fixtures import blob_ref

SIZE_BYTES = (2 << 20) + 12_345  # two whole chunks and a tail that is not aligned


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, BlobRef, bytes]:
    """A small blob, which is read as large ones are."""
    monkeypatch.setattr(cold_reading, "MIN_FILE_BYTES", 0)
    content = os.urandom(SIZE_BYTES)
    path = tmp_path / "blob"
    path.write_bytes(content)
    return path, blob_ref(content, 1 << 20), content


def drop_from_cache(path: Path) -> None:
    """Have the kernel forget the file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def sealed_bytes(path: Path, ref: BlobRef) -> bytes:
    """What sealed memory holds of the file."""
    with seal_blob(path, ref) as sealed, map_sealed(sealed.fd, ref.size_bytes) as mapped:
        return mapped.array("u1", (ref.size_bytes,)).tobytes()


@pytest.mark.parametrize("is_refused", [False, True])
def test_cold_files_are_sealed_whole(
    blob: tuple[Path, BlobRef, bytes], monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """Past the cache where the file system offers it, through it where it refuses: the same bytes."""
    path, ref, content = blob
    if is_refused:
        monkeypatch.setattr(cold_reading, "_open_direct", lambda _fd: -1)
    drop_from_cache(path)
    assert sealed_bytes(path, ref) == content


def test_a_wrong_chunk_of_a_cold_file_is_refused(blob: tuple[Path, BlobRef, bytes]) -> None:
    """What comes past the cache is verified like all else."""
    path, ref, content = blob
    path.chmod(0o600)
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    drop_from_cache(path)
    with pytest.raises(BlobCorrupt):
        sealed_bytes(path, ref)


def test_what_does_not_fit_is_left_to_the_ordinary_read(blob: tuple[Path, BlobRef, bytes]) -> None:
    """Cached bytes, unaligned places and lengths, and small files are not read here; what is read, is right."""
    path, _, content = blob
    fd = os.open(path, os.O_RDONLY)
    try:
        reader = ColdReader(fd, SIZE_BYTES)
        into = memoryview(bytearray(ALIGNMENT))
        assert os.pread(fd, SIZE_BYTES, 0) == content  # now it is in the cache
        assert not reader.read(0, into)
        drop_from_cache(path)
        assert not reader.read(1, into)
        assert not reader.read(0, into[:100])
        if reader.read(0, into):
            assert into == content[:ALIGNMENT]
            assert reader.direct_bytes == ALIGNMENT
        reader.close()
        assert not reader.read(0, into)
    finally:
        os.close(fd)
