"""The driver's own way to take a process off its GPUs: ``cuCheckpointProcess*``, driver 570 and later.

It suspends a whole process by its id: all its device memory goes to that process's host memory, the GPU is free. Beside
parking (weights dropped, host copy kept) it is the slower and more general way; ``gpu-check`` measures it. Nothing here
is used unless it is asked for. Source: CUDA Driver API, "CUDA Checkpointing".
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any, Final

from worker.backends.cuda.device import DeviceError

_LIBRARY: Final = "libcuda.so.1"
_LOCK_TIMEOUT_MS: Final = 10_000
_CALLS: Final = ("Lock", "Checkpoint", "Restore", "Unlock", "GetState")


class ProcessState(IntEnum):
    """``CUprocessState``."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class _LockArguments(ctypes.Structure):
    """``CUcheckpointLockArgs``: a timeout in milliseconds, then reserved zeros up to 64 bytes."""

    _fields_ = [("timeoutMs", ctypes.c_uint), ("reserved", ctypes.c_ubyte * 60)]


class DriverCheckpoint:
    """Suspends and resumes processes by id. The caller needs ptrace rights over them. Any thread; calls block."""

    def __init__(self, library: Any) -> None:
        """``library`` is libcuda; see :func:`find_checkpoint`."""
        self._library = library

    def read_state(self, pid: int) -> ProcessState:
        """Whether the process has its GPU memory.

        Raises:
            DeviceError: the driver refuses; so for all methods.
        """
        state = ctypes.c_int()
        self._call("GetState", pid, ctypes.byref(state))
        return ProcessState(state.value)

    def suspend(self, pid: int) -> None:
        """Stop the process's CUDA calls and move its device memory to its host memory. On failure it runs on."""
        arguments = _LockArguments(timeoutMs=_LOCK_TIMEOUT_MS)
        self._call("Lock", pid, ctypes.byref(arguments))
        try:
            self._call("Checkpoint", pid, None)
        except DeviceError:
            self._call("Unlock", pid, None)
            raise

    def resume(self, pid: int) -> None:
        """Bring the memory back and let its CUDA calls go on."""
        self._call("Restore", pid, None)
        self._call("Unlock", pid, None)

    def _call(self, name: str, pid: int, argument: Any) -> None:
        status = getattr(self._library, f"cuCheckpointProcess{name}")(ctypes.c_int(pid), argument)
        if status:
            raise DeviceError(f"cuCheckpointProcess{name} of process {pid}: CUDA error {status}")


def find_checkpoint(library: str = _LIBRARY) -> DriverCheckpoint | None:
    """The driver's checkpoint calls; None: no driver, or one older than 570. Never call it in an agent or a zygote: it
    loads libcuda."""
    try:
        found = ctypes.CDLL(library)
    except OSError:
        return None
    if not all(hasattr(found, f"cuCheckpointProcess{name}") for name in _CALLS):
        return None
    return None if found.cuInit(0) else DriverCheckpoint(found)
