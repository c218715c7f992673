"""A real zygote with small workers: ``python tests/toy_zygote.py FD``. The order's model says what a worker does."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from worker.spawn_order import SpawnedFds, SpawnOrder
from worker.zygote import Zygote


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
        case ["inspect", path]:
            open_fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
            comm = Path("/proc/self/comm").read_text().strip()
            seen = {"fds": open_fds, "comm": comm, "ppid": os.getppid(), "own": [fds.weights_fd, fds.guest_fd]}
            Path(path).write_text(repr(seen))
            return 0
    return 99


if __name__ == "__main__":
    Zygote(socket.socket(fileno=int(sys.argv[1])), run_toy_worker).serve()
