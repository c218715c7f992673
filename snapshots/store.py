"""The store of snapshots on local disk: content-addressed blobs and signed manifests.

``<root>/blobs/<2 hex>/<64 hex>`` · ``<root>/manifests/<name>.gpsnap`` · ``<root>/tmp/`` · ``<root>/lock``. Every file
is written under ``tmp``, fsynced and renamed, so that a reader sees all of it or nothing. Several processes may use one
store at once: publishing takes the lock file shared, :meth:`SnapshotStore.collect_garbage` takes it exclusively.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from snapshots import chunks, fs_verity, verification
from snapshots.blob_reference import BlobRef
from snapshots.blob_writer import TMP_PREFIX, BlobFile, BlobWriter, create_locked_file, write_fully
from snapshots.errors import SnapshotError, SnapshotNotFound, StoreError, describe_disk_error
from snapshots.keyring import KeyRing
from snapshots.manifest import MAX_MANIFEST_BYTES, NAME, Manifest, open_manifest, seal_manifest
from snapshots.regular_files import open_regular_file
from snapshots.rollback import NewestSeen
from snapshots.verification import Problem

MANIFEST_SUFFIX: Final = ".gpsnap"
TMP_STALE_AFTER_S: Final = 3600.0
GARBAGE_GRACE_S: Final = 24 * 3600.0
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FOLDER_MODE: Final = 0o700


class ManifestStamp(NamedTuple):
    """Changes whenever a manifest file is replaced; a cheap sign that it must be read again."""

    inode: int
    changed_ns: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What a collection removed."""

    num_blobs: int
    freed_bytes: int


class SnapshotStore:
    """Snapshots below ``root``; made if missing. Holds no state but paths: safe from any thread and process.

    All methods block on the disk. Symlinks inside the store are never followed.
    """

    def __init__(
        self, root: Path, *, tmp_stale_after_s: float = TMP_STALE_AFTER_S, newest: NewestSeen | None = None
    ) -> None:
        """``newest`` refuses manifests older than those seen before; None takes any that is signed.

        Raises:
            StoreError: the folders cannot be made, or one of them is a symlink.
        """
        self.root = Path(root).absolute()
        self._blobs = self.root / "blobs"
        self._manifests = self.root / "manifests"
        self._tmp = self.root / "tmp"
        self._newest = newest
        for folder in (self.root, self._blobs, self._manifests, self._tmp):
            _ensure_folder(folder, may_be_symlink=folder == self.root)
        self._sweep_tmp(tmp_stale_after_s)

    @property
    def manifests_folder(self) -> Path:
        """Where each snapshot has one file, whose appearing, change and end are renames and removals; read only."""
        return self._manifests

    def __repr__(self) -> str:
        return f"SnapshotStore({str(self.root)!r})"

    # Blobs.

    def add_blob(
        self,
        *,
        chunk_bytes: int = chunks.DEFAULT_CHUNK_BYTES,
        encrypt_with: KeyRing | None = None,
        with_verity: bool = False,
    ) -> BlobWriter:
        """A streaming writer: ``with store.add_blob() as writer: writer.write(...)``, then ``writer.ref``.

        On success the blob is durable at its address (a damaged file there is replaced). On failure nothing is left.

        Raises:
            KeyRingError: ``encrypt_with`` has no key that encrypts.
        """
        return BlobWriter(self._tmp, self, chunk_bytes, encrypt_with=encrypt_with, with_verity=with_verity)

    def add_blob_bytes(
        self,
        data: bytes,
        *,
        chunk_bytes: int = chunks.DEFAULT_CHUNK_BYTES,
        encrypt_with: KeyRing | None = None,
        with_verity: bool = False,
    ) -> BlobRef:
        """Store ``data`` as a blob.

        Raises:
            StoreError: empty, too large, or the disk refused it.
            KeyRingError: ``encrypt_with`` has no key that encrypts.
        """
        with self.add_blob(chunk_bytes=chunk_bytes, encrypt_with=encrypt_with, with_verity=with_verity) as writer:
            writer.write(data)
        return writer.ref

    def add_blob_file(self) -> BlobFile:
        """A file for stored bytes whose reference is known: the caller verifies them, syncs, and publishes."""
        return BlobFile(self._tmp, self)

    def blob_path(self, ref: BlobRef) -> Path:
        """Where the blob's file is or would be. Nothing says that its bytes are right: see mapping.seal_blob.

        Raises:
            StoreError: the digest is not 64 lower-case hex digits.
        """
        if not _DIGEST.fullmatch(ref.digest):
            raise StoreError(f"blob digest {ref.digest[:70]!r} is not 64 lower-case hex digits")
        address = ref.address
        return self._blobs / address[:2] / address

    def publish_blob(self, tmp_path: Path, ref: BlobRef) -> None:
        """Move a finished, fsynced file to its address. For BlobWriter."""
        target = self.blob_path(ref)
        with self._locked(exclusive=False):
            _ensure_folder(target.parent)
            tmp_path.rename(target)
            sync_folder(target.parent)
            sync_folder(self._blobs)

    # Manifests.

    def write_manifest(self, manifest: Manifest, keyring: KeyRing) -> Path:
        """Sign ``manifest`` and publish it under its name, replacing an older one atomically.

        Requires: all its blobs are in the store. On success: the snapshot is durable and visible, and the newest of
        its name. On failure: whatever had that name before is unchanged.

        Raises:
            StoreError: a blob is missing or has another size; the disk refused the file.
            ManifestMalformed: the manifest contradicts itself.
            KeyRingError: no active key.
        """
        return self.publish_manifest(seal_manifest(manifest, keyring), manifest)

    def publish_manifest(self, data: bytes, manifest: Manifest) -> Path:
        """Publish a container file as it is. Requires: it was verified to hold ``manifest``. Otherwise as
        :meth:`write_manifest`.
        """
        target = self._manifest_path(manifest.name)
        if self._newest is not None:
            self._newest.go_back_to(manifest)  # before it is visible: a watching agent reads it once
        tmp_path = self._tmp / f"{TMP_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        fd = create_locked_file(tmp_path)
        try:
            write_fully(fd, data)
            os.fchmod(fd, 0o644)
            os.fsync(fd)
            with self._locked(exclusive=False):
                self._require_blobs(manifest)
                for ref in manifest.blobs.values():
                    if ref.verity_sha256 is not None:
                        fs_verity.enable_verity(self.blob_path(ref))
                tmp_path.rename(target)
                sync_folder(self._manifests)
        except OSError as error:
            raise StoreError(f"cannot write manifest {target}: {describe_disk_error(error)}") from error
        finally:
            os.close(fd)
            tmp_path.unlink(missing_ok=True)
        if self._newest is not None:
            self._newest.admit(manifest)
        return target

    def read_manifest(self, name: str, keyring: KeyRing) -> Manifest:
        """The verified manifest of snapshot ``name``.

        Raises:
            SnapshotNotFound: no such snapshot.
            SignatureInvalid, ManifestMalformed, Incompatible: see manifest.open_manifest.
            RolledBack: a newer one was seen.
            StoreError: a bad name, or not a regular file.
        """
        return self.read_signed(name, keyring)[0]

    def read_signed(self, name: str, keyring: KeyRing) -> tuple[Manifest, bytes]:
        """The verified manifest of ``name`` and the very container file that holds it. Raises as read_manifest."""
        container = self.read_container(name)
        manifest = open_manifest(container, keyring, name=name)
        self.admit(manifest)
        return manifest, container

    def read_container(self, name: str) -> bytes:
        """The manifest file of ``name`` as it is: nothing of it is verified.

        Raises:
            SnapshotNotFound: no such snapshot.
            StoreError: a bad name, or not a regular file.
        """
        path = self._manifest_path(name)
        try:
            fd, _ = open_regular_file(path)
        except FileNotFoundError:
            raise SnapshotNotFound(
                f"no snapshot {name!r} in {self.root}; build it: glowplug build SOURCE --name {name}"
            ) from None
        except OSError as error:
            raise StoreError(f"cannot open {path} (symlinks are not followed): {error.strerror}") from error
        with os.fdopen(fd, "rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)  # one more than allowed: open_manifest refuses it by its size

    def admit(self, manifest: Manifest) -> None:
        """Check a verified manifest from elsewhere against what was seen here under its name.

        Raises:
            RolledBack: a newer one was seen.
        """
        if self._newest is not None:
            self._newest.admit(manifest)

    def choose_created_at_s(self, name: str) -> float:
        """Time of a new build of ``name``: now, but after every earlier one that was seen."""
        now_s = time.time()
        return now_s if self._newest is None else self._newest.choose_created_at_s(name, now_s)

    def list_names(self) -> list[str]:
        """Names of all snapshots, sorted; whether they verify is another question."""
        return sorted(self.list_stamps())

    def list_stamps(self) -> dict[str, ManifestStamp]:
        """Every snapshot's name with a stamp that changes when its manifest file is replaced."""
        stamps = {}
        with os.scandir(self._manifests) as entries:
            for entry in entries:
                name = entry.name.removesuffix(MANIFEST_SUFFIX)
                if name == entry.name or not NAME.fullmatch(name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed since the folder was read
                if stat.S_ISREG(status.st_mode):
                    stamps[name] = ManifestStamp(status.st_ino, status.st_ctime_ns, status.st_size)
        return stamps

    def verify(
        self,
        name: str,
        keyring: KeyRing,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        num_threads: int | None = None,
    ) -> list[Problem]:
        """Check a snapshot wholly, on disk: manifest, then every chunk of every blob. Empty: all is well.

        ``on_progress(done_bytes, total_bytes)`` is called from the calling thread.

        Raises:
            SnapshotNotFound: no such snapshot.
            StoreError: a bad name.
        """
        self._manifest_path(name)  # refuse a bad name here: below, an error of the store is a finding
        try:
            manifest = self.read_manifest(name, keyring)
        except SnapshotNotFound:
            raise
        except SnapshotError as error:
            return [Problem("manifest", str(error))]
        files = [(role, self.blob_path(ref), ref) for role, ref in manifest.blobs.items()]
        return verification.verify_blobs(files, on_progress, keyring=keyring, num_threads=num_threads)

    def remove(self, name: str) -> None:
        """Delete the manifest of ``name``; its blobs go with the next collection. Running workers are unaffected.

        Raises:
            SnapshotNotFound: no such snapshot.
            StoreError: a bad name.
        """
        path = self._manifest_path(name)
        try:
            path.unlink()
        except FileNotFoundError:
            raise SnapshotNotFound(f"no snapshot {name!r} in {self.root}") from None
        sync_folder(self._manifests)

    def collect_garbage(self, keyring: KeyRing, *, grace_s: float = GARBAGE_GRACE_S) -> GarbageReport:
        """Delete blobs that no manifest names and that are older than ``grace_s`` (a build in progress has blobs
        before it has a manifest). Blocks publishing while it runs.

        Raises:
            SnapshotError: a manifest cannot be read, so what it needs is unknown; nothing was deleted.
        """
        num_blobs = freed_bytes = 0
        with self._locked(exclusive=True):
            needed: set[str] = set()
            for name in self.list_names():
                needed.update(ref.address for ref in self.read_manifest(name, keyring).blobs.values())
            oldest_kept_at_s = time.time() - grace_s
            for path in self._blobs.glob("[0-9a-f][0-9a-f]/*"):
                status = path.lstat()
                if path.name in needed or status.st_mtime > oldest_kept_at_s or not stat.S_ISREG(status.st_mode):
                    continue
                path.unlink()
                num_blobs += 1
                freed_bytes += status.st_size
        return GarbageReport(num_blobs, freed_bytes)

    # Inside.

    def _manifest_path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise StoreError(f"snapshot name {name[:140]!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}")
        return self._manifests / f"{name}{MANIFEST_SUFFIX}"

    def _require_blobs(self, manifest: Manifest) -> None:
        for role, ref in manifest.blobs.items():
            try:
                status = self.blob_path(ref).lstat()
            except FileNotFoundError:
                raise StoreError(
                    f"blob {role} ({ref.digest}) is not in the store: add it before its manifest"
                ) from None
            if not stat.S_ISREG(status.st_mode) or status.st_size != ref.file_bytes:
                raise StoreError(f"blob {role} ({ref.digest}) is not a regular file of {ref.file_bytes} bytes")

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[None]:
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)  # drops the lock

    def _sweep_tmp(self, stale_after_s: float) -> None:
        """Remove what dead writers left: old, and no living process holds its lock."""
        oldest_kept_at_s = time.time() - stale_after_s
        for path in self._tmp.glob(f"{TMP_PREFIX}*"):
            try:
                if path.lstat().st_mtime > oldest_kept_at_s:
                    continue
                fd, _ = open_regular_file(path)
            except OSError:
                continue  # renamed or removed by its writer meanwhile, or not ours to open
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                pass  # a living writer
            finally:
                os.close(fd)


def _ensure_folder(path: Path, *, may_be_symlink: bool = False) -> None:
    try:
        path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        is_folder = stat.S_ISDIR((path.stat() if may_be_symlink else path.lstat()).st_mode)
    except OSError as error:
        raise StoreError(f"cannot make folder {path}: {describe_disk_error(error)}") from error
    if not is_folder:
        raise StoreError(f"{path} is a symlink; the store does not follow it. Remove it")


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable.

    Raises:
        OSError: the disk refused it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
