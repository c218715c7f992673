"""Tells the agent that its store changed, so that a model can be asked for as soon as it is built.

inotify on the folder of manifests, whose files appear and go by renames. It misses what another host writes to a shared
file system, and a kernel may refuse it (``fs.inotify.max_user_instances``), so whoever waits has a time limit and looks
by itself then. Source: inotify(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Final

import structlog

_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED: Final = 0x40 | 0x80  # from, to
_IN_DELETE: Final = 0x200
_READ_BYTES: Final = 64 << 10

_libc: Final = ctypes.CDLL(None, use_errno=True)


class StoreWatch:
    """Changes of the files in one folder. Event loop only; one waiter."""

    def __init__(self, folder: Path) -> None:
        """Watch from now on. Never fails: without inotify a warning says so, and waits last as long as they may."""
        self._changed = asyncio.Event()
        self._fd = -1
        try:
            self._fd = _open_inotify(folder)
        except OSError as error:
            structlog.get_logger().warning(
                "store_not_watched",
                reason=error.strerror,
                remedy="new models are seen within a second; raise fs.inotify.max_user_instances",
            )
            return
        asyncio.get_running_loop().add_reader(self._fd, self._on_events)

    def __enter__(self) -> StoreWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; idempotent."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def wait_changed(self, within_s: float) -> bool:
        """Wait for a change since the last call, at most ``within_s`` seconds; whether one was seen."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._changed.wait()
        seen = self._changed.is_set()
        self._changed.clear()
        return seen

    def _on_events(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, _READ_BYTES):  # which files is for the scan to find out
                pass
        self._changed.set()


def _open_inotify(folder: Path) -> int:
    """A descriptor that is readable once a file of ``folder`` changed.

    Raises:
        OSError: the kernel refused.
    """
    fd = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if _libc.inotify_add_watch(fd, os.fsencode(folder), _IN_CLOSE_WRITE | _IN_MOVED | _IN_DELETE) < 0:
        failed = ctypes.get_errno()
        os.close(fd)
        raise OSError(failed, os.strerror(failed))
    return fd
