"""Verified bytes in sealed memory, and read-only views of them. The only place that maps files.

``seal_blob`` copies a blob's file into an anonymous memory file and digests every chunk *there*, then seals it:
from that moment nobody, not even its owner, can write, shrink or grow it. A node agent keeps the descriptor, workers
inherit it and map it shared, so that one verification and one copy serve every worker on the host.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt

from snapshots import sealing
from snapshots.blob_reference import BlobRef
from snapshots.block_types import TENSOR_TYPES
from snapshots.dtypes import array_type
from snapshots.errors import MappingError
from snapshots.keyring import KeyRing
from snapshots.manifest import TensorEntry
from snapshots.sealing import HUGE_PAGE_BYTES
from snapshots.stored_chunks import StoredChunks
from snapshots.verification import open_blob_file

PAGE_BYTES: Final = mmap.PAGESIZE
SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MADV_POPULATE_READ: Final = 22  # Linux 5.14; missing from the mmap module of Python 3.11
MFD_NOEXEC_SEAL: Final = 0x0008  # Linux 6.3

_libc: Final = ctypes.CDLL(None, use_errno=True)  # CDLL: calls release the GIL
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class SealedBlob:
    """A memory file that holds a verified blob and can never change. Owns ``fd`` (read-only) until :meth:`close`.

    Workers get the descriptor by inheritance or SCM_RIGHTS. The memory lives as long as any descriptor or mapping.
    """

    def __init__(self, fd: int, size_bytes: int, digest: str) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.digest = digest

    def __repr__(self) -> str:
        return f"SealedBlob(fd={self.fd}, size_bytes={self.size_bytes}, digest={self.digest[:12]!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def seal_blob(
    path: Path,
    ref: BlobRef,
    *,
    label: str | None = None,
    keyring: KeyRing | None = None,
    num_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SealedBlob:
    """Copy the file at ``path`` into sealed memory, decrypt it there if need be, and verify every chunk of it there.

    Requires: ``ref`` from a verified manifest. On success: the caller owns a descriptor of memory whose content is
    ``ref``'s. On failure: nothing is left, no byte was usable by anyone. Blocks; run it on a thread. Takes
    ``size_bytes`` of memory. ``on_progress(done_bytes, total_bytes)`` is called from the calling thread.

    Raises:
        BlobCorrupt: the file is missing, not regular, of another size, or a chunk differs (the message names it).
        StoreError: the disk cannot read it.
        MappingError: no memory for it, or the kernel refuses memory files or seals.
        KeyRingError: the blob is encrypted and ``keyring`` does not hold its key.
    """
    label = label or ref.digest[:16]
    stored = StoredChunks(ref, label, keyring)
    source_fd = open_blob_file(path, ref, label)
    try:
        memory_fd = create_memory_file(ref, ref.size_bytes)
        try:
            with _aligned_mapping(memory_fd, ref.size_bytes, mmap.PROT_READ | mmap.PROT_WRITE) as target:
                sealing.fill_and_verify(source_fd, memory_fd, target, stored, num_threads, on_progress)
            fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, SEALS)
            read_fd = reopen_read_only(memory_fd)
        except OSError as error:
            raise MappingError(
                f"cannot hold {ref.size_bytes} bytes of blob {label} in sealed memory: {error.strerror}"
            ) from error
        finally:
            os.close(memory_fd)
    finally:
        os.close(source_fd)
    return SealedBlob(read_fd, ref.size_bytes, ref.digest)


def create_memory_file(ref: BlobRef, size_bytes: int) -> int:
    """A memory file of ``size_bytes`` for ``ref``, open for writing, without seals. The caller closes it.

    Raises:
        MappingError: the kernel refused.
    """
    name = f"glowplug-{ref.digest[:16]}"
    try:
        fd = _create_memory_file(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise MappingError(f"cannot create a memory file: {error.strerror}") from error
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise MappingError(f"cannot size a memory file to {size_bytes} bytes: {error.strerror}") from error
    return fd


def _create_memory_file(name: str, flags: int) -> int:
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)  # may be mapped executable, but never exec()ed
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


@contextmanager
def _aligned_mapping(fd: int, size_bytes: int, protection: int) -> Iterator[memoryview]:
    mapping, lead = map_aligned(fd, size_bytes, protection)
    try:
        with memoryview(mapping) as whole, whole[lead : lead + size_bytes] as view:
            yield view
    finally:
        mapping.close()


def reopen_read_only(memory_fd: int) -> int:
    """A descriptor for workers. Kernels before 6.7 refuse shared mappings of a write-sealed file through others.

    Raises:
        OSError: no descriptor is left.
    """
    return os.open(f"/proc/self/fd/{memory_fd}", os.O_RDONLY | os.O_CLOEXEC)


def map_aligned(fd: int, size_bytes: int, protection: int) -> tuple[mmap.mmap, int]:
    """Map ``fd`` shared at an address aligned to huge pages: (owner of the mapping, bytes before the file's first).

    An anonymous mapping is made large enough and the file mapped over its aligned part: so Python's mmap object
    owns it all, counts exported buffers and unmaps once.
    """
    owner = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection)
    base = np.frombuffer(owner, np.uint8).ctypes.data
    lead = -base % HUGE_PAGE_BYTES
    result = _libc.mmap(base + lead, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
    if result == _MAP_FAILED:
        code = ctypes.get_errno()
        owner.close()
        raise OSError(code, os.strerror(code))
    _libc.madvise(base + lead, size_bytes, mmap.MADV_HUGEPAGE)
    return owner, lead


@dataclass(frozen=True, slots=True)
class MappingStatistics:
    """Memory of one mapping as this process sees it, in bytes."""

    size_bytes: int
    resident_bytes: int
    proportional_bytes: int  # resident, each page divided by the processes that map it
    private_bytes: int
    huge_bytes: int  # mapped by 2 MiB entries


def verify_sealed(fd: int, ref: BlobRef, *, label: str | None = None) -> None:
    """Digest the bytes of sealed memory once more, where they lie. Blocks; 20 ms for 269 MB on two cores.

    Raises:
        BlobCorrupt: they are not ``ref``'s any more: the machine's memory is faulty.
        MappingError: not sealed, or not of the blob's size.
    """
    stored = StoredChunks(msgspec.structs.replace(ref, encryption=None), label or ref.digest[:16])
    with map_sealed(fd, ref.size_bytes) as mapped, mapped.view() as view:
        sealing.verify_in_place(view, stored)


def map_sealed(fd: int, size_bytes: int) -> MappedBytes:
    """Map sealed memory read-only and shared. ``fd`` stays the caller's and may be closed afterwards.

    Raises:
        MappingError: not sealed against writing, shrinking and growing, or not of ``size_bytes``.
    """
    seals = read_seals(fd, size_bytes)
    if seals & SEALS != SEALS:
        raise MappingError(f"descriptor {fd} has seals {seals:#x}, needs {SEALS:#x}: its bytes could still change")
    return MappedBytes(*map_for_reading(fd, size_bytes), size_bytes)


def size_with_progress(size_bytes: int) -> int:
    """Size of a memory file that tells behind its content how much of it is verified (see snapshots.filling)."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES


def read_seals(fd: int, size_bytes: int) -> int:
    """The seals of a memory file that holds ``size_bytes``, with or without a page of progress behind them.

    Raises:
        MappingError: no memory file, or of another size.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        status = os.fstat(fd)
    except (OSError, ValueError) as error:  # ValueError: the -1 of a closed SealedBlob
        raise MappingError(f"descriptor {fd} is not a sealed memory file: {error}") from error
    sizes = (size_bytes, size_with_progress(size_bytes))
    if not stat.S_ISREG(status.st_mode) or status.st_size not in sizes or size_bytes <= 0:
        raise MappingError(f"descriptor {fd} holds {status.st_size} bytes, expected {size_bytes}")
    return seals


def map_for_reading(fd: int, size_bytes: int) -> tuple[mmap.mmap, int]:
    """:func:`map_aligned`, read-only.

    Raises:
        MappingError: the kernel refused.
    """
    try:
        return map_aligned(fd, size_bytes, mmap.PROT_READ)
    except OSError as error:
        raise MappingError(f"cannot map {size_bytes} bytes of sealed memory: {error.strerror}") from error


class MappedBytes:
    """Sealed bytes in this process's address space. Views are read-only, zero-copy, and keep the mapping alive:
    :meth:`close` is refused while one lives.
    """

    def __init__(self, owner: mmap.mmap, lead: int, size_bytes: int) -> None:
        self._owner = owner
        self._lead = lead
        self._address = int(np.frombuffer(owner, np.uint8).ctypes.data) + lead
        self.size_bytes = size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_whole(self) -> bool:
        """Whether every byte is verified."""
        return True

    def wait_verified(self, end_bytes: int) -> None:
        """Wait until every byte before ``end_bytes`` is verified. Sealed memory is: returns at once."""

    @property
    def address(self) -> int:
        """Address of the first byte, aligned to 2 MiB. Valid until :meth:`close`."""
        self._require_open()
        return self._address

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0) -> npt.NDArray[Any]:
        """A read-only view of ``shape`` at byte ``offset``.

        Raises:
            MappingError: outside of the mapping, or not aligned to the item size.
        """
        self._require_open()
        item = np.dtype(dtype)
        count = math.prod(shape)
        if any(size < 0 for size in shape):
            raise MappingError(f"shape {shape} has a negative size")
        self._require_inside(offset, count * item.itemsize)
        if offset % item.itemsize:
            raise MappingError(f"offset {offset} is not a multiple of {item.itemsize}, the size of {item}")
        return np.frombuffer(self._owner, item, count, self._lead + offset).reshape(shape)

    def tensor(self, entry: TensorEntry) -> npt.NDArray[Any]:
        """The view of a manifest's tensor. BF16 becomes ``ml_dtypes.bfloat16``, blocks are rows of uint8.

        Raises:
            MappingError: outside of the mapping, or an unknown dtype.
        """
        if entry.dtype not in TENSOR_TYPES:
            raise MappingError(f"tensor {entry.name!r}: unknown dtype {entry.dtype!r}")
        return self.array(*array_type(entry.dtype, entry.shape), entry.offset)

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """A read-only memoryview of ``length`` bytes (default: to the end) from ``offset``."""
        self._require_open()
        length = self.size_bytes - offset if length is None else length
        self._require_inside(offset, length)
        return memoryview(self._owner)[self._lead + offset : self._lead + offset + length]

    def populate(self, offset: int = 0, length: int | None = None) -> None:
        """Enter the pages of a range in this process's page table, so that no later access faults.

        Releases the GIL; run it on a thread, in order of use. Cheap for huge pages. Before Linux 5.14 it does nothing.
        """
        self._require_open()
        length = self.size_bytes - offset if length is None else length
        self._require_inside(offset, length)
        start = (self._address + offset) // PAGE_BYTES * PAGE_BYTES
        if length == 0:
            return
        if _libc.madvise(start, self._address + offset + length - start, MADV_POPULATE_READ):
            code = ctypes.get_errno()
            if code != errno.EINVAL:
                raise MappingError(f"cannot populate {length} bytes: {os.strerror(code)}")

    def set_inherited(self, inherited: bool) -> None:
        """Whether children forked from now on have this mapping (at first they do). One that they do not have cannot
        be read there, and keeps no memory; its arrays must not be used then.

        Raises:
            MappingError: the kernel refused.
        """
        advice = mmap.MADV_DOFORK if inherited else mmap.MADV_DONTFORK
        if _libc.madvise(self.address, self.size_bytes, advice):
            raise MappingError(f"cannot keep a mapping from children: {os.strerror(ctypes.get_errno())}")

    def statistics(self) -> MappingStatistics:
        """What the kernel reports for this mapping; costs a walk over /proc/self/smaps (milliseconds)."""
        self._require_open()
        kib = _read_smaps(self._address, self._address + self.size_bytes)
        return MappingStatistics(
            size_bytes=self.size_bytes,
            resident_bytes=kib.get("Rss", 0) * 1024,
            proportional_bytes=kib.get("Pss", 0) * 1024,
            private_bytes=(kib.get("Private_Clean", 0) + kib.get("Private_Dirty", 0)) * 1024,
            huge_bytes=(kib.get("ShmemPmdMapped", 0) + kib.get("FilePmdMapped", 0)) * 1024,
        )

    def close(self) -> None:
        """Unmap. Idempotent.

        Raises:
            MappingError: a view made by this mapping is still referenced; nothing was unmapped.
        """
        try:
            self._owner.close()
        except BufferError:
            raise MappingError("a view of this mapping is still in use; drop all arrays before closing it") from None

    def _require_open(self) -> None:
        if self._owner.closed:
            raise MappingError("this mapping is closed")

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise MappingError(f"bytes {offset} to {offset + length} are outside of a mapping of {self.size_bytes}")


def _read_smaps(start: int, end: int) -> dict[str, int]:
    """Sums in KiB over the mappings that lie between two addresses."""
    sums: dict[str, int] = {}
    inside = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as lines:
        for line in lines:
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):
                low, _, high = key.partition("-")
                inside = int(low, 16) < end and int(high, 16) > start
            elif inside and rest.rstrip().endswith("kB"):
                sums[key[:-1]] = sums.get(key[:-1], 0) + int(rest.split()[0])
    return sums
