"""Refuses an older manifest of a name that was seen newer: a signature says who wrote it, not that it is the last.

The record lies beside the key file, not in the store: who can replace a manifest can replace whatever lies beside it,
and the place of the keys is trusted already. One line a snapshot: ``name created_at_s snapshot_id``. What was never
seen is trusted once. Where the record cannot be written it is kept in memory, for as long as the process lives.
"""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import threading
from pathlib import Path
from typing import Final, NamedTuple

from snapshots.errors import RolledBack, StoreError
from snapshots.manifest import NAME, Manifest
from snapshots.regular_files import open_regular_file

MAX_RECORD_BYTES: Final = 16 * 1024 * 1024
RECORD_NAME: Final = "snapshot.newest"
#: Two builds of one name are at least this far apart.
STEP_S: Final = 0.001


class Seen(NamedTuple):
    """The newest manifest of a name."""

    created_at_s: float
    snapshot_id: str


class NewestSeen:
    """The record at ``path``; None keeps it in memory. Safe from any thread and process; blocks on the disk."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: dict[str, Seen] = {}
        self._stamp: tuple[int, int, int] | None = None

    def admit(self, manifest: Manifest) -> None:
        """Take note of a verified manifest.

        Raises:
            RolledBack: a newer one of that name was seen.
            StoreError: the record is no record.
        """
        with self._lock:
            self._refresh()
            seen = self._seen.get(manifest.name)
            if seen is not None and manifest.created_at_s < seen.created_at_s:
                raise RolledBack(manifest.name, manifest.created_at_s, seen.created_at_s, seen.snapshot_id)
            if seen is None or manifest.created_at_s > seen.created_at_s:
                self._record(manifest, only_newer=True)

    def go_back_to(self, manifest: Manifest) -> None:
        """Let an older manifest in, because its owner says so. Call it before the manifest is published.

        Raises:
            StoreError: the record is no record.
        """
        with self._lock:
            self._refresh()
            seen = self._seen.get(manifest.name)
            if seen is not None and manifest.created_at_s < seen.created_at_s:
                self._record(manifest, only_newer=False)

    def choose_created_at_s(self, name: str, now_s: float) -> float:
        """A time for a new build of ``name``: now, or a little after what was seen if the clock went back."""
        with self._lock:
            self._refresh()
            seen = self._seen.get(name)
        return now_s if seen is None else max(now_s, seen.created_at_s + STEP_S)

    def _record(self, manifest: Manifest, *, only_newer: bool) -> None:
        fresh = Seen(manifest.created_at_s, manifest.snapshot_id)
        self._seen[manifest.name] = fresh
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder_fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # no place to write: memory has it
        try:
            fcntl.flock(folder_fd, fcntl.LOCK_EX)  # between reading and renaming nobody else writes
            self._refresh(force=True)
            known = self._seen.get(manifest.name)
            if only_newer and known is not None and known.created_at_s > fresh.created_at_s:
                return
            self._seen[manifest.name] = fresh
            self._write(self._path)
        except OSError:
            self._seen[manifest.name] = fresh  # a folder that is read-only for us: memory has it
        finally:
            os.close(folder_fd)

    def _write(self, path: Path) -> None:
        tmp_path = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        fd = os.open(tmp_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                for name, seen in sorted(self._seen.items()):
                    file.write(f"{name} {seen.created_at_s!r} {seen.snapshot_id}\n")
                file.flush()
                os.fsync(file.fileno())
            tmp_path.rename(path)
        finally:
            tmp_path.unlink(missing_ok=True)

    def _refresh(self, *, force: bool = False) -> None:
        """Take in what other processes wrote since."""
        if self._path is None:
            return
        try:
            fd, status = open_regular_file(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"cannot read {self._path} (symlinks are not followed): {error.strerror}") from error
        with os.fdopen(fd, "rb") as file:
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._stamp and not force:
                return
            data = file.read(MAX_RECORD_BYTES + 1)
        self._seen.update(parse_record(data, str(self._path)))  # also where another process went back on purpose
        self._stamp = stamp


def parse_record(data: bytes, source: str) -> dict[str, Seen]:
    """Lines of a record.

    Raises:
        StoreError: over the cap, or a line that is none.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise StoreError(f"{source} is larger than {MAX_RECORD_BYTES} bytes")
    seen: dict[str, Seen] = {}
    for number, line in enumerate(data.decode("ascii", errors="replace").splitlines(), start=1):
        fields = line.split(" ")
        try:
            created_at_s = float(fields[1])
        except (IndexError, ValueError):
            created_at_s = math.nan
        if len(fields) != 3 or not NAME.fullmatch(fields[0]) or not math.isfinite(created_at_s):
            raise StoreError(
                f"{source} line {number} is not `name created_at_s snapshot_id`; repair it, or remove the file: "
                "what is in the store is then trusted once"
            )
        seen[fields[0]] = Seen(created_at_s, fields[2])
    return seen
