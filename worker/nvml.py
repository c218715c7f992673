"""The driver's management library, by NVIDIA's own binding: what GPUs there are, their memory and their errors.

The one door to ``pynvml``. It opens no CUDA context and takes no device memory, so an agent may use it; a zygote does
not. Calls block for milliseconds (the first one longer, where no process keeps the driver loaded): never on a loop.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

_LIBRARY: Final = "libnvidia-ml.so.1"
_VISIBLE_DEVICES: Final = "CUDA_VISIBLE_DEVICES"
#: Errors that are taken in one reading, at most; the rest comes with the next.
_MAX_EVENTS: Final = 32


@dataclass(frozen=True, slots=True)
class GpuReading:
    """A GPU at one instant. ``new_xids``: the driver's critical errors since the last reading, in order."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    architecture: int
    driver: str
    uncorrected_ecc: int = 0
    new_xids: tuple[int, ...] = ()
    used_by_pid: dict[int, int] = field(default_factory=dict)
    is_lost: bool = False  # the driver cannot reach it any more


class Nvml:
    """All GPUs of this machine that ``CUDA_VISIBLE_DEVICES`` allows. One thread at a time; every method may block."""

    def __init__(self, pynvml: Any, env: Mapping[str, str] = os.environ) -> None:
        """``pynvml`` is the module, initialised; see :func:`open_nvml`."""
        self._pynvml = pynvml
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        self._events: Any = None
        self._handles: dict[str, Any] = {}
        self._latest: dict[str, GpuReading] = {}
        allowed = env.get(_VISIBLE_DEVICES)
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
            if is_allowed(index, uuid, allowed):
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
                name = str(pynvml.nvmlDeviceGetName(handle))
                self._handles[uuid] = handle
                self._latest[uuid] = GpuReading(index, uuid, name, 0, 0, 10 * major + minor, driver)
        self._watch_errors()

    def read(self) -> list[GpuReading]:
        """Every GPU now, by index. One that cannot be read comes with its last memory, and is lost if that is why."""
        xids = self._take_xids()
        for uuid, handle in self._handles.items():
            latest = replace(self._latest[uuid], new_xids=tuple(xids.get(uuid, ())))
            try:
                latest = self._read_one(handle, latest)
            except self._pynvml.NVMLError as error:
                is_lost = error.value == self._pynvml.NVML_ERROR_GPU_IS_LOST
                latest = replace(latest, is_lost=is_lost or latest.is_lost)
                structlog.get_logger().warning("gpu_not_read", uuid=uuid, error=str(error))
            self._latest[uuid] = latest
        return list(self._latest.values())

    def close(self) -> None:
        """Let go of the library."""
        try:
            self._pynvml.nvmlShutdown()
        except self._pynvml.NVMLError as error:
            structlog.get_logger().warning("nvml_not_closed", error=str(error))

    def _read_one(self, handle: Any, latest: GpuReading) -> GpuReading:
        memory = self._pynvml.nvmlDeviceGetMemoryInfo(handle)
        return replace(
            latest,
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            uncorrected_ecc=self._read_ecc(handle),
            used_by_pid=self._read_processes(handle),
            is_lost=False,
        )

    def _read_ecc(self, handle: Any) -> int:
        """0 where the memory has no error correction."""
        kind, since = self._pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self._pynvml.NVML_VOLATILE_ECC
        try:
            return int(self._pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, since))
        except (self._pynvml.NVMLError_NotSupported, self._pynvml.NVMLError_NoPermission):
            return 0

    def _read_processes(self, handle: Any) -> dict[int, int]:
        """Empty where the driver does not tell (some containers and virtual GPUs)."""
        try:
            found = self._pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except (self._pynvml.NVMLError_NotSupported, self._pynvml.NVMLError_NoPermission):
            return {}
        return {int(process.pid): int(process.usedGpuMemory or 0) for process in found}

    def _watch_errors(self) -> None:
        """Errors are told only to who asked for them before; a driver that does not offer that is read without."""
        try:
            self._events = self._pynvml.nvmlEventSetCreate()
            for handle in self._handles.values():
                self._pynvml.nvmlDeviceRegisterEvents(handle, self._pynvml.nvmlEventTypeXidCriticalError, self._events)
        except self._pynvml.NVMLError as error:
            self._events = None
            structlog.get_logger().warning("gpu_errors_not_watched", error=str(error))

    def _take_xids(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = self._pynvml.nvmlEventSetWait(self._events, 0)
                uuid = str(self._pynvml.nvmlDeviceGetUUID(event.device))
            except self._pynvml.NVMLError:
                break  # mostly NVML_ERROR_TIMEOUT: there is none
            found.setdefault(uuid, []).append(int(event.eventData))
        return found


def open_nvml() -> Nvml | None:
    """The library; None: there is no driver, no binding of it (extra ``gpu-cuda12`` or ``gpu-cuda13``), or it refuses,
    which the log tells."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    try:
        import pynvml
    except ImportError:
        remedy = "pip install 'glowplug[gpu-cuda12]' or 'glowplug[gpu-cuda13]': GPUs are not reported without"
        structlog.get_logger().warning("nvml_not_installed", remedy=remedy)
        return None
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml)
    except pynvml.NVMLError as error:
        structlog.get_logger().error("nvml_refused", error=str(error), remedy="reload or reinstall the driver")
        return None


def is_allowed(index: int, uuid: str, visible: str | None) -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` (None: not set) lets programs have a GPU: by number, as nvidia-smi counts, or by
    the beginning of its UUID."""
    if visible is None:
        return True
    names = [name.strip() for name in visible.split(",")]
    return any(name == str(index) or (name.startswith("GPU-") and uuid.startswith(name)) for name in names)
