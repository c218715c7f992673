"""Encryption at rest: ciphertext on disk, plain bytes in sealed memory alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snapshots import sealing
from snapshots.blob_reference import TAG_BYTES
from snapshots.encryption import BlobCipher, ChunkNotAuthentic
from snapshots.errors import BlobCorrupt, KeyRingError, MappingError
from snapshots.key_file import Key
from snapshots.keyring import KeyRing
from snapshots.mapping import map_sealed, seal_blob, verify_sealed
from snapshots.store import SnapshotStore
from tests.snapshot_fixtures import (
    CHUNK_BYTES,
    SyntheticSnapshot,
    build_snapshot,
    flip_byte,
    make_encryption_key,
    make_key,
)

SECRET = bytes(range(32))
SALT = bytes(range(100, 132))


@pytest.fixture
def ring() -> KeyRing:
    """One key that signs and one that encrypts."""
    return KeyRing([make_key(), make_encryption_key()])


@pytest.fixture
def snapshot(tmp_path: Path, ring: KeyRing) -> SyntheticSnapshot:
    """An encrypted snapshot."""
    return build_snapshot(tmp_path / "store", keyring=ring, encrypt=True)


def everything_below(folder: Path) -> bytes:
    """Content of all files."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_format_is_plain_aes_gcm() -> None:
    """Another implementer needs HKDF-SHA256, a counting nonce and the digest and index as AAD; a golden vector."""
    digest = bytes(32)
    stored = BlobCipher(SECRET, SALT).encrypt(b"chunk", digest, 3)
    key = HKDF(SHA256(), 32, salt=SALT, info=b"glowplug 2026 blob encryption key v1").derive(SECRET)
    aad = b"glowplug 2026 blob chunk v1" + digest + (3).to_bytes(8, "little")
    assert AESGCM(key).decrypt((3).to_bytes(12, "big"), stored, aad) == b"chunk"
    assert stored.hex() == "4b0cc653cbef3be59e0458e492c8a137d3fd7fb0c0"


def test_chunk_opens_only_in_its_place() -> None:
    """Another index, digest, salt, secret, a changed or cut ciphertext: not authentic."""
    cipher, digest = BlobCipher(SECRET, SALT), bytes(range(32))
    stored = cipher.encrypt(b"content", digest, 1)
    into = bytearray(7)
    cipher.decrypt_into(stored, digest, 1, into)
    assert into == b"content"
    changed = bytes([stored[0] ^ 1]) + stored[1:]
    for other, data, other_digest, index in (
        (cipher, stored, digest, 2),
        (cipher, stored, bytes(32), 1),
        (BlobCipher(SECRET, bytes(32)), stored, digest, 1),
        (BlobCipher(bytes(32), SALT), stored, digest, 1),
        (cipher, changed, digest, 1),
        (cipher, stored[:-1], digest, 1),
        (cipher, stored + b"\0", digest, 1),
    ):
        with pytest.raises(ChunkNotAuthentic):
            other.decrypt_into(data, other_digest, index, into)


def test_no_plain_byte_reaches_the_disk(snapshot: SyntheticSnapshot) -> None:
    """No 32-byte window of a tensor is anywhere in the store, and every file is a tag a chunk larger."""
    disk = everything_below(snapshot.store.root)
    for tensor in snapshot.tensors:
        data = bytes(tensor)
        assert all(data[start : start + 32] not in disk for start in range(0, len(data) - 32, 5003))
    for ref in snapshot.manifest.blobs.values():
        assert snapshot.store.blob_path(ref).stat().st_size == ref.size_bytes + TAG_BYTES * ref.num_chunks


def test_interrupted_build_leaves_no_plain_byte(tmp_path: Path, ring: KeyRing) -> None:
    """Also the temporary file holds ciphertext, at every moment."""
    store, data = SnapshotStore(tmp_path), os.urandom(3 * CHUNK_BYTES + 100)
    with store.add_blob(chunk_bytes=CHUNK_BYTES, encrypt_with=ring) as writer:
        writer.write(data)
        assert data[:64] not in everything_below(tmp_path)


def test_sealed_memory_holds_the_plain_blob(snapshot: SyntheticSnapshot, ring: KeyRing) -> None:
    """The digest is that of the plain bytes, and so is what workers map."""
    plain = build_snapshot(snapshot.store.root.parent / "plain", keyring=ring)
    for role, ref in snapshot.manifest.blobs.items():
        assert ref.digest == plain.manifest.blobs[role].digest
        path = snapshot.store.blob_path(ref)
        with seal_blob(path, ref, keyring=ring) as sealed, map_sealed(sealed.fd, sealed.size_bytes) as mapped:
            assert bytes(mapped.view()) == plain.path_of(role).read_bytes()


def test_large_blob_is_decrypted_on_all_cores(tmp_path: Path, ring: KeyRing) -> None:
    """Several pieces, huge pages, a ragged end."""
    store, data = SnapshotStore(tmp_path), np.random.default_rng(3).bytes(sealing.PIECE_BYTES + 3 * (1 << 20) + 77)
    ref = store.add_blob_bytes(data, encrypt_with=ring)
    progress: list[tuple[int, int]] = []
    with seal_blob(
        store.blob_path(ref), ref, keyring=ring, num_threads=3, on_progress=lambda *step: progress.append(step)
    ) as sealed:
        assert os.pread(sealed.fd, len(data) + 1, 0) == data
    assert progress[-1] == (len(data), len(data))


def test_without_its_key_nothing_opens(snapshot: SyntheticSnapshot) -> None:
    """The key is named; verify lists it as a finding for each blob."""
    ref = snapshot.manifest.weights
    for keyring in (None, KeyRing([make_key()]), KeyRing([make_key(), make_encryption_key("e-other")])):
        with pytest.raises(KeyRingError, match="'e-test'"):
            seal_blob(snapshot.store.blob_path(ref), ref, keyring=keyring)
    problems = snapshot.store.verify("tiny", KeyRing([make_key()]))
    assert [problem.where for problem in problems] == ["guest_cwasm", "guest_wasm", "weights"]
    assert all("cannot be checked" in problem.what for problem in problems)


def test_wrong_secret_under_the_right_id_is_corruption(snapshot: SyntheticSnapshot) -> None:
    """The tag does not fit; the chunk is named."""
    ring = KeyRing([make_key(), make_encryption_key("e-test", 1)])
    ref = snapshot.manifest.weights
    with pytest.raises(BlobCorrupt, match=r"chunk 0 .*key holder"):
        seal_blob(snapshot.store.blob_path(ref), ref, keyring=ring)


def test_changed_ciphertext_and_tag_are_located(snapshot: SyntheticSnapshot, ring: KeyRing) -> None:
    """A flipped bit in chunk 1 or in its tag names chunk 1."""
    ref, path = snapshot.manifest.weights, snapshot.path_of("weights")
    for position in (CHUNK_BYTES + TAG_BYTES + 5, 2 * (CHUNK_BYTES + TAG_BYTES) - 1):
        flip_byte(path, position)
        with pytest.raises(BlobCorrupt) as caught:
            seal_blob(path, ref, keyring=ring)
        assert (caught.value.chunk, caught.value.offset) == (1, CHUNK_BYTES)
        (problem,) = snapshot.store.verify("tiny", ring)
        assert problem.where == f"weights, chunk 1 at byte {CHUNK_BYTES}"
        flip_byte(path, position)
    assert snapshot.store.verify("tiny", ring) == []


def test_each_writing_has_its_own_key_and_file(tmp_path: Path, ring: KeyRing) -> None:
    """The same bytes twice: another salt, another address, other ciphertext; a plain copy lies beside both."""
    store, data = SnapshotStore(tmp_path), bytes(CHUNK_BYTES)
    refs = [store.add_blob_bytes(data, encrypt_with=ring) for _ in range(2)] + [store.add_blob_bytes(data)]
    assert len({ref.digest for ref in refs}) == 1
    assert len({ref.address for ref in refs}) == 3
    assert len({store.blob_path(ref).read_bytes()[:64] for ref in refs}) == 3


def test_rotated_key_still_decrypts(tmp_path: Path) -> None:
    """What the older key encrypted opens; what is new is encrypted with the newer."""
    path = tmp_path / "keys"
    KeyRing.generate_file(path)
    old = KeyRing.rotate(path, encryption=True, key_id="e-old")
    store = SnapshotStore(tmp_path / "store")
    first = store.add_blob_bytes(b"first", encrypt_with=old)
    ring = KeyRing.rotate(path, encryption=True, key_id="e-new")
    second = store.add_blob_bytes(b"second", encrypt_with=ring)
    assert [ref.encryption.key_id for ref in (first, second) if ref.encryption] == ["e-old", "e-new"]
    for ref, data in ((first, b"first"), (second, b"second")):
        with seal_blob(store.blob_path(ref), ref, keyring=ring) as sealed:
            assert os.pread(sealed.fd, 10, 0) == data


def test_encrypting_needs_a_key_that_encrypts(tmp_path: Path) -> None:
    """A signing key, or an encryption key that was rotated out, does not do; the remedy is named; no file is left."""
    store = SnapshotStore(tmp_path)
    retired = Key("e-1", bytes(32), "2026-01-01T00:00:00Z", "decrypt")
    for ring in (KeyRing([make_key()]), KeyRing([make_key(), retired])):
        with pytest.raises(KeyRingError, match="keys rotate --encryption"):
            store.add_blob(encrypt_with=ring)
    assert everything_below(tmp_path) == b""


def test_garbage_collection_keeps_encrypted_blobs(snapshot: SyntheticSnapshot, ring: KeyRing) -> None:
    """Their addresses are not their digests."""
    for ref in snapshot.manifest.blobs.values():
        os.utime(snapshot.store.blob_path(ref), (1, 1))
    assert snapshot.store.collect_garbage(ring).num_blobs == 0


def test_memory_can_be_verified_again(snapshot: SyntheticSnapshot, ring: KeyRing) -> None:
    """Right memory passes (encrypted or not); memory that holds something else, or is not sealed, does not."""
    ref, other = snapshot.manifest.weights, snapshot.manifest.guest_cwasm
    with seal_blob(snapshot.store.blob_path(ref), ref, keyring=ring) as sealed:
        verify_sealed(sealed.fd, ref)
        with pytest.raises(MappingError):
            verify_sealed(sealed.fd, other)
    data = bytes(ref.size_bytes)
    wrong = snapshot.store.add_blob_bytes(data, chunk_bytes=CHUNK_BYTES)
    with (
        seal_blob(snapshot.store.blob_path(wrong), wrong) as sealed,
        pytest.raises(BlobCorrupt, match=r"chunk 0 .*sealed memory"),
    ):
        verify_sealed(sealed.fd, ref)
