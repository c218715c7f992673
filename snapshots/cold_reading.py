"""Reads what is not in the page cache past it (O_DIRECT), straight into the memory that is being sealed.

Buffered reading of cold bytes copies each of them once more, and leaves a second copy of the weights in memory. Whether
a chunk is cold is asked of the kernel (RWF_NOWAIT) before each; cached chunks, unaligned tails, and files whose system
refuses are read through the cache as ever. Measured: DESIGN.md, "Cold reading".
"""

from __future__ import annotations

import os
from typing import Final

#: What O_DIRECT asks of positions, lengths and addresses on every usual disk.
ALIGNMENT: Final = 4096
#: Smaller files are read through the cache: they gain nothing here, and their next reader finds them.
MIN_FILE_BYTES: Final = 512 * 1024 * 1024


class ColdReader:
    """For one open file. Any thread; :meth:`close` once, after the last read."""

    def __init__(self, source_fd: int, size_bytes: int) -> None:
        self._source_fd = source_fd
        self._direct_fd = _open_direct(source_fd) if size_bytes >= MIN_FILE_BYTES else -1
        self.direct_bytes = 0  # that came past the cache; a hint where threads read side by side

    def read(self, start: int, into: memoryview) -> bool:
        """Fill ``into`` with the file's bytes from ``start`` on. False: not done, read them through the page cache."""
        if self._direct_fd < 0 or start % ALIGNMENT or len(into) % ALIGNMENT or not self._is_cold(start):
            return False
        done = 0
        try:
            while done < len(into):
                count = os.preadv(self._direct_fd, [into[done:]], start + done)
                if count == 0 or count % ALIGNMENT:
                    return False
                done += count
        except OSError:  # an address or a length that this disk does not take, or what the ordinary read will tell
            return False
        self.direct_bytes += done
        return True

    def close(self) -> None:
        """Idempotent; the file itself stays open."""
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
        self._direct_fd = -1

    def _is_cold(self, start: int) -> bool:
        try:
            os.preadv(self._source_fd, [bytearray(1)], start, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:  # this file system cannot say
            return False
        return False


def _open_direct(source_fd: int) -> int:
    """The same file anew, past the page cache; -1: its file system refuses."""
    try:
        return os.open(f"/proc/self/fd/{source_fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1
