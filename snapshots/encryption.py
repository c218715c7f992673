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

from snapshots.blob_reference import SALT_BYTES, TAG_BYTES, BlobEncryption, BlobRef
from snapshots.errors import KeyRingError
from snapshots.keyring import KeyRing

_KEY_INFO: Final = b"glowplug 2026 blob encryption key v1"
_AAD_CONTEXT: Final = b"glowplug 2026 blob chunk v1"
_EXPORT_KEY_INFO: Final = b"glowplug 2026 transport encryption key v1"  # the blob's address follows
_EXPORT_AAD_CONTEXT: Final = b"glowplug 2026 transport chunk v1"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class ChunkNotAuthentic(Exception):
    """A chunk's ciphertext or tag was changed, or belongs elsewhere. Caught inside this package."""


class ChunkCipher:
    """Encrypts and decrypts the chunks of one blob in one file. Safe from any thread; releases the GIL."""

    def __init__(self, secret: bytes, salt: bytes, key_info: bytes, aad_context: bytes) -> None:
        self._aead = AESGCM(HKDF(SHA256(), _KEY_BYTES, salt=salt, info=key_info).derive(secret))
        self._aad_context = aad_context

    def encrypt(self, content: bytes | bytearray | memoryview, digest: bytes, index: int) -> bytes:
        """Ciphertext of chunk ``index``, whose plain digest is ``digest``, and its 16-byte tag.

        Requires: with this cipher, an index is used for one content only.
        """
        return self._aead.encrypt(_nonce(index), bytes(content), self._aad(digest, index))

    def decrypt_into(self, stored: bytes | memoryview, digest: bytes, index: int, into: bytearray | memoryview) -> None:
        """Content of chunk ``index``, written to ``into``, which is exactly as long as it is.

        Raises:
            ChunkNotAuthentic: ``into`` then holds nothing of use.
        """
        if len(stored) != len(into) + TAG_BYTES:
            raise ChunkNotAuthentic
        try:
            self._aead.decrypt_into(_nonce(index), stored, self._aad(digest, index), into)
        except InvalidTag:
            raise ChunkNotAuthentic from None

    def _aad(self, digest: bytes, index: int) -> bytes:
        return self._aad_context + digest + index.to_bytes(8, "little")


class BlobCipher(ChunkCipher):
    """Chunks of a blob's file in a store."""

    def __init__(self, secret: bytes, salt: bytes) -> None:
        super().__init__(secret, salt, _KEY_INFO, _AAD_CONTEXT)


class ExportCipher(ChunkCipher):
    """Compressed chunks of a blob in one transport file: ``salt`` is the file's, ``address`` the blob's."""

    def __init__(self, secret: bytes, salt: bytes, address: str) -> None:
        super().__init__(secret, salt, _EXPORT_KEY_INFO + bytes.fromhex(address), _EXPORT_AAD_CONTEXT)


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


def open_export_cipher(ref: BlobRef, salt: bytes, keyring: KeyRing) -> ExportCipher:
    """The cipher of an encrypted blob's frames in the transport file of this salt.

    Raises:
        KeyRingError: its key is not in the ring.
    """
    assert ref.encryption is not None
    return ExportCipher(keyring.encryption_secret(ref.encryption.key_id), salt, ref.address)


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_BYTES, "big")
