"""AES-256-GCM for each chunk of a blob: what lies on disk is ciphertext, plain bytes exist in memory alone.

Every encrypted blob has its own key: HKDF-SHA256 (RFC 5869) of an encryption key's secret, salted by 32 random bytes
that are drawn once for each writing and signed in the manifest. So a nonce may simply count: it is the chunk's index,
and no pair of key and nonce is ever used twice. The chunk's plain digest and its index are authenticated along with
it (AAD), which binds a ciphertext to one place of one content.

Source: NIST SP 800-38D for GCM; at most 2^26 chunks of at most 64 MiB each, below its limit of 2^36 - 32 bytes a nonce.
"""

from __future__ import annotations

import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snapshots.errors import KeyRingError
from snapshots.keyring import KeyRing
from snapshots.manifest import SALT_BYTES, TAG_BYTES, BlobEncryption

_KEY_INFO: Final = b"glowplug 2026 blob encryption key v1"
_AAD_CONTEXT: Final = b"glowplug 2026 blob chunk v1"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class ChunkNotAuthentic(Exception):
    """A chunk's ciphertext or tag was changed, or belongs elsewhere. Caught inside this package."""


class BlobCipher:
    """Encrypts and decrypts the chunks of one blob. Safe from any thread; releases the GIL."""

    def __init__(self, secret: bytes, salt: bytes) -> None:
        self._aead = AESGCM(HKDF(SHA256(), _KEY_BYTES, salt=salt, info=_KEY_INFO).derive(secret))

    def encrypt(self, plain: bytes | bytearray | memoryview, digest: bytes, index: int) -> bytes:
        """Ciphertext of chunk ``index``, whose plain digest is ``digest``, and its 16-byte tag.

        Requires: each index is used once for this cipher.
        """
        return self._aead.encrypt(_nonce(index), bytes(plain), _aad(digest, index))

    def decrypt_into(self, stored: bytes | memoryview, digest: bytes, index: int, into: bytearray | memoryview) -> None:
        """Plain bytes of chunk ``index``, written to ``into``, which is exactly as long as they are.

        Raises:
            ChunkNotAuthentic: ``into`` then holds nothing of use.
        """
        if len(stored) != len(into) + TAG_BYTES:
            raise ChunkNotAuthentic
        try:
            self._aead.decrypt_into(_nonce(index), stored, _aad(digest, index), into)
        except InvalidTag:
            raise ChunkNotAuthentic from None


def start_encryption(keyring: KeyRing) -> tuple[BlobEncryption, BlobCipher]:
    """What a new blob is encrypted with: the newest encryption key and a fresh salt.

    Raises:
        KeyRingError: the ring has no key that encrypts.
    """
    key_id = keyring.encryption_key_id
    if key_id is None:
        raise KeyRingError("no key to encrypt with: make one with `glowplug keys rotate --encryption`")
    encryption = BlobEncryption(key_id, secrets.token_bytes(SALT_BYTES))
    return encryption, open_cipher(encryption, keyring)


def open_cipher(encryption: BlobEncryption, keyring: KeyRing) -> BlobCipher:
    """The cipher of a blob that exists.

    Raises:
        KeyRingError: its key is not in the ring.
    """
    return BlobCipher(keyring.encryption_secret(encryption.key_id), encryption.salt)


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_BYTES, "big")


def _aad(digest: bytes, index: int) -> bytes:
    return _AAD_CONTEXT + digest + index.to_bytes(8, "little")
