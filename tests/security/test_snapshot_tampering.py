"""Attacks on a stored snapshot: whatever was changed on disk, nothing of it is served."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshots.blob_reference import BlobRef
from snapshots.errors import (
    BlobCorrupt,
    ManifestMalformed,
    SignatureInvalid,
    SnapshotError,
    SnapshotNotFound,
    StoreError,
)
from snapshots.keyring import KeyRing
from snapshots.manifest import BLOB_ROLES, seal_manifest
from snapshots.mapping import map_sealed, seal_blob
from snapshots.store import SnapshotStore
from snapshots.verification import verify_blob
from tests.snapshot_fixtures import SyntheticSnapshot, build_snapshot, flip_byte, make_key

BAD_NAMES = [
    "",
    ".",
    "..",
    "../tiny",
    "a/b",
    "/etc/passwd",
    "tiny\n",
    "tiny\0",
    ".hidden",
    "-flag",
    "a" * 129,
    "tïny",
    "..%2ftiny",
    "a b",
]


@pytest.fixture
def snapshot(tmp_path: Path) -> SyntheticSnapshot:
    """A fresh synthetic snapshot."""
    return build_snapshot(tmp_path / "store")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyntheticSnapshot]:
    """One snapshot for tests that undo what they change; whole again at the end."""
    built = build_snapshot(tmp_path_factory.mktemp("shared") / "store")
    yield built
    load(built)


def load(snapshot: SyntheticSnapshot) -> None:
    """What a node agent does before anything of a snapshot is used."""
    manifest = snapshot.store.read_manifest(snapshot.manifest.name, snapshot.keyring)
    for role, ref in manifest.blobs.items():
        seal_blob(snapshot.store.blob_path(ref), ref, label=role).close()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused(shared: SyntheticSnapshot, data: st.DataObject) -> None:
    """In the manifest or any blob: refused when loading, and ``verify`` names the file."""
    role = data.draw(st.sampled_from(["manifest", *BLOB_ROLES]))
    path = shared.manifest_path if role == "manifest" else shared.path_of(role)
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    mask = 1 << data.draw(st.integers(0, 7))
    flip_byte(path, position, mask)
    try:
        expected = (SignatureInvalid, ManifestMalformed) if role == "manifest" else BlobCorrupt
        with pytest.raises(expected):
            load(shared)
        (problem,) = shared.store.verify("tiny", shared.keyring)
        assert problem.where.startswith(role)
    finally:
        flip_byte(path, position, mask)


def test_blob_that_is_only_kept_can_be_checked_on_disk(shared: SyntheticSnapshot) -> None:
    """The guest's source is not loaded when serving; checking it names the chunk, the size or the missing file."""
    ref, path = shared.manifest.guest_wasm, shared.path_of("guest_wasm")
    verify_blob(path, ref, "guest_wasm")
    flip_byte(path, 77)
    try:
        with pytest.raises(BlobCorrupt, match="blob guest_wasm: chunk 0 at byte 0: its bytes"):
            verify_blob(path, ref, "guest_wasm")
    finally:
        flip_byte(path, 77)
    with pytest.raises(BlobCorrupt, match="No such file"):
        verify_blob(path.with_suffix(".gone"), ref, "guest_wasm")


def test_corrupt_chunk_is_located(shared: SyntheticSnapshot) -> None:
    """For a seeded sample of positions the error names the chunk that holds the flipped byte."""
    ref, path = shared.manifest.weights, shared.path_of("weights")
    for position in random.Random(11).sample(range(ref.size_bytes), 40):
        flip_byte(path, position)
        try:
            with pytest.raises(BlobCorrupt) as caught:
                seal_blob(path, ref, label="weights")
            assert caught.value.chunk == position // ref.chunk_bytes
        finally:
            flip_byte(path, position)


@pytest.mark.parametrize("role", ["manifest", *BLOB_ROLES])
@pytest.mark.parametrize("change_bytes", [-1, -4096, 1, 4096])
def test_truncated_and_extended_files_are_refused(snapshot: SyntheticSnapshot, role: str, change_bytes: int) -> None:
    """Any other length is refused, for every kind of file."""
    path = snapshot.manifest_path if role == "manifest" else snapshot.path_of(role)
    path.chmod(0o644)
    os.truncate(path, max(0, path.stat().st_size + change_bytes))
    with pytest.raises((ManifestMalformed, BlobCorrupt)):
        load(snapshot)


@pytest.mark.parametrize("role", ["manifest", *BLOB_ROLES])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "missing"])
def test_anything_but_a_regular_file_is_refused(
    snapshot: SyntheticSnapshot, tmp_path: Path, role: str, kind: str
) -> None:
    """A symlink to a perfect copy, a FIFO, a folder, nothing at all: refused without waiting."""
    path = snapshot.manifest_path if role == "manifest" else snapshot.path_of(role)
    path.rename(tmp_path / "original")
    if kind == "symlink":
        path.symlink_to(tmp_path / "original")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises((BlobCorrupt, StoreError, SnapshotNotFound)):
        load(snapshot)


def test_swapped_blobs_are_refused(snapshot: SyntheticSnapshot) -> None:
    """Two intact blobs in each other's place, even of equal size."""
    first, second = (snapshot.store.add_blob_bytes(bytes([value]) * 1000) for value in (1, 2))
    first_path, second_path = snapshot.store.blob_path(first), snapshot.store.blob_path(second)
    data = first_path.read_bytes()
    first_path.chmod(0o644)
    first_path.write_bytes(second_path.read_bytes())
    with pytest.raises(BlobCorrupt):
        seal_blob(first_path, first)
    assert data != first_path.read_bytes()
    guest, weights = snapshot.path_of("guest_cwasm"), snapshot.path_of("weights")
    guest.rename(guest.with_suffix(".tmp"))
    weights.rename(guest)
    guest.with_suffix(".tmp").rename(weights)
    with pytest.raises(BlobCorrupt):
        load(snapshot)


def test_swapped_chunks_within_a_blob_are_refused(snapshot: SyntheticSnapshot) -> None:
    """The order of chunks is signed, not only their set."""
    ref, path = snapshot.manifest.guest_cwasm, snapshot.path_of("guest_cwasm")
    data = path.read_bytes()
    half = ref.size_bytes // 2
    path.chmod(0o644)
    path.write_bytes(data[half:] + data[:half])
    with pytest.raises(BlobCorrupt, match="chunk 0"):
        seal_blob(path, ref)


def test_reference_with_exchanged_chunk_digests_does_not_parse(snapshot: SyntheticSnapshot) -> None:
    """A blob's digest follows from its chunk digests, so neither can be exchanged alone, whoever signs it."""
    ref, other = snapshot.manifest.weights, snapshot.manifest.guest_cwasm
    forged = BlobRef(ref.digest, other.size_bytes, other.chunk_bytes, other.chunk_digests)
    blobs = {**snapshot.manifest.blobs, "weights": forged}
    with pytest.raises(ManifestMalformed, match="does not follow"):
        seal_manifest(msgspec.structs.replace(snapshot.manifest, blobs=blobs), snapshot.keyring)


def test_threat_strangers_signature(snapshot: SyntheticSnapshot) -> None:
    """With another key under another id, and with another key that claims our id."""
    for stranger in (make_key("stranger", 1), make_key("test-1", 1)):
        snapshot.manifest_path.write_bytes(seal_manifest(snapshot.manifest, KeyRing([stranger])))
        with pytest.raises(SignatureInvalid):
            load(snapshot)


def test_manifest_replayed_under_another_name_is_refused(snapshot: SyntheticSnapshot) -> None:
    """A valid manifest copied over another model's does not serve as that model."""
    shutil.copy(snapshot.manifest_path, snapshot.manifest_path.with_name("other.gpsnap"))
    assert snapshot.store.list_names() == ["other", "tiny"]
    with pytest.raises(SignatureInvalid, match=r"for name 'tiny' but was found as 'other'"):
        snapshot.store.read_manifest("other", snapshot.keyring)


def test_revoked_key_no_longer_verifies(snapshot: SyntheticSnapshot) -> None:
    """Deleting a key's line revokes everything that it signed."""
    with pytest.raises(SignatureInvalid, match="not in the key ring"):
        snapshot.store.read_manifest("tiny", KeyRing([make_key("newer", 2)]))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_threat_path_traversal_in_the_store(snapshot: SyntheticSnapshot, name: str) -> None:
    """Every operation refuses a bad name before it touches a path."""
    store, keyring = snapshot.store, snapshot.keyring
    for call in (
        lambda: store.read_manifest(name, keyring),
        lambda: store.verify(name, keyring),
        lambda: store.remove(name),
    ):
        with pytest.raises(StoreError):
            call()
    with pytest.raises(SnapshotError):
        store.write_manifest(msgspec.structs.replace(snapshot.manifest, name=name), keyring)
    assert store.list_names() == ["tiny"]


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n"])
def test_blob_digests_cannot_leave_the_store(snapshot: SyntheticSnapshot, digest: str) -> None:
    """An address is 64 lower-case hex digits or it is no path."""
    ref = msgspec.structs.replace(snapshot.manifest.weights, digest=digest)
    with pytest.raises(StoreError):
        snapshot.store.blob_path(ref)


def test_strange_files_among_the_manifests_are_not_listed(snapshot: SyntheticSnapshot, tmp_path: Path) -> None:
    """Symlinks, folders and names that are none do not become models."""
    folder = snapshot.manifest_path.parent
    (folder / "link.gpsnap").symlink_to(snapshot.manifest_path)
    (folder / "folder.gpsnap").mkdir()
    (folder / ".hidden.gpsnap").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    (folder / "b\xe4d.gpsnap").write_bytes(b"")
    assert snapshot.store.list_names() == ["tiny"]


@pytest.mark.parametrize("folder", ["blobs", "manifests", "tmp"])
def test_symlinked_folders_of_a_store_are_refused(tmp_path: Path, folder: str) -> None:
    """A store whose inside points elsewhere is not opened."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symlink"):
        SnapshotStore(tmp_path / "store")


def test_threat_file_swapped_while_read(snapshot: SyntheticSnapshot) -> None:
    """Bytes that passed are in sealed memory: a change afterwards does not reach those who hold it."""
    ref, path = snapshot.manifest.guest_cwasm, snapshot.path_of("guest_cwasm")
    before = path.read_bytes()
    with seal_blob(path, ref) as sealed, map_sealed(sealed.fd, sealed.size_bytes) as mapped:
        flip_byte(path, 50)
        assert bytes(mapped.view()) == before
        with pytest.raises(BlobCorrupt):
            seal_blob(path, ref)


def test_no_secret_in_any_refusal(snapshot: SyntheticSnapshot) -> None:
    """Errors that travel to clients and logs hold key ids, never key bytes."""
    secret = make_key("test-1", 0x7E)
    with pytest.raises(SignatureInvalid) as caught:
        snapshot.store.read_manifest("tiny", KeyRing([secret]))
    text = repr(caught.value) + str(caught.value)
    assert "test-1" in text
    assert "7e7e" not in text
    assert "~~~" not in text
