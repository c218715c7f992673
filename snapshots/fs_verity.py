"""fs-verity: the kernel's own Merkle tree over a file, where kernel and filesystem offer it.

A file with fs-verity can never be written again, and every page that is read of it is checked. Its digest can be
computed without the kernel, so that a build may sign it anywhere. What is measured is a second lock, not the first:
blobs are digested chunk by chunk in the memory that is used, with and without it.

Source: https://docs.kernel.org/filesystems/fsverity.html (struct fsverity_descriptor, ioctls), SHA-256, 4 KiB blocks,
no salt.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from snapshots.blob_reference import BlobRef
from snapshots.regular_files import open_regular_file

BLOCK_BYTES: Final = 4096
FS_IOC_ENABLE_VERITY: Final = 0x40806685
FS_IOC_MEASURE_VERITY: Final = 0xC0046686
_SHA256: Final = 1  # FS_VERITY_HASH_ALG_SHA256
_LOG_BLOCK_BYTES: Final = 12
_DIGEST_BYTES: Final = 32
#: version, hash algorithm, log2 of the block size, salt bytes, reserved, file bytes, root hash, salt, reserved.
_DESCRIPTOR: Final = struct.Struct("<BBBBIQ64s32s144s")
_ENABLE: Final = struct.Struct("<IIIIQIIQ88s")  # version, algorithm, block bytes, salt (bytes, pointer), signature
_MEASURE: Final = struct.Struct("<HH64s")  # algorithm, digest bytes, digest
_NOT_OFFERED: Final = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EACCES})

#: ``matches`` and ``differs``: the kernel's digest against the manifest's. ``on``: enabled, the manifest has none.
VerityState = Literal["matches", "differs", "on", "off", "not offered here", "no file"]


class VerityHasher:
    """The fs-verity digest of a stream of bytes. Costs one SHA-256 pass on one core, about 0.5 s for 269 MB."""

    def __init__(self) -> None:
        self._size_bytes = 0
        self._partial = bytearray()
        self._leaves = bytearray()

    def update(self, data: memoryview) -> None:
        """Append ``data``."""
        self._size_bytes += len(data)
        start = 0
        if self._partial:
            start = min(BLOCK_BYTES - len(self._partial), len(data))
            self._partial += data[:start]
            if len(self._partial) < BLOCK_BYTES:
                return
            self._leaves += _hash_blocks(self._partial)
            self._partial.clear()
        end = start + (len(data) - start) // BLOCK_BYTES * BLOCK_BYTES
        self._leaves += _hash_blocks(data[start:end])
        self._partial += data[end:]

    def hexdigest(self) -> str:
        """64 hex digits, as ``fsverity digest`` prints them behind ``sha256:``."""
        level = bytes(self._leaves) + _hash_blocks(self._partial)
        while len(level) > _DIGEST_BYTES:
            level = _hash_blocks(level)
        root = level or bytes(_DIGEST_BYTES)  # of an empty file: zeros
        descriptor = _DESCRIPTOR.pack(1, _SHA256, _LOG_BLOCK_BYTES, 0, 0, self._size_bytes, root, b"", b"")
        return hashlib.sha256(descriptor).hexdigest()


@dataclass(frozen=True, slots=True)
class VerityFinding:
    """What the kernel says of one blob's file. ``detail`` holds digests or the reason."""

    state: VerityState
    detail: str = ""


def enable_verity(path: Path) -> bool:
    """Turn fs-verity on for a finished file; False where it is not offered. Nobody may have it open for writing."""
    fd, _ = open_regular_file(path)
    try:
        fcntl.ioctl(fd, FS_IOC_ENABLE_VERITY, _ENABLE.pack(1, _SHA256, BLOCK_BYTES, 0, 0, 0, 0, 0, b""))
    except OSError as error:
        if error.errno == errno.EEXIST:
            return True  # on already
        if error.errno in _NOT_OFFERED:
            return False
        raise
    finally:
        os.close(fd)
    return True


def measure_verity(fd: int) -> str | None:
    """The kernel's digest of an open file (64 hex digits); None where the file has no fs-verity.

    Raises:
        OSError: ENOTTY, EOPNOTSUPP and the like: not offered by this kernel or filesystem.
    """
    try:
        answer = fcntl.ioctl(fd, FS_IOC_MEASURE_VERITY, _MEASURE.pack(0, 64, b""))
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise
    _, size_bytes, digest = _MEASURE.unpack(answer)
    return bytes(digest[:size_bytes]).hex()


def examine_verity(path: Path, ref: BlobRef) -> VerityFinding:
    """Compare the kernel's digest of a blob's file with the signed one. Never raises for what a file may be."""
    try:
        fd, _ = open_regular_file(path)
    except OSError as error:
        return VerityFinding("no file", error.strerror or "")
    try:
        measured = measure_verity(fd)
    except OSError as error:
        return VerityFinding("not offered here", f"{error.strerror} (FS_IOC_MEASURE_VERITY)")
    finally:
        os.close(fd)
    return compare_verity(measured, ref)


def compare_verity(measured: str | None, ref: BlobRef) -> VerityFinding:
    """``measured`` (None: the file has no fs-verity) against the manifest's digest."""
    if measured is None:
        return VerityFinding("off", "the filesystem offers it; build with --fs-verity to turn it on")
    if ref.verity_sha256 is None:
        return VerityFinding("on", f"sha256:{measured}, the manifest has none to compare")
    if measured != ref.verity_sha256:
        return VerityFinding("differs", f"sha256:{measured}, the manifest says {ref.verity_sha256}")
    return VerityFinding("matches", f"sha256:{measured}")


def _hash_blocks(data: bytes | bytearray | memoryview) -> bytes:
    """Packed SHA-256 of every block, the last one padded with zeros."""
    view = memoryview(data)
    blocks = (view[start : start + BLOCK_BYTES] for start in range(0, len(view), BLOCK_BYTES))
    return b"".join(
        hashlib.sha256(block if len(block) == BLOCK_BYTES else bytes(block).ljust(BLOCK_BYTES, b"\0")).digest()
        for block in blocks
    )
