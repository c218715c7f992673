"""Log files of the state folder: JSON lines that all processes of a host append to, rotated by size.

A line is one ``write`` to a file opened for appending, so lines of several processes do not mix. Whoever finds the
file too large renames it, under a lock; the others notice (the name is another file now) and open the new one. A full
disk, or a folder that cannot be written, must not stop serving: then lines go to stderr only, until there is room. A
line that only part of was written is closed by a line break before the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

LOG_NAME: Final = "glowplug.jsonl"
MAX_BYTES: Final = 16 * 1024 * 1024
NUM_OLD: Final = 4  # glowplug.jsonl.1 is the newest
CHECK_EVERY_LINES: Final = 64


class LogFile:
    """An open log file. Writes go to the page cache; a forked child may go on with it."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, check_every_lines: int = CHECK_EVERY_LINES) -> None:
        self.path = folder / LOG_NAME
        self._max_bytes = max_bytes
        self._check_every_lines = check_every_lines
        self._lines = 0
        self._is_torn = False  # the last line of ours lacks its end
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = self._open()

    def write_line(self, line: str) -> None:
        """Append one line. Never raises for the disk's sake."""
        self._lines += 1
        with contextlib.suppress(OSError):
            if self._lines % self._check_every_lines == 0:
                self._ensure_current()
            if self._fd >= 0:
                data = (b"\n" if self._is_torn else b"") + line.encode("utf-8", "replace") + b"\n"
                num_written = os.write(self._fd, data)
                self._is_torn = num_written < len(data) and (num_written > 0 or self._is_torn)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path, flags, 0o600)

    def _ensure_current(self) -> None:
        """Rotate a file that is too large; follow one that another process has rotated."""
        if self._fd < 0:
            self._fd = self._open()
            return
        own = os.fstat(self._fd)
        if own.st_size > self._max_bytes:
            # The lock is on the file itself: a second process that waited finds another file under the name.
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                if self._is_under_name(own):
                    self._rotate()
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        if not self._is_under_name(own):
            fresh = self._open()
            os.close(self._fd)
            self._fd, self._is_torn = fresh, False

    def _is_under_name(self, own: os.stat_result) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def _rotate(self) -> None:
        for number in range(NUM_OLD - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}.{number}", f"{self.path}.{number + 1}")
        os.rename(self.path, f"{self.path}.1")
