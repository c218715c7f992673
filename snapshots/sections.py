"""Optional sections of a manifest: the keys and values of primed prefixes, and compiled kernels (see FORMAT.md).

Both describe places in a blob of their own role. A snapshot without them has neither the section nor the blob.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from blake3 import blake3

from snapshots.errors import ManifestMalformed

MAX_PREFIXES: Final = 64
MAX_PREFIX_TOKENS: Final = 1 << 20
MAX_KERNELS: Final = 4096
SECTION_ALIGNMENT: Final = 4096  # bytes; every entry of these blobs starts on a page
#: ``[layers, 2 (keys, values), kv heads, tokens, head_dim]``, C order: after rotation, as attention reads them.
PREFIX_LAYOUT: Final = 1
#: The type that a KV block has. Copied as it is, so that a primed request computes what an unprimed one would.
PREFIX_DTYPE: Final = "F32"
_PREFIX_ITEM_BYTES: Final = 4

_BACKEND: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_KERNEL_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
_ARCHITECTURE: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_TOKEN_ID_BYTES: Final = 4


class PrimedPrefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys and values of the first tokens of prompts to come, at ``offset`` of the primed-prefixes blob.

    ``token_ids`` are packed as u32, little-endian. ``computed_with`` names the backend that computed it.
    """

    token_ids: bytes
    layout: int  # PREFIX_LAYOUT
    dtype: str  # PREFIX_DTYPE
    computed_with: str
    offset: int
    size_bytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // _TOKEN_ID_BYTES

    def unpack_token_ids(self) -> tuple[int, ...]:
        """The token ids as numbers."""
        return struct.unpack(f"<{self.num_tokens}I", self.token_ids)


class CompiledKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Device code for one architecture, e.g. ``sm_90``, at ``offset`` of the kernels blob. ``digest`` is BLAKE3."""

    name: str
    architecture: str
    digest: str  # 64 hex digits, of exactly these bytes
    offset: int
    size_bytes: int


class PrefixShape(msgspec.Struct, frozen=True):
    """What the model says about the keys and values of one token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int

    def array_shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of a prefix of ``num_tokens`` in :data:`PREFIX_LAYOUT`."""
        return (self.num_layers, 2, self.num_kv_heads, num_tokens, self.head_dim)

    def size_bytes(self, num_tokens: int) -> int:
        """Bytes of a prefix of ``num_tokens``."""
        return self.num_layers * 2 * self.num_kv_heads * num_tokens * self.head_dim * _PREFIX_ITEM_BYTES


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """The packed form of :class:`PrimedPrefix`."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def plan_prefixes(token_ids: Iterable[Sequence[int]], shape: PrefixShape, computed_with: str) -> list[PrimedPrefix]:
    """Entries for prefixes that lie in the blob in this order, each on a page of its own."""
    entries: list[PrimedPrefix] = []
    offset = 0
    for ids in token_ids:
        size_bytes = shape.size_bytes(len(ids))
        entries.append(
            PrimedPrefix(pack_token_ids(ids), PREFIX_LAYOUT, PREFIX_DTYPE, computed_with, offset, size_bytes)
        )
        offset += size_bytes + len(fill_up(size_bytes))
    return entries


def plan_kernels(kernels: Iterable[tuple[str, str, bytes]]) -> list[CompiledKernel]:
    """Entries for kernels (name, architecture, code) that lie in the blob in this order, each on a page of its own."""
    entries: list[CompiledKernel] = []
    offset = 0
    for name, architecture, code in kernels:
        entries.append(CompiledKernel(name, architecture, blake3(code).hexdigest(), offset, len(code)))
        offset += len(code) + len(fill_up(len(code)))
    return entries


def fill_up(size_bytes: int) -> bytes:
    """The zeros that follow an entry of ``size_bytes``, up to the next page."""
    return bytes(-size_bytes % SECTION_ALIGNMENT)


def validate_prefixes(prefixes: Sequence[PrimedPrefix], shape: PrefixShape, blob_bytes: int) -> None:
    """Check every rule that restoring relies on. ``blob_bytes`` is 0 where there is no blob.

    Raises:
        ManifestMalformed: names the prefix at fault.
    """
    if len(prefixes) > MAX_PREFIXES:
        raise ManifestMalformed(f"{len(prefixes)} primed prefixes, at most {MAX_PREFIXES}")
    seen: set[bytes] = set()
    free_from = 0
    for index, prefix in enumerate(prefixes):
        label = f"primed prefix {index}"
        if (prefix.layout, prefix.dtype) != (PREFIX_LAYOUT, PREFIX_DTYPE):
            raise ManifestMalformed(
                f"{label}: layout {prefix.layout} of {prefix.dtype[:20]!r}, this software reads layout "
                f"{PREFIX_LAYOUT} of {PREFIX_DTYPE}: build the snapshot again"
            )
        if not _BACKEND.fullmatch(prefix.computed_with):
            raise ManifestMalformed(f"{label}: computed_with {prefix.computed_with[:40]!r} is no backend's name")
        most_tokens = min(MAX_PREFIX_TOKENS, shape.context_length - 1)
        if len(prefix.token_ids) % _TOKEN_ID_BYTES or not 0 < prefix.num_tokens <= most_tokens:
            raise ManifestMalformed(
                f"{label}: {len(prefix.token_ids)} bytes of token ids, expected 1 to {most_tokens} ids of 4 bytes"
            )
        if max(prefix.unpack_token_ids()) >= shape.vocab_size:
            raise ManifestMalformed(f"{label}: a token id is not below the vocabulary's {shape.vocab_size}")
        if prefix.token_ids in seen:
            raise ManifestMalformed(f"{label}: the same tokens are primed twice")
        seen.add(prefix.token_ids)
        expected_bytes = shape.size_bytes(prefix.num_tokens)
        if prefix.size_bytes != expected_bytes:
            raise ManifestMalformed(
                f"{label}: {prefix.size_bytes} bytes, {prefix.num_tokens} tokens of this model take {expected_bytes}"
            )
        free_from = _validate_place(label, prefix.offset, prefix.size_bytes, free_from, blob_bytes)


def validate_kernels(kernels: Sequence[CompiledKernel], blob_bytes: int) -> None:
    """Check every rule that loading a kernel relies on. ``blob_bytes`` is 0 where there is no blob.

    Raises:
        ManifestMalformed: names the kernel at fault.
    """
    if len(kernels) > MAX_KERNELS:
        raise ManifestMalformed(f"{len(kernels)} kernels, at most {MAX_KERNELS}")
    seen: set[tuple[str, str]] = set()
    free_from = 0
    for kernel in kernels:
        label = f"kernel {kernel.name[:80]!r} for {kernel.architecture[:40]!r}"
        if not _KERNEL_NAME.fullmatch(kernel.name) or not _ARCHITECTURE.fullmatch(kernel.architecture):
            raise ManifestMalformed(f"{label}: not a kernel's name and an architecture's")
        if (kernel.name, kernel.architecture) in seen:
            raise ManifestMalformed(f"{label}: listed twice")
        seen.add((kernel.name, kernel.architecture))
        if not _DIGEST.fullmatch(kernel.digest):
            raise ManifestMalformed(f"{label}: its digest is not 64 lower-case hex digits")
        free_from = _validate_place(label, kernel.offset, kernel.size_bytes, free_from, blob_bytes)


def _validate_place(label: str, offset: int, size_bytes: int, free_from: int, blob_bytes: int) -> int:
    """Where the entry ends.

    Raises:
        ManifestMalformed: not on a page, over the entry before it, or beyond the blob.
    """
    if offset % SECTION_ALIGNMENT or offset < free_from or size_bytes <= 0:
        raise ManifestMalformed(
            f"{label}: {size_bytes} bytes at offset {offset}, expected some on a multiple of {SECTION_ALIGNMENT} "
            f"not before {free_from}, where the entry before it ends"
        )
    if offset + size_bytes > blob_bytes:
        raise ManifestMalformed(f"{label}: ends at byte {offset + size_bytes} of a {blob_bytes}-byte blob")
    return offset + size_bytes
