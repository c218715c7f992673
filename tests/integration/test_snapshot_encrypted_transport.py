"""Exports of encrypted snapshots: small, readable with the key alone, and bit for bit the same on the other side."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snapshots import transport_format
from snapshots.blob_reference import SALT_BYTES
from snapshots.encryption import ExportCipher, open_export_cipher
from snapshots.errors import BlobCorrupt, KeyRingError, SnapshotError, TransportError
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from snapshots.stored_chunks import StoredChunks
from snapshots.transport import export_snapshot, import_snapshot
from snapshots.transport_format import FRAME, SEALED_MAGIC, list_blobs, list_chunks
from tests.snapshot_fixtures import (
    CHUNK_BYTES,
    SyntheticSnapshot,
    build_snapshot,
    make_encryption_key,
    make_key,
)
from tests.transport_files import files_below, rebuild_transport, split_transport

RING = KeyRing([make_key(), make_encryption_key()])
SALT_AT = FRAME.size + transport_format.HEADER.size


@pytest.fixture
def snapshot(tmp_path: Path) -> SyntheticSnapshot:
    """An encrypted snapshot."""
    return build_snapshot(tmp_path / "here", keyring=RING, encrypt=True)


@pytest.fixture
def exported(snapshot: SyntheticSnapshot, tmp_path: Path) -> Path:
    """Its transport file."""
    path = tmp_path / "tiny.gpx"
    export_snapshot(snapshot.store, "tiny", RING, path)
    return path


def compressible_snapshot(root: Path) -> tuple[SyntheticSnapshot, bytes]:
    """An encrypted snapshot whose guest is one sentence over and over; the sentence."""
    sentence = b"The same sentence, again and again, in one blob. "
    return build_snapshot(root, keyring=RING, encrypt=True, guest_wasm=sentence * 8000), sentence


def frames_with(snapshot: SyntheticSnapshot, exported: Path, make: Callable[[bytes], bytes]) -> list[bytes]:
    """The export's frames, the first chunk encrypted again, as its key holder can, with ``make(plain)`` inside."""
    frames = split_transport(exported)
    salt = frames[0][SALT_AT : SALT_AT + SALT_BYTES]
    role, ref = list_blobs(snapshot.manifest)[0]
    with snapshot.store.blob_path(ref).open("rb") as file:
        stored = StoredChunks(ref, role, RING)
        plain = bytes(stored.open(stored.read(file.fileno(), 0), 0))
    sealed = open_export_cipher(ref, salt, RING).encrypt(make(plain), ref.chunk_digest(0), 0)
    frames[1] = FRAME.pack(SEALED_MAGIC, len(sealed)) + sealed
    return frames


def test_format_is_zstd_in_aes_gcm_in_a_skippable_frame() -> None:
    """Version 2, byte for byte; a golden vector of its cipher for other implementers."""
    secret, salt, address, digest = bytes(range(32)), bytes(range(100, 132)), "ab" * 32, bytes(32)
    assert transport_format.pack_header(b"m" * 48, salt).hex() == (
        "502a4d1860000000894750585052540a0200000030000000" + salt.hex() + "6d" * 48
    )
    sealed = ExportCipher(secret, salt, address).encrypt(b"chunk", digest, 3)
    info = b"glowplug 2026 transport encryption key v1" + bytes.fromhex(address)
    key = HKDF(SHA256(), 32, salt=salt, info=info).derive(secret)
    aad = b"glowplug 2026 transport chunk v1" + digest + (3).to_bytes(8, "little")
    assert AESGCM(key).decrypt((3).to_bytes(12, "big"), sealed, aad) == b"chunk"
    assert sealed.hex() == "999fd6e3cd213df25caf36ac2a880f246b760be2d3"


def test_every_byte_arrives_and_none_is_plain_on_the_way(
    snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path
) -> None:
    """The files there are those here; without the key the import is refused."""
    data, plain = exported.read_bytes(), bytes(snapshot.tensors[0])
    assert all(plain[start : start + 32] not in data for start in range(0, len(plain) - 32, 5003))
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises(KeyRingError, match="e-test"):
        import_snapshot(there, exported, KeyRing([make_key()]))
    progress: list[tuple[int, int]] = []
    _, report = import_snapshot(there, exported, RING, on_progress=lambda *step: progress.append(step))
    assert there.verify("tiny", RING) == []
    assert files_below(there.root) == files_below(snapshot.store.root)
    for ref in snapshot.manifest.blobs.values():
        assert there.blob_path(ref).read_bytes() == snapshot.store.blob_path(ref).read_bytes()
    assert progress[-1] == (report.stored_bytes, report.stored_bytes)


def test_encrypted_export_shrinks_as_a_plain_one(tmp_path: Path) -> None:
    """Compressed before it is encrypted: within a salt, a tag and a frame's header of each chunk."""
    snapshot, sentence = compressible_snapshot(tmp_path / "here")
    plain = build_snapshot(tmp_path / "plain", keyring=RING, guest_wasm=sentence * 8000)
    sizes = [
        export_snapshot(source.store, "tiny", RING, tmp_path / f"{number}.gpx")
        for number, source in enumerate((snapshot, plain))
    ]
    manifests = [len(source.store.read_container("tiny")) for source in (snapshot, plain)]
    encrypted_bytes, plain_bytes = (
        report.file_bytes - container for report, container in zip(sizes, manifests, strict=True)
    )
    assert encrypted_bytes == plain_bytes + SALT_BYTES + sizes[0].num_chunks * (FRAME.size + 16)
    assert encrypted_bytes < sizes[0].stored_bytes - 8000 * len(sentence) * 0.9
    there = SnapshotStore(tmp_path / "there")
    import_snapshot(there, tmp_path / "0.gpx", RING)
    assert there.verify("tiny", RING) == []


def test_two_exports_share_no_frame(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """Another salt, another key: the same nonce never covers two contents, whatever the level."""
    again = tmp_path / "again.gpx"
    export_snapshot(snapshot.store, "tiny", RING, again)
    first, second = split_transport(exported), split_transport(again)
    assert [len(frame) for frame in first] == [len(frame) for frame in second]
    assert not set(first[1:]) & set(second[1:])


def test_frame_of_another_export_is_refused(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path) -> None:
    """The same chunk, whole, from an export with another salt."""
    again = tmp_path / "again.gpx"
    export_snapshot(snapshot.store, "tiny", RING, again)
    frames, others = split_transport(exported), split_transport(again)
    rebuild_transport(exported, [frames[0], others[1], *frames[2:]])
    with pytest.raises(TransportError, match="not those of this export"):
        import_snapshot(SnapshotStore(tmp_path / "there"), exported, RING)


def test_another_secret_under_the_same_id_is_refused(exported: Path, tmp_path: Path) -> None:
    """A key ring with the right id and the wrong secret: said so, nothing left."""
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises(TransportError, match="another key under the same id"):
        import_snapshot(there, exported, KeyRing([make_key(), make_encryption_key("e-test", 1)]))
    assert files_below(there.root) == set()


@pytest.mark.parametrize("kind", ["bit", "salt", "swapped", "plain frame", "length", "short"])
def test_changed_frames_are_refused(snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path, kind: str) -> None:
    """A flipped bit, salt, order, kind or length: our own error, and an empty store."""
    frames = split_transport(exported)
    if kind == "bit":
        frames[2] = frames[2][:40] + bytes([frames[2][40] ^ 1]) + frames[2][41:]
    elif kind == "salt":
        frames[0] = frames[0][:SALT_AT] + bytes([frames[0][SALT_AT] ^ 1]) + frames[0][SALT_AT + 1 :]
    elif kind == "swapped":
        frames[4], frames[5] = frames[5], frames[4]
    elif kind == "plain frame":
        frames[1] = zstandard.ZstdCompressor().compress(bytes(CHUNK_BYTES))
    elif kind == "length":
        frames[1] = struct.pack("<II", SEALED_MAGIC, len(frames[1])) + frames[1][8:]
    else:
        frames[1] = frames[1][:24]
    rebuild_transport(exported, frames)
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises(SnapshotError):
        import_snapshot(there, exported, RING)
    assert files_below(there.root) == set()


@pytest.mark.parametrize("kind", ["bomb", "unsized", "extra data", "other bytes", "no frame"])
def test_a_key_holder_cannot_smuggle_bytes(
    snapshot: SyntheticSnapshot, exported: Path, tmp_path: Path, kind: str
) -> None:
    """Who has the encryption key but no signing key: what is inside is refused before it is unpacked, or by digest."""
    compress = zstandard.ZstdCompressor().compress
    makers: dict[str, Callable[[bytes], bytes]] = {
        "bomb": lambda plain: compress(bytes(1 << 28)),
        "unsized": zstandard.ZstdCompressor(write_content_size=False).compress,
        "extra data": lambda plain: compress(plain[:-1]) + compress(b"x"),
        "other bytes": lambda plain: compress(bytes(len(plain))),
        "no frame": lambda plain: b"\0" * 40,
    }
    rebuild_transport(exported, frames_with(snapshot, exported, makers[kind]))
    there = SnapshotStore(tmp_path / "there")
    with pytest.raises((TransportError, BlobCorrupt)):
        import_snapshot(there, exported, RING)
    assert files_below(there.root) == set()


def test_version_1_with_encrypted_blobs_is_still_read(snapshot: SyntheticSnapshot, tmp_path: Path) -> None:
    """What an earlier release exported: ciphertext as it lies in the store, each chunk in a zstd frame."""
    blobs = [StoredChunks(ref, role, RING) for role, ref in list_blobs(snapshot.manifest)]
    frames = [transport_format.pack_header(snapshot.store.read_container("tiny"))]
    for stored, index in list_chunks(blobs):
        fd = os.open(snapshot.store.blob_path(stored.ref), os.O_RDONLY)
        frames.append(zstandard.ZstdCompressor().compress(stored.read(fd, index)))
        os.close(fd)
    path = tmp_path / "old.gpx"
    rebuild_transport(path, frames)
    there = SnapshotStore(tmp_path / "there")
    import_snapshot(there, path, RING)
    assert there.verify("tiny", RING) == []
    assert files_below(there.root) == files_below(snapshot.store.root)
