"""The key file: text, one key a line, ``key-id hex-secret created status``; private to its owner.

=========== ============================================================================================
status      what the key may do
=========== ============================================================================================
``active``  signs and verifies manifests; the last active line signs
``verify``  verifies manifests: rotated out
``revoked`` nothing: what it signed is refused by name. Its secret is gone, the field holds ``-``
``encrypt`` encrypts and decrypts blobs; the last such line encrypts
``decrypt`` decrypts blobs: rotated out
=========== ============================================================================================

Changes write a whole new file beside the old one and rename it, so that a reader sees one or the other.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, get_args

from snapshots.errors import KeyRingError
from snapshots.regular_files import open_regular_file

KeyStatus = Literal["active", "verify", "revoked", "encrypt", "decrypt"]

SECRET_BYTES: Final = 32
MAX_SECRET_BYTES: Final = 128
MAX_KEY_FILE_BYTES: Final = 256 * 1024
KEY_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STATUSES: Final[tuple[KeyStatus, ...]] = get_args(KeyStatus)
#: What becomes of a status when a newer key takes its place.
_ROTATED_OUT: Final[dict[KeyStatus, KeyStatus]] = {"active": "verify", "encrypt": "decrypt"}
_NO_SECRET: Final = "-"
_CREATED: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
_HEADER: Final = (
    "# glowplug snapshot keys: key-id hex-secret created status(active|verify|revoked|encrypt|decrypt).\n"
    "# Keep this file private.\n"
)


@dataclass(frozen=True, slots=True)
class Key:
    """One key. The secret never shows in ``repr``; a revoked key has none."""

    key_id: str
    secret: bytes = field(repr=False)
    created: str  # ISO 8601, UTC
    status: KeyStatus = "active"


def generate_key(key_id: str | None = None, status: KeyStatus = "active") -> Key:
    """A fresh random key; its id is ``k-`` (``e-`` where it encrypts) and 8 hex digits unless given.

    Raises:
        KeyRingError: the id is not ``[A-Za-z0-9][A-Za-z0-9._-]{0,63}``.
    """
    prefix = "e" if status == "encrypt" else "k"
    key_id = key_id if key_id is not None else f"{prefix}-{secrets.token_hex(4)}"
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return make_key(key_id, secrets.token_hex(SECRET_BYTES), created, status, "new key")


def make_key(key_id: str, hex_secret: str, created: str, status: str, place: str) -> Key:
    """A key from its fields, checked; ``place`` is for the error.

    Raises:
        KeyRingError: malformed. Never quotes any of the secret.
    """
    if not KEY_ID.fullmatch(key_id):
        raise KeyRingError(f"{place}: the key id must be a letter or digit, then up to 63 of [A-Za-z0-9._-]")
    known = next((candidate for candidate in _STATUSES if candidate == status), None)
    if known is None:
        raise KeyRingError(f"{place}: status must be one of {', '.join(_STATUSES)}")
    if not _CREATED.fullmatch(created):
        raise KeyRingError(f"{place}: created must look like 2026-01-31T12:00:00Z")
    if known == "revoked":
        return Key(key_id, b"", created, known)
    try:
        secret = bytes.fromhex(hex_secret)
    except ValueError:
        # "from None": the cause's text would quote a part of the secret.
        raise KeyRingError(f"{place}: the secret of key {key_id!r} is not hexadecimal") from None
    if not SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise KeyRingError(
            f"{place}: the secret of key {key_id!r} has {len(secret)} bytes, "
            f"expected {SECRET_BYTES} to {MAX_SECRET_BYTES}"
        )
    return Key(key_id, secret, created, known)


def read_keys(path: Path) -> list[Key]:
    """Keys of a key file, in its order.

    Raises:
        KeyRingError: missing, a symlink, readable or writable by group or others, owned by another user, too large,
            or malformed (the message names the line, never the secret).
    """
    return _parse(_read_private(path), str(path))


def create_key_file(path: Path, key: Key) -> None:
    """Write ``key`` to a new file of mode 0600 (its folder is made with 0700 if missing).

    Raises:
        KeyRingError: the file exists, or it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeyRingError(f"cannot make folder {path.parent} for a key file: {error.strerror}") from error
    _write_new(path, _HEADER + _format(key))


def rotate_key(path: Path, key: Key) -> list[Key]:
    """Append ``key``; keys that did its work before only verify (or decrypt) from now on. All keys of the file.

    Raises:
        KeyRingError: as :func:`read_keys`; the id is taken; or the file cannot be written.
    """

    def demote(old: Key) -> Key:
        return replace(old, status=_ROTATED_OUT[old.status]) if old.status == key.status else old

    if key.key_id in {known.key_id for known in read_keys(path)}:
        raise KeyRingError(f"{path} has a key {key.key_id!r} already (two keys with the same id); choose another id")
    return _rewrite(path, demote, key)


def revoke_key(path: Path, key_id: str) -> list[Key]:
    """Revoke a signing key: its secret is removed, its id stays so that what it signed is refused by name. Idempotent.

    Raises:
        KeyRingError: as :func:`read_keys`; no such key; or it encrypts (what it encrypted could never be read again).
    """
    known = {key.key_id: key for key in read_keys(path)}
    if key_id not in known:
        raise KeyRingError(f"{path} has no key {key_id[:70]!r}; it has {', '.join(known)}")
    if known[key_id].status in ("encrypt", "decrypt"):
        raise KeyRingError(
            f"key {key_id!r} encrypts: without it, blobs that need it could never be read again. Rotate it with "
            "`glowplug keys rotate --encryption`, build those snapshots again, then delete its line"
        )
    return _rewrite(path, lambda key: replace(key, secret=b"", status="revoked") if key.key_id == key_id else key)


def _rewrite(path: Path, change: Callable[[Key], Key], *more: Key) -> list[Key]:
    """A new file with every key changed, comments kept, ``more`` appended; renamed over the old one."""
    keys: list[Key] = []
    lines: list[str] = []
    for line in _read_private(path).splitlines():
        if _is_key(line):
            keys += [change(key) for key in _parse(line, str(path))]
            lines.append(_format(keys[-1]))
        else:
            lines.append(line + "\n")
    lines += [_format(key) for key in more]
    tmp_path = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write_new(tmp_path, "".join(lines))
    try:
        tmp_path.rename(path)
        folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
    except OSError as error:
        tmp_path.unlink(missing_ok=True)
        raise KeyRingError(f"cannot replace key file {path}: {error.strerror}") from error
    return [*keys, *more]


def _write_new(path: Path, text: str) -> None:
    """A file that holds all of ``text``, or none at all."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyRingError(f"{path} exists already: remove it first, or add a key to it to rotate") from None
    except OSError as error:
        raise KeyRingError(f"cannot write key file {path}: {error.strerror}") from error
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise KeyRingError(f"cannot write key file {path}: {error.strerror}") from error


def _read_private(path: Path) -> str:
    try:
        fd, status = open_regular_file(path)
    except FileNotFoundError:
        raise KeyRingError(f"no key file {path}: make one with `glowplug keys new`") from None
    except OSError as error:
        raise KeyRingError(f"cannot open key file {path} (symlinks are not followed): {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise KeyRingError(f"key file {path} has mode {mode:04o}: others must not read it; chmod 600 {path}")
        if status.st_uid not in (os.geteuid(), 0):
            raise KeyRingError(f"key file {path} belongs to user {status.st_uid}, expected {os.geteuid()} or root")
        data = file.read(MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise KeyRingError(f"key file {path} is larger than {MAX_KEY_FILE_BYTES} bytes")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise KeyRingError(f"key file {path} is not ASCII text") from None


def _is_key(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def _parse(text: str, source: str) -> list[Key]:
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not _is_key(line):
            continue
        fields: Sequence[str] = line.split()
        if len(fields) != 4:
            raise KeyRingError(
                f"{source} line {number}: {len(fields)} fields, expected 4: key-id hex-secret created status"
            )
        keys.append(make_key(fields[0], fields[1], fields[2], fields[3], f"{source} line {number}"))
    if not keys:
        raise KeyRingError(f"{source} holds no key: make one with `glowplug keys new`")
    return keys


def _format(key: Key) -> str:
    return f"{key.key_id} {key.secret.hex() or _NO_SECRET} {key.created} {key.status}\n"
