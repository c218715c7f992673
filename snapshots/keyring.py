"""Keys in use: HMAC-SHA256 with key ids, so that keys can be rotated without rebuilding every snapshot.

Signing and encryption keys share the key file (see key_file) and nothing else: a signing key is replaced in a second
(``glowplug resign``) and its secret destroyed when revoked, while an encryption key must live as long as its blobs.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from snapshots import key_file
from snapshots.errors import KeyRingError, SignatureInvalid
from snapshots.key_file import Key, KeyStatus

MAC_BYTES: Final = 32
MAX_KEY_ID_BYTES: Final = 64
_ENVIRONMENT_DATE: Final = "1970-01-01T00:00:00Z"


class KeyRing:
    """Keys that sign and verify manifests, and those that encrypt blobs. Immutable; safe to use from any thread."""

    def __init__(self, keys: Sequence[Key]) -> None:
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
        self._encrypter = next((key for key in reversed(keys) if key.status == "encrypt"), None)

    def __repr__(self) -> str:
        return f"KeyRing(key_ids={list(self._keys)})"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Ids of all keys, in file order."""
        return tuple(self._keys)

    @property
    def statuses(self) -> dict[str, KeyStatus]:
        """What each key may do, in file order."""
        return {key.key_id: key.status for key in self._keys.values()}

    @property
    def signing_key_id(self) -> str | None:
        """Id of the key that signs, None when every key only verifies."""
        return self._signer.key_id if self._signer else None

    @property
    def encryption_key_id(self) -> str | None:
        """Id of the key that encrypts new blobs, None where there is none."""
        return self._encrypter.key_id if self._encrypter else None

    def sign(self, data: bytes) -> tuple[str, bytes]:
        """Key id and MAC (32 bytes) over ``data``. HMAC-SHA256, RFC 2104.

        The key id is chosen before ``data`` is known to hold it; see :meth:`sign_with` where it must be inside.

        Raises:
            KeyRingError: no active key.
        """
        if self._signer is None:
            raise KeyRingError("no active key to sign with: make one with `glowplug keys new`")
        return self._signer.key_id, _mac(self._signer, data)

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
            SignatureInvalid: unknown or revoked key id, or the MAC does not match.
        """
        key = self._keys.get(key_id)
        if key is not None and key.status == "revoked":
            raise SignatureInvalid(
                f"signed with key {key_id!r}, which is revoked: whatever it signed is refused; build the snapshot again"
            )
        if key is None or key.status not in ("active", "verify"):
            raise SignatureInvalid(
                f"signed with key {key_id[:MAX_KEY_ID_BYTES]!r}, which is not in the key ring "
                f"({', '.join(self._keys)}); add that key, or build the snapshot again"
            )
        if not hmac.compare_digest(_mac(key, data), mac):
            raise SignatureInvalid(f"signature by key {key_id!r} does not match the content: it was changed")

    def encryption_secret(self, key_id: str) -> bytes:
        """Secret that a blob's own key is derived from; for snapshots.encryption alone.

        Raises:
            KeyRingError: no such encryption key.
        """
        key = self._keys.get(key_id)
        if key is None or key.status not in ("encrypt", "decrypt"):
            raise KeyRingError(
                f"no encryption key {key_id[:MAX_KEY_ID_BYTES]!r} in the key ring ({', '.join(self._keys)}); add its "
                "line to the key file, or build the snapshot again"
            )
        return key.secret

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Keys of a key file.

        Raises:
            KeyRingError: missing, a symlink, readable or writable by group or others, owned by another user, too
                large, or malformed (the message names the line, never the secret).
        """
        return cls(key_file.read_keys(path))

    @classmethod
    def from_text(cls, text: str) -> KeyRing:
        """Keys given as ``key-id:hex`` or ``key-id:hex:status``, as in an environment variable.

        Several are separated by commas; the last active one signs. Without a status a key is active.

        Raises:
            KeyRingError: malformed.
        """
        keys = []
        for number, part in enumerate(text.split(","), start=1):
            key_id, colon, rest = part.strip().partition(":")
            hex_secret, _, status = rest.partition(":")
            if not colon:
                raise KeyRingError(f"key {number} of the key text: expected KEY-ID:HEX, e.g. main:{'5f' * 4}...")
            keys.append(key_file.make_key(key_id, hex_secret, _ENVIRONMENT_DATE, status or "active", f"key {number}"))
        return cls(keys)

    @classmethod
    def generate_file(cls, path: Path, *, key_id: str | None = None) -> KeyRing:
        """Make a fresh signing key in a new file of mode 0600 (its folder is made with 0700 if missing).

        Raises:
            KeyRingError: the file exists (use :meth:`rotate`), or it cannot be written.
        """
        key = key_file.generate_key(key_id)
        key_file.create_key_file(path, key)
        return cls([key])

    @classmethod
    def rotate(cls, path: Path, *, key_id: str | None = None, encryption: bool = False) -> KeyRing:
        """Add a fresh key to a key file: it signs (or encrypts) from now on, those before it only verify (or decrypt).

        Raises:
            KeyRingError: as :meth:`from_file`; the id is taken; or the file cannot be written.
        """
        return cls(key_file.rotate_key(path, key_file.generate_key(key_id, "encrypt" if encryption else "active")))

    @classmethod
    def revoke(cls, path: Path, key_id: str) -> KeyRing:
        """Revoke a signing key of a key file: whatever it signed is refused from now on. Idempotent.

        Raises:
            KeyRingError: as :meth:`from_file`; no such key, or one that encrypts.
        """
        return cls(key_file.revoke_key(path, key_id))


def _mac(key: Key, data: bytes) -> bytes:
    return hmac.digest(key.secret, data, hashlib.sha256)
