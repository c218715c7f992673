"""The driver's own way to take a process off its GPUs: ``cuCheckpointProcess*``, driver 570 and later.

It suspends a whole process by its id: all its device memory goes to that process's host memory, the GPU is free.
Alone it is the slower and more general way than parking (weights dropped, host copy kept): ``gpu-check`` measures
that. Workers of models with ``park: release`` are parked first (:mod:`worker.releaser`). Source: CUDA Driver API,
"CUDA Checkpointing".
"""

from __future__ import annotations

import contextlib
import ctypes
from enum import IntEnum
from typing import Any, Final

from worker.backends.cuda.device import DeviceError

_LIBRARY: Final = "libcuda.so.1"
_LOCK_TIMEOUT_MS: Final = 2_000
_UNKNOWN: Final = 999  # CUDA_ERROR_UNKNOWN
_CALLS: Final = ("Lock", "Checkpoint", "Restore", "Unlock", "GetState")


class ProcessState(IntEnum):
    """``CUprocessState``."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class CheckpointRefused(DeviceError):
    """The driver did not do it. ``status`` is its error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


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
            CheckpointRefused: the driver refuses; so for all methods.
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
        except CheckpointRefused:
            with contextlib.suppress(CheckpointRefused):  # it may have ended; what it says of it first is the cause
                self._call("Unlock", pid, None)
            raise

    def resume(self, pid: int) -> None:
        """Bring the memory back and let its CUDA calls go on, from wherever an earlier call has left it."""
        state = self.read_state(pid)
        if state is ProcessState.FAILED:
            raise CheckpointRefused(f"process {pid} has failed in the driver and cannot come back", _UNKNOWN)
        if state is ProcessState.CHECKPOINTED:
            self._call("Restore", pid, None)
        if state is not ProcessState.RUNNING:
            self._call("Unlock", pid, None)

    def _call(self, name: str, pid: int, argument: Any) -> None:
        status = getattr(self._library, f"cuCheckpointProcess{name}")(ctypes.c_int(pid), argument)
        if status:
            raise CheckpointRefused(f"cuCheckpointProcess{name} of process {pid}: CUDA error {status}", status)


def find_checkpoint(library: str = _LIBRARY) -> DriverCheckpoint | None:
    """The driver's checkpoint calls; None: see :func:`probe_checkpoint`."""
    found = probe_checkpoint(library)
    return None if isinstance(found, str) else found


def probe_checkpoint(library: str = _LIBRARY) -> DriverCheckpoint | str:
    """The driver's checkpoint calls; text: why there are none. Never call it in an agent or a zygote: it loads
    libcuda."""
    try:
        found = ctypes.CDLL(library)
    except OSError as error:
        return f"no driver: {error}"
    if not all(hasattr(found, f"cuCheckpointProcess{name}") for name in _CALLS):
        return "the driver has no cuCheckpointProcess* (570 and later have)"
    status = found.cuInit(0)
    return f"cuInit: CUDA error {status}" if status else DriverCheckpoint(found)
