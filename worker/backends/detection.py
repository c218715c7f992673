"""Names of backends, and which one a machine gets where nobody says. Imports none of them: agents read this."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from scheduler.contract.states import Task

CPU_BACKENDS: Final = ("numkong", "numpy")
CUDA: Final = "cuda"

#: One folder for each GPU, as the kernel module of NVIDIA's driver lists them; some containers have the device only.
_NVIDIA_GPUS: Final = Path("/proc/driver/nvidia/gpus")
_NVIDIA_DEVICE: Final = Path("/dev/nvidiactl")


def choose_worker_backend(backend: str, task: Task) -> str:
    """What a worker for ``task`` runs on where the node's backend is ``backend``: encoders have no GPU kernels, and
    need neither a device nor the time to open one."""
    return CPU_BACKENDS[0] if task is Task.EMBED and backend == CUDA else backend


def detect_backend(gpus: Path = _NVIDIA_GPUS, device: Path = _NVIDIA_DEVICE) -> str:
    """``cuda`` where there is a GPU and CuPy is installed, else ``numkong``. Imports and opens nothing."""
    has_gpu = any(gpus.iterdir()) if gpus.is_dir() else device.exists()
    return CUDA if has_gpu and importlib.util.find_spec("cupy") is not None else CPU_BACKENDS[0]
