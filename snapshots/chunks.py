"""BLAKE3 digests of fixed-size chunks: what a manifest signs instead of whole files.

A blob is cut into chunks of ``chunk_bytes`` (the last may be shorter). The blob's own digest, its address in the
store, is BLAKE3 in derive-key mode over the blob's size, the chunk size and all chunk digests, so that equal
digests mean equal bytes cut the same way, and a list of chunk digests can be checked without the bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from blake3 import blake3

DIGEST_BYTES: Final = 32
DEFAULT_CHUNK_BYTES: Final = 1024 * 1024
MIN_CHUNK_BYTES: Final = 64 * 1024
MAX_CHUNK_BYTES: Final = 64 * 1024 * 1024
_BLOB_CONTEXT: Final = "glowplug 2026 snapshot blob digest v1"
_ENCRYPTED_CONTEXT: Final = "glowplug 2026 encrypted blob address v1"
_PREFIX: Final = struct.Struct("<QQ")


def count_chunks(size_bytes: int, chunk_bytes: int) -> int:
    """Chunks of a blob; the empty blob has none."""
    return -(-size_bytes // chunk_bytes)


def digest_chunk(data: bytes | bytearray | memoryview) -> bytes:
    """32-byte BLAKE3 digest of one chunk. Releases the GIL."""
    return blake3(data).digest()


def digest_blob(size_bytes: int, chunk_bytes: int, chunk_digests: bytes) -> str:
    """The blob's address (64 hex digits), from its packed chunk digests."""
    hasher = blake3(_PREFIX.pack(size_bytes, chunk_bytes), derive_key_context=_BLOB_CONTEXT)
    return hasher.update(chunk_digests).hexdigest()


def digest_encrypted(digest: str, key_id: str, salt: bytes) -> str:
    """Address (64 hex digits) of the encrypted file of a blob: another for every salt."""
    hasher = blake3(digest.encode() + salt, derive_key_context=_ENCRYPTED_CONTEXT)
    return hasher.update(key_id.encode()).hexdigest()


def digest_chunks(
    data: bytes | bytearray | memoryview, chunk_bytes: int = DEFAULT_CHUNK_BYTES, *, num_threads: int | None = None
) -> bytes:
    """Packed digests of all chunks of ``data``, hashed on ``num_threads`` threads (default: all cores). Blocks."""
    view = memoryview(data).cast("B")
    spans = list(iterate_chunks(len(view), chunk_bytes))
    num_threads = min(num_threads or available_cores(), len(spans))
    if num_threads <= 1:
        return b"".join(digest_chunk(view[start:end]) for start, end in spans)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="digest") as pool:
        return b"".join(pool.map(lambda span: digest_chunk(view[span[0] : span[1]]), spans))


def iterate_chunks(size_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every chunk, in bytes."""
    for start in range(0, size_bytes, chunk_bytes):
        yield start, min(start + chunk_bytes, size_bytes)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))
