"""The real zygote, except that its workers' GPU is the emulated one, as the file in EMULATED_GPU says.

The file is JSON: ``capacity_bytes`` of device memory, and ``lose``: the process whose next launch is a sticky error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

from worker.lean_imports import leave_out_unused

leave_out_unused()

from cuda_fixtures import emulator  # noqa: E402  # after what it must not import

from worker.backends.cuda import cuda_backend, opening  # noqa: E402
from worker.backends.cuda.device import Place  # noqa: E402
from worker.backends.cuda.emulated_device import EmulatedDevice  # noqa: E402
from worker.backends.cuda_kernels import Launch  # noqa: E402
from worker.slot import prepare_to_fork, run_worker  # noqa: E402
from worker.zygote import Zygote  # noqa: E402


class GovernedDevice(EmulatedDevice):
    """Its memory and its faults are in the hands of the test."""

    def allocate(self, num_bytes: int) -> Place:
        self.capacity_bytes = int(_orders()["capacity_bytes"])
        return super().allocate(num_bytes)

    def launch(self, launch: Launch, stream: object) -> None:
        if _orders()["lose"] == os.getpid():
            self.lose_after = 0
        super().launch(launch, stream)  # type: ignore[arg-type]


def _orders() -> dict[str, int]:
    found: dict[str, int] = json.loads(Path(os.environ["EMULATED_GPU"]).read_text())
    return found


def open_emulated(number: int) -> GovernedDevice:
    """Instead of CuPy's. Says which GPU this process may see."""
    print(f"emulated gpu {number} of {os.environ.get('CUDA_VISIBLE_DEVICES')} in {os.getpid()}", file=sys.stderr)
    return GovernedDevice(emulator().launch)


def warm_served_kernels(*arguments: Any) -> None:
    """Those of the tests' model only: the others take seconds here."""
    if "bf16" in arguments:
        _warm_kernels(*arguments)


if __name__ == "__main__":
    opening.open_device = open_emulated
    _warm_kernels = cuda_backend._warm_kernels
    cuda_backend._warm_kernels = warm_served_kernels
    models = prepare_to_fork()
    Zygote(socket.socket(fileno=int(sys.argv[1])), run_worker, models).serve()
