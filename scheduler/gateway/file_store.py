"""Files that clients upload and that batches write: on disk, one folder a tenant, whole or not there.

```
FOLDER/TENANT/file-ID.data    the bytes
FOLDER/TENANT/file-ID.json    what is known of them; a file exists when this does
FOLDER/TENANT/batch_ID.N.part what run N of a batch has answered (see batch_results)
FOLDER/.upload-XXXX           on its way in; renamed when whole
```

``TENANT`` is a digest of the tenant's name, so that no name becomes a path. Several gateways share files by sharing the
folder (on several hosts: a network file system with atomic rename); one that does not see a file answers 404 for it and
leaves its batch to a gateway that does. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.errors import HttpError

FILE_PREFIX: Final = "file-"
ID_BYTES: Final = 16  # random: an id cannot be guessed, and is not the only thing that protects a file
COPY_BYTES: Final = 256 * 1024
ABANDONED_UPLOAD_S: Final = 3600.0
_DATA, _META, _UPLOAD = ".data", ".json", ".upload-"
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class StoredFile(msgspec.Struct, frozen=True):
    """What is known of a file; OpenAI's file object without its constants."""

    id: str
    filename: str
    bytes: int
    purpose: str
    created_at: int
    expires_at: int


def create_file_id() -> str:
    """A new id that nobody can guess."""
    return f"{FILE_PREFIX}{secrets.token_hex(ID_BYTES)}"


def is_file_id(text: str) -> bool:
    """Whether ``text`` has the form of a file id (so that it may go into a path)."""
    digits = text.removeprefix(FILE_PREFIX)
    return len(text) == len(FILE_PREFIX) + 2 * ID_BYTES == len(FILE_PREFIX) + len(digits) and all(
        digit in "0123456789abcdef" for digit in digits
    )


def disk_error(error: OSError, doing: str) -> GlowplugError:
    """What a client is told of a disk that refuses."""
    if error.errno in _NO_ROOM:
        message = f"the server's disk is full while {doing}: nothing was kept; delete files, or ask its operator"
        return GlowplugError(ErrorCode.OUT_OF_MEMORY, message, retry_after_s=60)
    message = f"the server's disk failed while {doing} ({error.strerror}): nothing was kept"
    return GlowplugError(ErrorCode.INTERNAL, message)


class Upload:
    """Bytes on their way into the store: ``write``, then ``publish``; leaving the ``with`` block drops the rest."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._path = folder / f"{_UPLOAD}{secrets.token_hex(8)}"
        self._file = open(self._path, "xb")  # noqa: SIM115  (closed by __exit__)
        os.chmod(self._path, 0o600)
        self.num_bytes = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is buffered once more; it is dropped anyway
            self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            GlowplugError: the disk is full or fails.
        """
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_error(error, "writing the file") from error
        self.num_bytes += len(data)

    def publish(self, tenant_folder: Path, found: StoredFile) -> StoredFile:
        """Make it ``found``, whole, on disk; ``bytes`` is set here. The same id again replaces it.

        Raises:
            GlowplugError: the disk is full or fails; nothing is there then.
        """
        stored = msgspec.structs.replace(found, bytes=self.num_bytes)
        meta = self._path.with_name(self._path.name + _META)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            tenant_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            meta.write_bytes(msgspec.json.encode(stored))
            os.replace(self._path, tenant_folder / f"{stored.id}{_DATA}")
            os.replace(meta, tenant_folder / f"{stored.id}{_META}")
        except OSError as error:
            meta.unlink(missing_ok=True)
            raise disk_error(error, "keeping the file") from error
        return stored


class FileStore:
    """The files of all tenants under ``folder``. Any number of processes may use it at once; every method blocks."""

    def __init__(self, folder: Path, *, max_tenant_bytes: int, max_tenant_files: int, retention_s: int) -> None:
        """``retention_s`` is how long files are kept, whatever their own time says less."""
        self.retention_s = retention_s
        self._folder = folder
        self._max_tenant_bytes = max_tenant_bytes
        self._max_tenant_files = max_tenant_files

    def tenant_folder(self, tenant: str) -> Path:
        """Where the files of ``tenant`` are."""
        return self._folder / hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()

    def begin_upload(self, tenant: str) -> Upload:
        """An upload for ``tenant``, which has room for at least one more file.

        Raises:
            HttpError: 429, the tenant has as many files, or as many bytes, as it may.
            GlowplugError: the disk is full or fails.
        """
        stored = self.list_files(tenant)
        used_bytes = sum(one.bytes for one in stored)
        if len(stored) >= self._max_tenant_files or used_bytes >= self._max_tenant_bytes:
            raise HttpError(
                429,
                f"{len(stored)} files of {used_bytes} bytes are kept; at most {self._max_tenant_files} files and "
                f"{self._max_tenant_bytes} bytes are: delete some with DELETE /v1/files/ID",
                code="file_quota_exceeded",
                openai_type="rate_limit_error",
            )
        return self.begin_output()

    def begin_output(self) -> Upload:
        """An upload that no quota stops: what a batch has answered must not be lost.

        Raises:
            GlowplugError: the disk is full or fails.
        """
        try:
            return Upload(self._folder)
        except OSError as error:
            raise disk_error(error, "beginning a file") from error

    def publish(self, upload: Upload, tenant: str, found: StoredFile) -> StoredFile:
        """See :meth:`Upload.publish`."""
        return upload.publish(self.tenant_folder(tenant), found)

    def find(self, tenant: str, file_id: str) -> StoredFile | None:
        """The file, None when ``tenant`` has no such one (any more)."""
        if not is_file_id(file_id):
            return None
        return self._read_meta(self.tenant_folder(tenant) / f"{file_id}{_META}")

    def data_path(self, tenant: str, file_id: str) -> Path:
        """Where the bytes of a file are. Requires: :func:`is_file_id`."""
        return self.tenant_folder(tenant) / f"{file_id}{_DATA}"

    def list_files(self, tenant: str) -> list[StoredFile]:
        """All files of ``tenant``, newest first."""
        folder = self.tenant_folder(tenant)
        found = [self._read_meta(path) for path in folder.glob(f"{FILE_PREFIX}*{_META}")] if folder.is_dir() else []
        return sorted((one for one in found if one is not None), key=lambda one: (-one.created_at, one.id))

    def delete(self, tenant: str, file_id: str) -> bool:
        """Drop a file; whether there was one."""
        if self.find(tenant, file_id) is None:
            return False
        self._unlink(self.tenant_folder(tenant), file_id)
        return True

    def drop_expired(self, now_s: float) -> int:
        """Delete what has expired, and uploads that nobody finishes; how many."""
        num_dropped = 0
        for path in self._folder.glob(f"*/{FILE_PREFIX}*{_META}"):
            if self._read_meta(path, now_s) is None:
                self._unlink(path.parent, path.name.removesuffix(_META))
                num_dropped += 1
        old = [(path, ABANDONED_UPLOAD_S) for path in self._folder.glob(f"{_UPLOAD}*")]
        old += [(path, self.retention_s) for path in self._folder.glob("*/*.part")]
        for path, life_s in old:
            with contextlib.suppress(FileNotFoundError):
                if now_s - path.stat().st_mtime > life_s:
                    path.unlink()
                    num_dropped += 1
        return num_dropped

    @staticmethod
    def _unlink(folder: Path, file_id: str) -> None:
        (folder / f"{file_id}{_META}").unlink(missing_ok=True)  # first: without it there is no file
        (folder / f"{file_id}{_DATA}").unlink(missing_ok=True)

    @staticmethod
    def _read_meta(path: Path, now_s: float | None = None) -> StoredFile | None:
        try:
            found = msgspec.json.decode(path.read_bytes(), type=StoredFile)
        except (OSError, msgspec.MsgspecError):
            return None
        return None if found.expires_at <= (time.time() if now_s is None else now_s) else found
