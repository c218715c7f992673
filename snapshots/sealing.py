"""Fills a memory file with a blob on all cores: huge pages first, then each chunk read, decrypted and digested there.

Huge pages: the memory file is filled through a mapping aligned to 2 MiB. Where the kernel gives shared memory huge
pages on advice it does so; where its setting is ``never``, MADV_COLLAPSE still makes them, extent by extent, before
the bytes are copied in. Failing both, the 4 KiB pages are as right and only slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from snapshots import chunks
from snapshots.cold_reading import ColdReader
from snapshots.stored_chunks import StoredChunks

HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024
#: Work of one thread at a time while sealing: long enough that MADV_COLLAPSE's fixed cost (it drains the page lists
#: of all cores) does not matter, short enough that the cores finish together.
PIECE_BYTES: Final = 16 * 1024 * 1024
MADV_COLLAPSE: Final = 25  # Linux 6.1

_libc: Final = ctypes.CDLL(None, use_errno=True)  # CDLL: calls release the GIL
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fill_and_verify(
    source_fd: int,
    memory_fd: int,
    target: memoryview,
    stored: StoredChunks,
    num_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    limit_bytes_per_s: float = 0,
    stop: threading.Event | None = None,
) -> None:
    """Fill ``target``, a writable mapping of ``memory_fd``, with the blob whose file is open as ``source_fd``.

    In the order of the file, which is the order of use. ``on_progress(verified_bytes, size_bytes)``: all chunks before
    ``verified_bytes`` are in place and verified; called in order, from the calling thread. ``limit_bytes_per_s`` paces
    the reading (0: as fast as it goes). ``stop``, set by another thread, ends it early.

    On failure ``target`` holds nothing of use behind what ``on_progress`` named.

    Raises:
        BlobCorrupt: a chunk is not the signed one; the first such.
        StoreError: the disk cannot read it.
        OSError: no memory for it, or stopped (ECANCELED).
    """
    ref = stored.ref
    stop = stop or threading.Event()
    piece_bytes = _choose_piece_bytes(ref.chunk_bytes, limit_bytes_per_s)
    pace = _Pace(limit_bytes_per_s)
    cold = ColdReader(source_fd, 0 if ref.encryption is not None else ref.size_bytes)
    pool = ThreadPoolExecutor(num_threads or chunks.available_cores(), thread_name_prefix="seal")
    with contextlib.closing(cold), pool:  # the pool ends first
        pieces = [
            (end, pool.submit(_fill_piece, source_fd, memory_fd, target, (start, end), stored, pace, stop, cold))
            for start, end in chunks.iterate_chunks(ref.size_bytes, piece_bytes)
        ]
        try:
            for end, piece in pieces:
                piece.result()
                if on_progress is not None:
                    on_progress(end, ref.size_bytes)
        except BaseException:
            stop.set()
            raise


def _choose_piece_bytes(chunk_bytes: int, limit_bytes_per_s: float) -> int:
    """Whole chunks: :data:`PIECE_BYTES`, or what comes in a second where that is less, so that progress is told before
    anybody takes the filler for dead."""
    most_bytes = min(PIECE_BYTES, limit_bytes_per_s) if limit_bytes_per_s > 0 else PIECE_BYTES
    return max(int(most_bytes) // chunk_bytes, 1) * chunk_bytes


class _Pace:
    """Keeps a reader at or below a rate, from the moment it is made."""

    def __init__(self, limit_bytes_per_s: float) -> None:
        self._limit_bytes_per_s = limit_bytes_per_s
        self._begin_mono_s = time.monotonic()

    def wait(self, position: int, stop: threading.Event) -> None:
        """Until the byte at ``position`` may be read, or ``stop`` is set."""
        if self._limit_bytes_per_s > 0:
            stop.wait(self._begin_mono_s + position / self._limit_bytes_per_s - time.monotonic())


def verify_in_place(target: memoryview, stored: StoredChunks, num_threads: int | None = None) -> None:
    """Digest every chunk of a blob that is in memory already.

    Raises:
        BlobCorrupt: a chunk is not the signed one: the memory itself is faulty, as sealed memory cannot be written.
    """
    with ThreadPoolExecutor(num_threads or chunks.available_cores(), thread_name_prefix="verify") as pool:
        for index, is_right in enumerate(pool.map(lambda index: _is_right(target, stored, index), stored)):
            if not is_right:
                raise stored.corrupt(index, "its bytes changed in sealed memory: suspect this machine's memory")


def _is_right(target: memoryview, stored: StoredChunks, index: int) -> bool:
    start, end = stored.plain_span(index)
    with target[start:end] as chunk:
        return chunks.digest_chunk(chunk) == stored.ref.chunk_digest(index)


def _fill_piece(
    source_fd: int,
    memory_fd: int,
    target: memoryview,
    span: tuple[int, int],
    stored: StoredChunks,
    pace: _Pace,
    stop: threading.Event,
    cold: ColdReader,
) -> None:
    """Copy one piece chunk by chunk and digest each while it is in the core's cache."""
    start, end = span
    pace.wait(start, stop)
    if stop.is_set():
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
    _back_with_huge_pages(memory_fd, target, start, end)
    if stored.ref.encryption is not None:
        # Decryption stores to the mapping itself: where memory runs out that must be an error here, not a SIGBUS there.
        os.posix_fallocate(memory_fd, start, end - start)
    chunk_bytes = stored.ref.chunk_bytes
    for position in range(start, end, chunk_bytes):
        with target[position : min(position + chunk_bytes, end)] as chunk:
            stored.read_into(source_fd, position // chunk_bytes, chunk, cold)


def _back_with_huge_pages(memory_fd: int, target: memoryview, start: int, end: int) -> None:
    """Make the whole 2 MiB extents of this piece huge pages, if the kernel will. Best effort.

    Raises:
        OSError: no memory for it.
    """
    end -= end % HUGE_PAGE_BYTES
    if start % HUGE_PAGE_BYTES or end <= start:
        return
    for extent in range(start, end, HUGE_PAGE_BYTES):
        # An extent without any page cannot be collapsed. Allocated rather than read: the file may be on a disk, where
        # a byte of each extent would be as many waits (180 ms against 140 for 269 MB, page cache cold).
        os.posix_fallocate(memory_fd, extent, 1)
    address = int(np.frombuffer(target, np.uint8).ctypes.data)
    _libc.madvise(address + start, end - start, MADV_COLLAPSE)
