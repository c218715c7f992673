"""The real zygote, except that a worker writes down which modules its life imported: ``... FD`` with REPORT_TO set."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"

from worker.lean_imports import leave_out_unused

leave_out_unused()

from worker.slot import prepare_to_fork, run_worker  # noqa: E402  # after what it must not import
from worker.spawn_order import SpawnedFds, SpawnOrder  # noqa: E402
from worker.zygote import Zygote  # noqa: E402


def run_inspected(order: SpawnOrder, fds: SpawnedFds, forked_mono_ns: int) -> int:
    """``run_worker``, then one line for each module that was not there at the fork."""
    before = set(sys.modules)
    code = run_worker(order, fds, forked_mono_ns)
    Path(os.environ["REPORT_TO"]).write_text("".join(f"{name}\n" for name in sorted(set(sys.modules) - before)))
    return code


if __name__ == "__main__":
    models = prepare_to_fork()
    Zygote(socket.socket(fileno=int(sys.argv[1])), run_inspected, models).serve()
