"""Memory files that workers map while they are being filled: a chunk can be read from when it is verified, not before.

========== ====================================================== ==================================================
 time      the filler (an agent) may                              a reader (a worker) may
========== ====================================================== ==================================================
begun      write through the one writable mapping there will be   map; every page is PROT_NONE
filling    put verified chunks in place, in order, and publish    open pages below the published mark with mprotect
           how many bytes are verified (the *mark*)
whole      nothing: unmapped, sealed against writing for good     read everything
failed     nothing: unmapped, never sealed                        read what was verified; wait for the rest in vain
========== ====================================================== ==================================================

The mark is a number in a page behind the content, so that one descriptor carries both. It only grows, and a chunk
below it is never written again. From the start the file is sealed against growing, shrinking and *future* writing:
no process can write to it or map it writable, whoever opens it again, except the filler through the mapping that it
made before. So what a reader sees below the mark is what was verified, there, in that memory.

A reader that touches a page above the mark by mistake dies of SIGSEGV instead of computing with it. userfaultfd, which
would make it wait, is no choice: a fault taken while holding the interpreter's lock never ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from snapshots import sealing
from snapshots.blob_reference import BlobRef
from snapshots.errors import MappingError
from snapshots.keyring import KeyRing
from snapshots.mapping import (
    PAGE_BYTES,
    SEALS,
    MappedBytes,
    create_memory_file,
    map_aligned,
    map_for_reading,
    map_sealed,
    read_seals,
    reopen_read_only,
    size_with_progress,
)
from snapshots.stored_chunks import StoredChunks
from snapshots.verification import open_blob_file

F_SEAL_FUTURE_WRITE: Final = 0x0010  # Linux 5.1; missing from the fcntl module of Python 3.11
FILLING_SEALS: Final = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
#: How often a reader looks at the mark. A piece of 16 MiB takes 4 ms and more, so this costs no time that matters.
POLL_S: Final = 0.0005
#: A reader gives up when the mark has not moved for this long: no disk that serves models is as slow.
STALL_S: Final = 30.0

_PROT_NONE: Final = 0
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class FillingBlob:
    """The filler's side. Owns ``fd`` (read-only) until :meth:`close`, and what filling needs until :meth:`fill` ends.

    Call :meth:`fill` once, on a thread. Workers may have ``fd`` from the start.
    """

    def __init__(
        self,
        path: Path,
        ref: BlobRef,
        *,
        label: str | None = None,
        keyring: KeyRing | None = None,
        limit_bytes_per_s: float = 0,
    ) -> None:
        """Make the memory file; nothing is read yet. ``limit_bytes_per_s`` paces :meth:`fill` (0: unlimited).

        Raises:
            BlobCorrupt: the file is missing, not regular, or of another size.
            MappingError: no memory file can be made.
            KeyRingError: the blob is encrypted and ``keyring`` does not hold its key.
        """
        self.size_bytes = ref.size_bytes
        self._label = label or ref.digest[:16]
        self._limit_bytes_per_s = limit_bytes_per_s
        self._stored = StoredChunks(ref, self._label, keyring)
        self._stop = threading.Event()
        self._closing = threading.Lock()
        self._has_begun = False
        self._source_fd = open_blob_file(path, ref, self._label)
        self._memory_fd = self.fd = -1
        try:
            file_bytes = size_with_progress(ref.size_bytes)
            self._memory_fd = create_memory_file(ref, file_bytes)
            self._owner, self._lead = map_aligned(self._memory_fd, file_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(self._memory_fd, fcntl.F_ADD_SEALS, FILLING_SEALS)
            os.posix_fallocate(self._memory_fd, file_bytes - PAGE_BYTES, PAGE_BYTES)  # the mark: no SIGBUS when stored
            self.fd = reopen_read_only(self._memory_fd)
        except OSError as error:
            self._close_files()
            raise MappingError(
                f"cannot hold {ref.size_bytes} bytes of blob {self._label} in sealed memory: {error.strerror}"
            ) from error
        except MappingError:
            self._close_files()
            raise

    def fill(self, on_progress: Callable[[int, int], None] | None = None, num_threads: int | None = None) -> None:
        """Copy the file in, verify every chunk in place, publish as it goes, seal. Blocks.

        Raises:
            BlobCorrupt: a chunk is not the signed one; readers never see it, nor any behind it.
            StoreError: the disk cannot read it.
            MappingError: no memory for it, or :meth:`close` was called meanwhile.
        """
        self._has_begun = True
        try:
            with self._owner, memoryview(self._owner) as whole:
                self._fill(whole, on_progress, num_threads)
            fcntl.fcntl(self._memory_fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            raise MappingError(
                f"cannot hold {self.size_bytes} bytes of blob {self._label} in sealed memory: {error.strerror}"
            ) from error
        finally:
            self._close_files()

    def _fill(self, whole: memoryview, on_progress: Callable[[int, int], None] | None, num_threads: int | None) -> None:
        # By address: an array would keep the mapping open in the traceback of an error.
        base = int(np.frombuffer(self._owner, np.uint8).ctypes.data) + self._lead
        mark = ctypes.c_uint64.from_address(base + size_with_progress(self.size_bytes) - PAGE_BYTES)

        def publish(verified_bytes: int, size_bytes: int) -> None:
            mark.value = verified_bytes  # one aligned store
            if on_progress is not None:
                on_progress(verified_bytes, size_bytes)

        with whole[self._lead : self._lead + self.size_bytes] as target:
            sealing.fill_and_verify(
                self._source_fd,
                self._memory_fd,
                target,
                self._stored,
                num_threads,
                publish,
                limit_bytes_per_s=self._limit_bytes_per_s,
                stop=self._stop,
            )

    def close(self) -> None:
        """Close ``fd`` and make :meth:`fill`, if it is under way, end early. Idempotent; any thread."""
        self._stop.set()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        if not self._has_begun:
            self._close_files()

    def _close_files(self) -> None:
        with self._closing:  # close() may come while fill() ends
            fds = (self._source_fd, self._memory_fd)
            self._source_fd = self._memory_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


class FillingBytes(MappedBytes):
    """The reader's side: :class:`MappedBytes` of which a growing part is open. Any thread."""

    def __init__(self, owner: mmap.mmap, lead: int, size_bytes: int) -> None:
        """Made by :func:`map_verified`; closes all pages but the mark's."""
        super().__init__(owner, lead, size_bytes)
        #: The mark, in the page behind the content.
        self._mark = np.frombuffer(owner, np.uint64, 1, lead + size_with_progress(size_bytes) - PAGE_BYTES)
        self._lock = threading.Lock()
        self._opened_bytes = 0
        self._protect(0, size_with_progress(size_bytes) - PAGE_BYTES, _PROT_NONE)

    @property
    def is_whole(self) -> bool:
        """Whether every byte is verified *and* open, so that nobody need wait."""
        return self._opened_bytes == self.size_bytes

    def wait_verified(self, end_bytes: int) -> None:
        """Wait until every byte before ``end_bytes`` is verified, and open it. 0.1 us when it is open already.

        Raises:
            MappingError: outside of the mapping, or no progress for :data:`STALL_S`: its filler failed or is gone.
        """
        if end_bytes > self._opened_bytes:
            self._require_inside(0, end_bytes)
            self._open(self._wait_mark(end_bytes))

    def close(self) -> None:
        """See :meth:`MappedBytes.close`."""
        self._mark = np.zeros(1, np.uint64)  # it is a view of the mapping
        super().close()

    def _wait_mark(self, end_bytes: int) -> int:
        seen_bytes = -1
        while (verified_bytes := int(self._mark[0])) < end_bytes:
            now_mono_s = time.monotonic()
            if verified_bytes != seen_bytes:
                seen_bytes, deadline_mono_s = verified_bytes, now_mono_s + STALL_S
            if now_mono_s > deadline_mono_s:
                raise MappingError(
                    f"{verified_bytes} of {self.size_bytes} bytes are verified, and no more came within {STALL_S:g} s: "
                    "see the node agent's log"
                )
            time.sleep(POLL_S)
        return min(verified_bytes, self.size_bytes)

    def _open(self, verified_bytes: int) -> None:
        with self._lock:
            if verified_bytes > self._opened_bytes:
                start = self._opened_bytes // PAGE_BYTES * PAGE_BYTES
                is_all = verified_bytes == self.size_bytes
                end = size_with_progress(self.size_bytes) - PAGE_BYTES if is_all else verified_bytes
                self._protect(start, end // PAGE_BYTES * PAGE_BYTES, mmap.PROT_READ)
                self._opened_bytes = verified_bytes

    def _protect(self, start: int, end: int, protection: int) -> None:
        if _libc.mprotect(self.address + start, end - start, protection):
            raise MappingError(f"cannot change access to {end - start} bytes: {os.strerror(ctypes.get_errno())}")


def map_verified(fd: int, size_bytes: int) -> MappedBytes:
    """Map a memory file read-only, sealed or being filled. ``fd`` stays the caller's and may be closed afterwards.

    Raises:
        MappingError: neither, not of ``size_bytes``, or the kernel refused.
    """
    seals = read_seals(fd, size_bytes)
    if seals & fcntl.F_SEAL_WRITE:
        return map_sealed(fd, size_bytes)
    if seals & FILLING_SEALS != FILLING_SEALS or os.fstat(fd).st_size != size_with_progress(size_bytes):
        raise MappingError(f"descriptor {fd} has seals {seals:#x}, needs {FILLING_SEALS:#x}: anybody could write to it")
    return FillingBytes(*map_for_reading(fd, size_with_progress(size_bytes)), size_bytes)
