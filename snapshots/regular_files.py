"""Opening files that somebody else may have put there: no symlink, no device, no waiting."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular_file(path: Path) -> tuple[int, os.stat_result]:
    """A read-only descriptor of the regular file at exactly ``path``, and its status. The caller closes.

    Raises:
        OSError: as open(2); ELOOP for a symlink, EINVAL for a folder, FIFO, socket or device (none of them blocks).
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd, status
