"""Export and import: one file, verified chunk by chunk, nothing half made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zstandard

from snapshots import transport_format
from snapshots.errors import (
    BlobCorrupt,
    KeyRingError,
    RolledBack,
    SignatureInvalid,
    SnapshotError,
    StoreError,
    TransportError,
)
from snapshots.keyring import KeyRing
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from snapshots.transport import export_snapshot, import_snapshot
from tests.snapshot_fixtures import (
    CHUNK_BYTES,
    SyntheticSnapshot,
    build_snapshot,
    flip_byte,
    make_key,
)
from tests.transport_files import files_below, rebuild_transport, split_transport


@pytest.fixture
def snapshot(tmp_path: Path) -> SyntheticSnapshot:
    """A snapshot to export."""
    return build_snapshot(tmp_path / "here")


@pytest.fixture
def exported(snapshot: SyntheticSnapshot, tmp_path: Path) -> Path:
    """Its transport file."""
    path = tmp_path / "tiny.gpx"
    export_snapshot(snapshot.store, "tiny", snapshot.keyring, path)
    return path


def test_round_trip_keeps_every_byte(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """Manifest file and blobs are the same there, and progress counts every stored byte."""
    there = SnapshotStore(tmp_path / "there")
    progress: list[tuple[int, int]] = []
    manifest, report = import_snapshot(
        there, exported, snapshot.keyring, on_progress=lambda *step: progress.append(step)
    )
    assert manifest == snapshot.manifest
    assert there.read_container("tiny") == snapshot.manifest_path.read_bytes()
    assert there.verify("tiny", snapshot.keyring) == []
    assert files_below(there.root) == files_below(snapshot.store.root)
    assert progress[-1] == (report.stored_bytes, report.stored_bytes)
    assert len(progress) == report.num_chunks


def test_framing_is_what_the_format_says() -> None:
    """Version 1, byte for byte; these change only with the version."""
    assert transport_format.pack_header(b"m" * 48).hex() == (
        "502a4d1840000000894750585052540a0100000030000000" + "6d" * 48
    )
    assert transport_format.pack_seek_table([(72, 0), (9, 5)]).hex() == (
        "5e2a4d1819000000480000000000000009000000050000000200000000b1ea928f"
    )


def test_any_zstd_reader_unpacks_it(snapshot: SyntheticSnapshot, exported: Path) -> None:
    """The file is a plain zstd stream of the blobs, in the order of their roles."""
    with exported.open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    expected = b"".join(snapshot.path_of(role).read_bytes() for role in sorted(snapshot.manifest.blobs))
    assert data == expected


def test_seek_table_finds_one_chunk(snapshot: SyntheticSnapshot, exported: Path) -> None:
    """One chunk in the middle is unpacked from its own frame alone."""
    frames = split_transport(exported)
    chunk = zstandard.ZstdDecompressor().decompress(frames[1 + 1])  # second chunk of guest_cwasm
    assert chunk == snapshot.path_of("guest_cwasm").read_bytes()[CHUNK_BYTES : 2 * CHUNK_BYTES]


@pytest.mark.parametrize("level", [1, 9, 19])
def test_levels_differ_in_size_only(snapshot: SyntheticSnapshot, tmp_path: Path, level: int) -> None:
    """Every level imports to the same snapshot."""
    path = tmp_path / f"level{level}"
    export_snapshot(snapshot.store, "tiny", snapshot.keyring, path, level=level, num_threads=1)
    there = SnapshotStore(tmp_path / "there")
    assert import_snapshot(there, path, snapshot.keyring, num_threads=3)[0] == snapshot.manifest


@pytest.mark.parametrize("level", [0, -1, 23])
def test_unknown_level_is_refused(snapshot: SyntheticSnapshot, tmp_path: Path, level: int) -> None:
    """And nothing is written."""
    with pytest.raises(TransportError, match="1 to 22"):
        export_snapshot(snapshot.store, "tiny", snapshot.keyring, tmp_path / "x", level=level)
    assert not (tmp_path / "x").exists()


def test_existing_file_is_never_overwritten(snapshot: SyntheticSnapshot, exported: Path) -> None:
    """The error names it."""
    before = exported.read_bytes()
    with pytest.raises(TransportError, match="exists already"):
        export_snapshot(snapshot.store, "tiny", snapshot.keyring, exported)
    assert exported.read_bytes() == before


def test_damaged_blob_is_not_exported(snapshot: SyntheticSnapshot, tmp_path: Path) -> None:
    """The chunk is named, and no file is left."""
    flip_byte(snapshot.path_of("weights"), CHUNK_BYTES + 3)
    with pytest.raises(BlobCorrupt, match="blob weights, chunk 1"):
        export_snapshot(snapshot.store, "tiny", snapshot.keyring, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_import_under_another_name_signs_anew(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """With a signing key; without one it is refused, as is a name that is none."""
    there = SnapshotStore(tmp_path / "there")
    manifest, _ = import_snapshot(there, exported, snapshot.keyring, name="other")
    assert there.list_names() == ["other"]
    assert there.read_manifest("other", snapshot.keyring) == manifest
    key = make_key()
    verify_only = KeyRing([type(key)(key.key_id, key.secret, key.created, "verify")])
    with pytest.raises(KeyRingError):
        import_snapshot(there, exported, verify_only, name="third")
    with pytest.raises(TransportError, match="snapshot name"):
        import_snapshot(there, exported, snapshot.keyring, name="../x")
    assert there.list_names() == ["other"]


def test_stranger_is_refused_before_any_chunk_is_read(exported: Path, tmp_path: Path) -> None:
    """A file whose manifest was signed with a key that we do not have."""
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises(SignatureInvalid, match="not in the key ring"):
        import_snapshot(there, exported, KeyRing([make_key("stranger", 3)]))
    assert files_below(there.root) == set()


@pytest.mark.parametrize("case", ["bomb", "bomb with a true table", "swapped", "extra data", "missing", "unsized"])
def test_hostile_frames_are_refused(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path, case: str) -> None:
    """Frames that unpack to more than they say, to other chunks, or to nothing: our own error, and an empty store."""
    frames = split_transport(exported)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))  # 256 MiB in 8 KiB
    lie: dict[int, tuple[int, int]] = {}
    if case == "bomb":
        frames[1], lie = bomb, {1: (len(bomb), CHUNK_BYTES)}
    elif case == "bomb with a true table":
        frames[1] = bomb
    elif case == "swapped":
        frames[4], frames[5] = frames[5], frames[4]  # the two whole chunks of the weights
    elif case == "extra data":
        small = zstandard.ZstdCompressor().compress(bytes(100))
        frames[1] = frames[1][: -len(small)] + small
    elif case == "missing":
        del frames[2]
    else:
        chunk = zstandard.ZstdDecompressor().decompress(frames[1])
        frames[1] = zstandard.ZstdCompressor(write_content_size=False).compress(chunk)
        lie = {1: (len(frames[1]), CHUNK_BYTES)}
    rebuild_transport(exported, frames, lie=lie)
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises((TransportError, BlobCorrupt)):
        import_snapshot(there, exported, snapshot.keyring)
    assert files_below(there.root) == set()


@pytest.mark.parametrize("change_bytes", [-1, -9, -70_000, -(10**9), 1, 4096])
def test_truncated_and_extended_files_are_refused(
    snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path, change_bytes: int
) -> None:
    """Any other length."""
    os.truncate(exported, max(0, exported.stat().st_size + change_bytes))
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises(SnapshotError):
        import_snapshot(there, exported, snapshot.keyring)
    assert files_below(there.root) == set()


def test_unknown_version_is_refused_by_number(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """Not guessed at."""
    flip_byte(exported, 8 + 8, 0x06)
    with pytest.raises(TransportError, match="version 7"):
        import_snapshot(SnapshotStore(tmp_path / "there"), exported, snapshot.keyring)


def test_anything_but_a_regular_file_is_refused(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """A symlink to a perfect file, a FIFO, a folder, nothing."""
    (tmp_path / "link").symlink_to(exported)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "here", "none"):
        with pytest.raises(TransportError):
            import_snapshot(SnapshotStore(tmp_path / "there"), tmp_path / name, snapshot.keyring)


def test_failed_import_leaves_the_older_snapshot(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """What had the name before still verifies."""
    there = build_snapshot(tmp_path / "there", seed=99)
    before = files_below(there.store.root)
    flip_byte(exported, exported.stat().st_size - 5000)
    with pytest.raises(SnapshotError):
        import_snapshot(there.store, exported, snapshot.keyring)
    assert files_below(there.store.root) == before
    assert there.store.read_manifest("tiny", snapshot.keyring) == there.manifest


def test_full_disk_is_a_clear_error_and_leaves_nothing(
    snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's refusal, as ours."""

    def refuse(fd: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    there = SnapshotStore(tmp_path / "there")
    monkeypatch.setattr("snapshots.blob_writer.write_fully", refuse)
    with pytest.raises(StoreError, match="No space left"):
        import_snapshot(there, exported, snapshot.keyring)
    assert files_below(there.root) == set()


def test_older_snapshot_needs_a_word(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """An export from before the present build is refused unless its owner says so; then it is the newest."""
    store = SnapshotStore(tmp_path / "there", newest=NewestSeen(tmp_path / "keys" / "snapshot.newest"))
    newer = build_snapshot(tmp_path / "newer", created_at_s=1_900_000_000.0)
    newer_file = tmp_path / "newer.gpx"
    export_snapshot(newer.store, "tiny", newer.keyring, newer_file)
    import_snapshot(store, newer_file, newer.keyring)
    with pytest.raises(RolledBack, match="--allow-older"):
        import_snapshot(store, exported, snapshot.keyring)
    assert store.read_manifest("tiny", snapshot.keyring) == newer.manifest
    import_snapshot(store, exported, snapshot.keyring, allow_older=True)
    assert store.read_manifest("tiny", snapshot.keyring) == snapshot.manifest
