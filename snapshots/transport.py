"""Export and import of a snapshot as one file, streamed chunk by chunk on all cores with bounded memory.

Both directions verify every chunk against the signed manifest: what is damaged is not exported, and what comes in is
believed only as far as its signature and digests go. Encrypted blobs travel encrypted (see packed_chunks), and need
their key on both sides.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from snapshots import chunks
from snapshots.blob_reference import SALT_BYTES
from snapshots.blob_writer import write_fully
from snapshots.errors import SnapshotError, TransportError, describe_disk_error
from snapshots.keyring import KeyRing
from snapshots.manifest import NAME, Manifest, open_manifest, seal_manifest
from snapshots.packed_chunks import ChunkPacker, ChunkUnpacker, ExportCiphers
from snapshots.regular_files import open_regular_file
from snapshots.store import SnapshotStore, sync_folder
from snapshots.stored_chunks import StoredChunks
from snapshots.transport_format import (
    Frame,
    list_blobs,
    list_chunks,
    pack_header,
    pack_seek_table,
    read_frames,
    read_header,
)
from snapshots.verification import open_blob_file

DEFAULT_LEVEL: Final = 3
MIN_LEVEL: Final = 1
MAX_LEVEL: Final = 22
#: Chunks in flight for each thread: one is worked on, one waits.
CHUNKS_PER_THREAD: Final = 2

Item = TypeVar("Item")
Result = TypeVar("Result")
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TransportReport:
    """What went through. ``stored_bytes`` is the size of the blobs' files, ``file_bytes`` of the transport file."""

    name: str
    snapshot_id: str
    num_chunks: int
    stored_bytes: int
    file_bytes: int


def export_snapshot(
    store: SnapshotStore,
    name: str,
    keyring: KeyRing,
    target: Path,
    *,
    level: int = DEFAULT_LEVEL,
    num_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> TransportReport:
    """Write snapshot ``name`` to the new file ``target``. Blocks. ``on_progress(done_bytes, total_bytes)`` per chunk.

    On success: the file is durable and holds only verified chunks. On failure: nothing is left.

    Raises:
        SnapshotError: the snapshot does not verify, or a key for its blobs is missing.
        TransportError: ``target`` exists, cannot be written, or the level is none.
    """
    if not MIN_LEVEL <= level <= MAX_LEVEL:
        raise TransportError(f"compression level {level}: expected {MIN_LEVEL} to {MAX_LEVEL}")
    manifest, container = store.read_signed(name, keyring)
    blobs = [StoredChunks(ref, role, keyring) for role, ref in list_blobs(manifest)]
    salt = secrets.token_bytes(SALT_BYTES) if any(stored.ref.encryption for stored in blobs) else b""
    packer = ChunkPacker(level, ExportCiphers(blobs, keyring, salt))
    header = pack_header(container, salt)
    total_bytes = sum(stored.ref.file_bytes for stored in blobs)
    entries = [(len(header), 0)]
    done_bytes = 0
    with ExitStack() as stack:
        fds = {stored.label: _open_blob(stack, store, stored) for stored in blobs}
        fd = stack.enter_context(_new_file(target))
        write_fully(fd, header)
        work = ((fds[stored.label], stored, index) for stored, index in list_chunks(blobs))
        for frame, content_bytes, stored_bytes in _in_order(packer.pack, work, num_threads):
            write_fully(fd, frame)
            entries.append((len(frame), content_bytes))
            done_bytes += stored_bytes
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
        write_fully(fd, pack_seek_table(entries))
        file_bytes = os.fstat(fd).st_size
    return TransportReport(name, manifest.snapshot_id, len(entries) - 1, total_bytes, file_bytes)


def import_snapshot(
    store: SnapshotStore,
    source: Path,
    keyring: KeyRing,
    *,
    name: str | None = None,
    allow_older: bool = False,
    num_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Manifest, TransportReport]:
    """Bring a transport file into the store. Blocks. ``on_progress(done_bytes, total_bytes)`` per chunk.

    ``name`` signs it anew under another name, which needs a signing key. ``allow_older`` replaces a newer snapshot.
    On success: as after a build. On failure: nothing is published, and what had the name before is unchanged.

    Raises:
        TransportError: the file is not one, was truncated, extended or changed.
        SignatureInvalid, ManifestMalformed, Incompatible, RolledBack: its manifest is refused.
        BlobCorrupt: a chunk is not the signed one.
        KeyRingError: the key of an encrypted blob, or one to sign with, is missing.
        StoreError: the store refuses it.
    """
    try:
        fd, status = open_regular_file(source)
    except OSError as error:
        raise TransportError(f"cannot open {source} (symlinks are not followed): {error.strerror}") from error
    try:
        header = read_header(fd, status.st_size)
        container = header.container
        manifest = open_manifest(container, keyring, name=None)
        if name is not None and name != manifest.name:
            manifest, container = _rename(manifest, name, keyring)
        if not allow_older:
            store.admit(manifest)
        blobs = [StoredChunks(ref, role, keyring) for role, ref in list_blobs(manifest)]
        frames = read_frames(fd, status.st_size, header, blobs)
        unpacker = ChunkUnpacker(fd, ExportCiphers(blobs, keyring, header.salt))
        _import_blobs(store, unpacker, blobs, frames, num_threads, on_progress)
        store.publish_manifest(container, manifest)
    finally:
        os.close(fd)
    stored_bytes = sum(stored.ref.file_bytes for stored in blobs)
    return manifest, TransportReport(manifest.name, manifest.snapshot_id, len(frames), stored_bytes, status.st_size)


def _import_blobs(
    store: SnapshotStore,
    unpacker: ChunkUnpacker,
    blobs: list[StoredChunks],
    frames: list[Frame],
    num_threads: int | None,
    on_progress: OnProgress | None,
) -> None:
    """Write every blob beside its place; publish them when all of them are whole."""
    total_bytes = sum(stored.ref.file_bytes for stored in blobs)
    done_bytes = 0
    with ExitStack() as stack:
        files = {stored.label: stack.enter_context(store.add_blob_file()) for stored in blobs}
        for frame, stored_chunk in _in_order(unpacker.unpack, frames, num_threads):
            files[frame.stored.label].write(stored_chunk)
            done_bytes += len(stored_chunk)
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
        for stored in blobs:
            files[stored.label].sync()
        for stored in blobs:
            files[stored.label].publish(stored.ref)


def _rename(manifest: Manifest, name: str, keyring: KeyRing) -> tuple[Manifest, bytes]:
    if not NAME.fullmatch(name):
        raise TransportError(f"snapshot name {name[:140]!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}")
    renamed = msgspec.structs.replace(manifest, name=name)
    return renamed, seal_manifest(renamed, keyring)


def _in_order(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int | None) -> Iterator[Result]:
    """``map`` on threads that never runs further ahead than a few items, so that memory stays bounded."""
    num_threads = num_threads or chunks.available_cores()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="transport") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= num_threads * CHUNKS_PER_THREAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _open_blob(stack: ExitStack, store: SnapshotStore, stored: StoredChunks) -> int:
    fd = open_blob_file(store.blob_path(stored.ref), stored.ref, stored.label)
    stack.callback(os.close, fd)
    return fd


@contextmanager
def _new_file(target: Path) -> Iterator[int]:
    """A file that appears under its name, durable, when the block ends cleanly; else nothing is left.

    Raises:
        TransportError: it exists already, or the disk refuses it.
    """
    tmp_path = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        if os.path.lexists(target):
            raise TransportError(f"{target} exists already: remove it, or choose another name")
        fd = os.open(tmp_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            yield fd
            os.fsync(fd)
            tmp_path.rename(target)
            sync_folder(target.parent)
        finally:
            os.close(fd)
            tmp_path.unlink(missing_ok=True)
    except SnapshotError:
        raise
    except OSError as error:
        raise TransportError(f"cannot write {target}: {describe_disk_error(error)}") from error
