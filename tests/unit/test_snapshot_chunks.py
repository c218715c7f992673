"""Chunk digests and the blob digest that follows from them."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from snapshots import chunks


def test_chunk_digest_is_plain_blake3() -> None:
    """The published BLAKE3 vectors for the inputs of 0 and 1 bytes."""
    assert chunks.digest_chunk(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert chunks.digest_chunk(b"\0").hex() == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"


def test_blob_digest_is_fixed() -> None:
    """The address of a blob never changes between versions: files on disk are found by it."""
    digests = chunks.digest_chunks(bytes(range(256)) * 300, 65536)
    assert (
        chunks.digest_blob(76800, 65536, digests) == "86856d77aa7702e69eda85595d4a437a3c27fc268355ec1ba16abfe76e6dde5b"
    )
    prefix = struct.pack("<QQ", 76800, 65536)
    context = "glowplug 2026 snapshot blob digest v1"
    assert chunks.digest_blob(76800, 65536, digests) == blake3(prefix + digests, derive_key_context=context).hexdigest()


def test_size_and_chunk_size_are_bound_into_the_blob_digest() -> None:
    """The same chunk digests for another size or cut are another blob."""
    digests = chunks.digest_chunks(b"x" * 100, 65536)
    addresses = {chunks.digest_blob(size, cut, digests) for size in (100, 101) for cut in (65536, 131072)}
    assert len(addresses) == 4


@given(st.binary(max_size=2000), st.integers(1, 300), st.integers(1, 4))
def test_threads_do_not_change_digests(data: bytes, chunk_bytes: int, num_threads: int) -> None:
    """Any number of threads gives the digests of the chunks in order."""
    expected = [blake3(data[i : i + chunk_bytes]).digest() for i in range(0, len(data), chunk_bytes)]
    assert chunks.digest_chunks(data, chunk_bytes, num_threads=num_threads) == b"".join(expected)
    assert chunks.count_chunks(len(data), chunk_bytes) == len(expected)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_digested(kind: type) -> None:
    """Bytes, bytearray and memoryview are digested where they lie."""
    assert chunks.digest_chunks(kind(b"abc"), 2) == blake3(b"ab").digest() + blake3(b"c").digest()
