"""Signing keys: HMAC-SHA256 with key ids, so that keys can be rotated without rebuilding every snapshot.

The key file is text, one key a line: ``key-id hex-secret created status``. ``status`` is ``active`` (signs and
verifies; the last active line signs) or ``verify`` (verifies only: rotated out). A revoked key's line is deleted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from snapshots.errors import KeyRingError, SignatureInvalid
from snapshots.regular_files import open_regular_file

KeyStatus = Literal["active", "verify"]

MAC_BYTES: Final = 32
SECRET_BYTES: Final = 32
MAX_SECRET_BYTES: Final = 128
MAX_KEY_FILE_BYTES: Final = 256 * 1024
MAX_KEY_ID_BYTES: Final = 64
_KEY_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CREATED: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
_HEADER: Final = "# glowplug snapshot keys: key-id hex-secret created status(active|verify). Keep this file private.\n"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One HMAC key. The secret never shows in ``repr``."""

    key_id: str
    secret: bytes = field(repr=False)
    created: str  # ISO 8601, UTC
    status: KeyStatus = "active"


class KeyRing:
    """Keys that sign and verify manifests. Immutable; safe to use from any thread."""

    def __init__(self, keys: Sequence[SigningKey]) -> None:
        """
        Raises:
            KeyRingError: no key, or two keys with one id.
        """
        if not keys:
            raise KeyRingError("no signing key: make one with `glowplug keys new`")
        self._keys = {key.key_id: key for key in keys}
        if len(self._keys) != len(keys):
            raise KeyRingError("two keys with the same id; every line needs its own")
        self._signer = next((key for key in reversed(keys) if key.status == "active"), None)

    def __repr__(self) -> str:
        return f"KeyRing(key_ids={list(self._keys)})"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Ids of all keys, in file order."""
        return tuple(self._keys)

    @property
    def signing_key_id(self) -> str | None:
        """Id of the key that signs, None when every key only verifies."""
        return self._signer.key_id if self._signer else None

    def sign(self, data: bytes) -> tuple[str, bytes]:
        """Key id and MAC (32 bytes) over ``data``. HMAC-SHA256, RFC 2104.

        The key id is chosen before ``data`` is known to hold it; see :meth:`sign_with` where it must be inside.

        Raises:
            KeyRingError: no active key.
        """
        key = self._require_signer()
        return key.key_id, _mac(key, data)

    def sign_with(self, key_id: str, data: bytes) -> bytes:
        """MAC over ``data`` by one named active key.

        Raises:
            KeyRingError: unknown or not active.
        """
        key = self._keys.get(key_id)
        if key is None or key.status != "active":
            raise KeyRingError(f"key {key_id!r} is not an active key of this ring")
        return _mac(key, data)

    def verify(self, key_id: str, data: bytes, mac: bytes) -> None:
        """Check ``mac`` in constant time.

        Raises:
            SignatureInvalid: unknown key id, or the MAC does not match.
        """
        key = self._keys.get(key_id)
        if key is None:
            raise SignatureInvalid(
                f"signed with key {key_id[:MAX_KEY_ID_BYTES]!r}, which is not in the key ring "
                f"({', '.join(self._keys)}); add that key, or build the snapshot again"
            )
        if not hmac.compare_digest(_mac(key, data), mac):
            raise SignatureInvalid(f"signature by key {key_id!r} does not match the content: it was changed")

    def _require_signer(self) -> SigningKey:
        if self._signer is None:
            raise KeyRingError("no active key to sign with: make one with `glowplug keys new`")
        return self._signer

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Keys of a key file.

        Raises:
            KeyRingError: missing, a symlink, readable or writable by group or others, owned by another user, too
                large, or malformed (the message names the line, never the secret).
        """
        return cls(_parse(_read_private(path), str(path)))

    @classmethod
    def from_text(cls, text: str) -> KeyRing:
        """One key given as ``key-id:hex``, as in an environment variable; several separated by commas, last signs.

        Raises:
            KeyRingError: malformed.
        """
        keys = []
        for number, part in enumerate(text.split(","), start=1):
            key_id, colon, hex_secret = part.strip().partition(":")
            if not colon:
                raise KeyRingError(f"key {number} of the key text: expected KEY-ID:HEX, e.g. main:{'5f' * 4}...")
            keys.append(_make_key(key_id, hex_secret, "1970-01-01T00:00:00Z", "active", f"key {number}"))
        return cls(keys)

    @classmethod
    def generate_file(cls, path: Path, *, key_id: str | None = None) -> KeyRing:
        """Make a fresh key in a new file of mode 0600 (its folder is made with 0700 if missing).

        Raises:
            KeyRingError: the file exists (use :meth:`add_key` to rotate), or it cannot be written.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = generate_key(key_id)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise KeyRingError(f"{path} exists already: remove it first, or add a key to it to rotate") from None
        except OSError as error:
            raise KeyRingError(f"cannot write key file {path}: {error.strerror}") from error
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(_HEADER + _format(key))
            file.flush()
            os.fsync(file.fileno())
        return cls([key])

    @classmethod
    def add_key(cls, path: Path, *, key_id: str | None = None) -> KeyRing:
        """Append a fresh key to a key file: it signs from now on, older keys go on verifying.

        Raises:
            KeyRingError: as :meth:`from_file`; or the id is taken.
        """
        text = _read_private(path)
        keys = _parse(text, str(path))
        key = generate_key(key_id)
        ring = cls([*keys, key])
        separator = "" if text.endswith("\n") else "\n"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "a", encoding="ascii") as file:
            file.write(separator + _format(key))
            file.flush()
            os.fsync(file.fileno())
        return ring


def generate_key(key_id: str | None = None) -> SigningKey:
    """A fresh random key; its id is ``k-`` and 8 hex digits unless given.

    Raises:
        KeyRingError: the id is not ``[A-Za-z0-9][A-Za-z0-9._-]{0,63}``.
    """
    key_id = key_id if key_id is not None else f"k-{secrets.token_hex(4)}"
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return _make_key(key_id, secrets.token_hex(SECRET_BYTES), created, "active", "new key")


def _mac(key: SigningKey, data: bytes) -> bytes:
    return hmac.digest(key.secret, data, hashlib.sha256)


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


def _parse(text: str, source: str) -> list[SigningKey]:
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 4:
            raise KeyRingError(
                f"{source} line {number}: {len(fields)} fields, expected 4: key-id hex-secret created status"
            )
        keys.append(_make_key(fields[0], fields[1], fields[2], fields[3], f"{source} line {number}"))
    if not keys:
        raise KeyRingError(f"{source} holds no key: make one with `glowplug keys new`")
    return keys


def _make_key(key_id: str, hex_secret: str, created: str, status: str, place: str) -> SigningKey:
    if not _KEY_ID.fullmatch(key_id):
        raise KeyRingError(f"{place}: the key id must be a letter or digit, then up to 63 of [A-Za-z0-9._-]")
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
    if not _CREATED.fullmatch(created):
        raise KeyRingError(f"{place}: created must look like 2026-01-31T12:00:00Z")
    if status not in ("active", "verify"):
        raise KeyRingError(f"{place}: status must be active or verify")
    return SigningKey(key_id, secret, created, "active" if status == "active" else "verify")


def _format(key: SigningKey) -> str:
    return f"{key.key_id} {key.secret.hex()} {key.created} {key.status}\n"
