"""A real zygote with small workers: ``python tests/toy_zygote.py [preparing] FD``. The order's model says what a worker
does. With ``preparing`` it is for ever about to prepare what it is asked to."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from worker.spawn_order import FromZygote, PrepareModel, SpawnedFds, SpawnOrder
from worker.zygote import Zygote


class NeverReady:
    """Keeps the files of each preparation, and does not begin with any. (The real one's imports start threads.)"""

    def __init__(self) -> None:
        self._kept: list[SpawnedFds] = []

    def begin(self, message: PrepareModel, fds: SpawnedFds) -> None:
        self._kept.append(fds.duplicate())

    def close_files(self) -> None:
        for fds in self._kept:
            fds.close()

    def forget(self, snapshot_id: str) -> None: ...

    def wait_ms(self) -> int | None:
        return None

    def step(self) -> FromZygote | None:
        return None

    def before_fork(self, order: SpawnOrder, fds: SpawnedFds) -> None: ...

    def after_fork(self) -> None: ...


def run_toy_worker(order: SpawnOrder, fds: SpawnedFds, forked_mono_ns: int) -> int:
    """Behave as ``order.model`` says; exit code."""
    match order.model.split(":"):
        case ["exit", code]:
            return int(code)
        case ["raise"]:
            raise RuntimeError("a worker that cannot start")
        case ["wait"]:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            while True:
                signal.pause()
        case ["stubborn"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        case ["read"]:
            seen = os.pread(fds.weights_fd, 100, 0) + b"," + os.pread(fds.guest_fd, 100, 0)
            return 0 if seen == order.manifest else 1
        case ["environment", path]:
            Path(path).write_bytes(Path("/proc/self/environ").read_bytes() + repr(dict(os.environ)).encode())
            return 0
        case ["inspect", path]:
            open_fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
            comm = Path("/proc/self/comm").read_text().strip()
            seen = {"fds": open_fds, "comm": comm, "ppid": os.getppid(), "own": [fds.weights_fd, fds.guest_fd]}
            Path(path).write_text(repr(seen))
            return 0
    return 99


if __name__ == "__main__":
    preparer = NeverReady() if "preparing" in sys.argv else None
    Zygote(socket.socket(fileno=int(sys.argv[-1])), run_toy_worker, preparer).serve()
