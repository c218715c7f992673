"""Every parser of bytes that a stranger may have written, as a function of bytes: it returns, or fails the fuzzer.

Each target catches the one family of errors that its parser documents; whatever else comes out is a finding. Targets
that sit behind a signature are also fed bytes that are signed, as an attacker cannot do, to reach the parser behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from guests.errors import GuestError, ProgramError
from guests.module import parse_module
from guests.program import decode_program
from snapshots import key_file, manifest, rollback, transport, transport_format, weights_file
from snapshots.blob_reference import SALT_BYTES
from snapshots.encryption import open_export_cipher
from snapshots.errors import SnapshotError
from snapshots.key_file import Key
from snapshots.keyring import KeyRing
from snapshots.packed_chunks import ChunkUnpacker, ExportCiphers
from snapshots.store import SnapshotStore
from snapshots.stored_chunks import StoredChunks
from tests.snapshot_fixtures import build_snapshot, make_encryption_key, make_key
from worker.build.errors import BuildError
from worker.build.gguf_file import GgufFile
from worker.build.safetensors_file import SafetensorsCheckpoint

KEYRING: Final = KeyRing([make_key(), make_encryption_key()])


@cache
def scratch() -> Path:
    """Where targets that take paths write a file for each input. Whoever runs targets removes it."""
    return Path(tempfile.mkdtemp(prefix="gp-fuzz-"))


#: The guest_wasm of samples, the second blob of their files.
GUEST_WASM: Final = b"again and again, " * 300


class Sample(NamedTuple):
    """A good transport file, its first frame, and its blobs."""

    file: bytes
    header: transport_format.Header
    blobs: list[StoredChunks]


@cache
def sample(*, encrypted: bool = False) -> Sample:
    """One of each kind."""
    folder = scratch() / ("encrypted" if encrypted else "plain")
    snapshot = build_snapshot(folder, keyring=KEYRING, encrypt=encrypted, guest_wasm=GUEST_WASM)
    path = folder / "sample.gpx"
    transport.export_snapshot(snapshot.store, "tiny", KEYRING, path)
    data = path.read_bytes()
    container = snapshot.store.read_container("tiny")
    start = transport_format.FRAME.size + transport_format.HEADER.size
    header = transport_format.Header(container, data[start : start + SALT_BYTES] if encrypted else b"")
    blobs = [StoredChunks(ref, role, KEYRING) for role, ref in transport_format.list_blobs(snapshot.manifest)]
    return Sample(data, header, blobs)


def container(data: bytes) -> None:
    """Framing and MAC of a manifest file."""
    try:
        manifest.open_manifest(data, KEYRING, name=None)
    except SnapshotError:
        pass


def signed_body(data: bytes) -> None:
    """The schema and rules behind the MAC: ``data`` as a body that the key's owner signed."""
    head = manifest.HEADER.pack(manifest.MAGIC, manifest.FORMAT_VERSION, 6, max(1, len(data)))
    signed = head + (data or b" ") + b"test-1"
    try:
        opened = manifest.open_manifest(signed + KEYRING.sign_with("test-1", signed), KEYRING, name=None)
    except SnapshotError:
        return
    assert manifest.encode_body(opened) == data


def transport_header(data: bytes) -> None:
    """The first frame of a transport file."""
    fd = memory_file(data)
    try:
        transport_format.read_header(fd, len(data))
    except SnapshotError:
        pass
    finally:
        os.close(fd)


def transport_frames(data: bytes) -> None:
    """Seek table and frames behind a good first frame: ``data`` is what follows it, or a change of it."""
    _frames_behind_header(data, sample())


def encrypted_transport_frames(data: bytes) -> None:
    """The same of an export with encrypted blobs."""
    _frames_behind_header(data, sample(encrypted=True))


def _frames_behind_header(data: bytes, good: Sample) -> None:
    start = good.header.frame_bytes
    tail = bytearray(good.file[start:])
    if len(data) >= 4:  # most inputs change a good tail at one place, others replace it
        place = int.from_bytes(data[:3], "little") % len(tail)
        tail[place : place + len(data) - 4] = data[4:]
        if data[3] & 1:
            tail = bytearray(data[4:])
    fd = memory_file(good.file[:start] + bytes(tail))
    try:
        frames = transport_format.read_frames(fd, start + len(tail), good.header, good.blobs)
        unpacker = ChunkUnpacker(fd, ExportCiphers(good.blobs, KEYRING, good.header.salt))
        for frame in frames:
            _, stored = unpacker.unpack(frame)
            first, end = frame.stored.stored_span(frame.chunk)
            assert len(stored) == end - first
    except SnapshotError:
        pass
    finally:
        os.close(fd)


def encrypted_chunk(data: bytes) -> None:
    """What an encrypted frame holds: ``data``, encrypted as who has the encryption key can, in a chunk's place."""
    good = sample(encrypted=True)
    stored = good.blobs[1]
    cipher = open_export_cipher(stored.ref, good.header.salt, KEYRING)
    sealed = cipher.encrypt(data, stored.ref.chunk_digest(0), 0)
    frame = transport_format.FRAME.pack(transport_format.SEALED_MAGIC, len(sealed)) + sealed
    first, end = stored.plain_span(0)
    fd = memory_file(frame)
    try:
        place = transport_format.Frame(stored, 0, 0, len(frame), end - first)
        ChunkUnpacker(fd, ExportCiphers(good.blobs, KEYRING, good.header.salt)).unpack(place)
    except SnapshotError:
        pass
    finally:
        os.close(fd)


def whole_import(data: bytes) -> None:
    """A whole file, imported into a store."""
    path = scratch() / "import.file"
    path.write_bytes(data)
    try:
        transport.import_snapshot(SnapshotStore(scratch() / "there"), path, KEYRING, num_threads=1)
    except SnapshotError:
        pass


def weights_header(data: bytes) -> None:
    """The JSON header of the weights blob."""
    try:
        entries = weights_file.parse_weights_header(data, 8 + len(data) + 4096)
    except SnapshotError:
        return
    assert sum(entry.size_bytes for entry in entries) == 4096


def safetensors_checkpoint(data: bytes) -> None:
    """A checkpoint that somebody downloaded."""
    folder = scratch() / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    try:
        with SafetensorsCheckpoint(folder) as checkpoint:
            for name in checkpoint.names():
                rows = checkpoint.shape(name)[0]
                checkpoint.read_rows(name, 0, min(rows, 4))
    except BuildError:
        pass


def gguf(data: bytes) -> None:
    """A GGUF file that somebody downloaded."""
    path = scratch() / "model.gguf"
    path.write_bytes(data)
    try:
        with GgufFile(path) as file:
            for name in file.names():
                file.read_rows(name, 0, min(file.shape(name)[0], 4))
    except BuildError:
        pass


def keys(data: bytes) -> None:
    """A key file, and keys in an environment variable."""
    text = data.decode("latin-1")
    for parse in (KeyRing.from_text, lambda text: KeyRing(key_file._parse(text, "file"))):
        try:
            assert all(isinstance(key, Key) for key in parse(text)._keys.values())
        except SnapshotError:
            pass


def rollback_record(data: bytes) -> None:
    """The record of the newest manifests."""
    try:
        rollback.parse_record(data, "record")
    except SnapshotError:
        pass


def tensor_program(data: bytes) -> None:
    """A program that a guest recorded."""
    try:
        decode_program(data, num_tensors=8)
    except ProgramError:
        pass


def wasm_module(data: bytes) -> None:
    """A guest module, as it is screened before Wasmtime sees it."""
    try:
        parse_module(data)
    except GuestError:
        pass


def memory_file(data: bytes) -> int:
    """A descriptor of a file that holds ``data``; the caller closes it."""
    fd = os.memfd_create("fuzz")
    os.write(fd, data)
    return fd


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        container,
        signed_body,
        transport_header,
        transport_frames,
        encrypted_transport_frames,
        encrypted_chunk,
        whole_import,
        weights_header,
        safetensors_checkpoint,
        gguf,
        keys,
        rollback_record,
        tensor_program,
        wasm_module,
    )
}
