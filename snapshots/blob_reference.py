"""What a manifest says of one blob: its digests, how it is cut, how its file is encrypted (see FORMAT.md)."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from snapshots import chunks
from snapshots.errors import ManifestMalformed
from snapshots.key_file import KEY_ID

MAX_BLOB_BYTES: Final = 1 << 42
SALT_BYTES: Final = 32
TAG_BYTES: Final = 16  # of AES-GCM
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class BlobEncryption(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a blob's file is encrypted (see encryption). ``salt`` is drawn anew for each writing."""

    key_id: str
    salt: bytes


class BlobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A content-addressed blob. ``digest``, sizes and ``chunk_digests`` (32 bytes a chunk, packed) are of its plain
    bytes, whatever its file holds. ``verity_sha256`` (64 hex digits) is the fs-verity digest of its file.
    """

    digest: str  # 64 hex digits, see chunks.digest_blob
    size_bytes: int
    chunk_bytes: int
    chunk_digests: bytes
    encryption: BlobEncryption | None = None
    verity_sha256: str | None = None

    @property
    def address(self) -> str:
        """Name of the blob's file, 64 hex digits: its digest, or one of digest, key and salt where it is encrypted."""
        if self.encryption is None:
            return self.digest
        return chunks.digest_encrypted(self.digest, self.encryption.key_id, self.encryption.salt)

    @property
    def file_bytes(self) -> int:
        """Size of the blob's file: an encrypted chunk has a tag behind it."""
        return self.size_bytes + (0 if self.encryption is None else TAG_BYTES * self.num_chunks)

    @property
    def num_chunks(self) -> int:
        return chunks.count_chunks(self.size_bytes, self.chunk_bytes)

    def chunk_digest(self, index: int) -> bytes:
        """Digest of chunk ``index``."""
        return self.chunk_digests[index * chunks.DIGEST_BYTES : (index + 1) * chunks.DIGEST_BYTES]


def validate_blob(role: str, ref: BlobRef) -> None:
    """Check every rule of one reference.

    Raises:
        ManifestMalformed: the first that does not hold.
    """
    if not 0 < ref.size_bytes <= MAX_BLOB_BYTES:
        raise ManifestMalformed(f"blob {role}: {ref.size_bytes} bytes, expected 1 to {MAX_BLOB_BYTES}")
    power_of_two = ref.chunk_bytes > 0 and ref.chunk_bytes & (ref.chunk_bytes - 1) == 0
    if not power_of_two or not chunks.MIN_CHUNK_BYTES <= ref.chunk_bytes <= chunks.MAX_CHUNK_BYTES:
        raise ManifestMalformed(
            f"blob {role}: chunks of {ref.chunk_bytes} bytes, expected a power of two from "
            f"{chunks.MIN_CHUNK_BYTES} to {chunks.MAX_CHUNK_BYTES}"
        )
    if len(ref.chunk_digests) != ref.num_chunks * chunks.DIGEST_BYTES:
        raise ManifestMalformed(
            f"blob {role}: {len(ref.chunk_digests)} bytes of chunk digests for {ref.num_chunks} chunks"
        )
    if ref.encryption is not None and (
        len(ref.encryption.salt) != SALT_BYTES or not KEY_ID.fullmatch(ref.encryption.key_id)
    ):
        raise ManifestMalformed(f"blob {role}: encryption needs a key id and a salt of {SALT_BYTES} bytes")
    if ref.verity_sha256 is not None and not _SHA256.fullmatch(ref.verity_sha256):
        raise ManifestMalformed(f"blob {role}: verity_sha256 is not 64 lower-case hex digits")
    if ref.digest != chunks.digest_blob(ref.size_bytes, ref.chunk_bytes, ref.chunk_digests):
        raise ManifestMalformed(f"blob {role}: its digest does not follow from its chunk digests")
