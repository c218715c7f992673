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
_MIG_PREFIX: Final = "MIG-"
#: What an error's GPU instance says where the error is of no single one.
_WHOLE_GPU: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class GpuReading:
    """A GPU, or one MIG instance of it, at one instant. ``new_xids``: the driver's critical errors since the last
    reading, in order. Errors are those of the whole GPU: its instances share them."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    architecture: int
    driver: str
    uncorrected_ecc: int = 0  # since the driver was loaded, or the GPU was reset
    new_xids: tuple[int, ...] = ()
    used_by_pid: dict[int, int] = field(default_factory=dict)
    is_lost: bool = False  # the driver cannot reach it any more
    instance: int = -1  # number of the MIG instance; -1: the whole GPU
    refused: str = ""  # why it can be given no memory, by how it is partitioned
    remap_pending: bool = False  # bad rows of memory are mapped out by the next reset
    remap_failed: bool = False  # bad rows of memory cannot be mapped out


@dataclass(frozen=True, slots=True)
class _Gpu:
    """What does not change. ``handle`` is the library's."""

    handle: Any
    blank: GpuReading
    is_allowed: bool  # as a whole; else single instances may be


class Nvml:
    """All GPUs of this machine that ``CUDA_VISIBLE_DEVICES`` allows. One thread at a time; every method may block.

    A GPU in MIG mode is given out as its instances, each with its own memory; the whole of it is nobody's then.
    """

    def __init__(self, pynvml: Any, env: Mapping[str, str] = os.environ) -> None:
        """``pynvml`` is the module, initialised; see :func:`open_nvml`."""
        self._pynvml = pynvml
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        self._events: Any = None
        self._visible = env.get(_VISIBLE_DEVICES)
        self._gpus: list[_Gpu] = []
        self._latest: dict[str, list[GpuReading]] = {}  # by the GPU's UUID
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
            allowed = is_allowed(index, uuid, self._visible)
            if allowed or _MIG_PREFIX in (self._visible or ""):
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
                name = str(pynvml.nvmlDeviceGetName(handle))
                blank = GpuReading(index, uuid, name, 0, 0, 10 * major + minor, driver)
                self._gpus.append(_Gpu(handle, blank, allowed))
                self._latest[uuid] = [blank] if allowed else []
        self._watch_errors()

    def read(self) -> list[GpuReading]:
        """Every GPU now, by index. One that cannot be read comes with its last memory, and is lost if that is why."""
        xids = self._take_xids()
        for gpu in self._gpus:
            uuid = gpu.blank.uuid
            try:
                readings = self._read_gpu(gpu, xids.get(uuid, []))
            except self._pynvml.NVMLError as error:
                is_lost = error.value == self._pynvml.NVML_ERROR_GPU_IS_LOST
                numbers = tuple(number for number, _ in xids.get(uuid, ()))
                readings = [
                    replace(latest, new_xids=numbers, is_lost=is_lost or latest.is_lost)
                    for latest in self._latest[uuid]
                ]
                structlog.get_logger().warning("gpu_not_read", uuid=uuid, error=str(error))
            self._latest[uuid] = readings
        return [reading for gpu in self._gpus for reading in self._latest[gpu.blank.uuid]]

    def close(self) -> None:
        """Let go of the library."""
        try:
            self._pynvml.nvmlShutdown()
        except self._pynvml.NVMLError as error:
            structlog.get_logger().warning("nvml_not_closed", error=str(error))

    def _read_gpu(self, gpu: _Gpu, xids: list[tuple[int, int]]) -> list[GpuReading]:
        """The GPU, or its instances. ``xids`` with the GPU instance that each is of."""
        pending, failed = self._read_remapping(gpu.handle)
        whole = replace(
            gpu.blank,
            uncorrected_ecc=self._read_ecc(gpu.handle),
            new_xids=tuple(number for number, _ in xids),
            remap_pending=pending,
            remap_failed=failed,
        )
        if not self._is_partitioned(gpu.handle):
            return [self._read_memory(gpu.handle, whole)] if gpu.is_allowed else []
        instances = self._read_instances(gpu, whole, xids)
        if instances or not gpu.is_allowed:
            return instances
        remedy = "make some (`nvidia-smi mig -cgi`), or switch the mode off (`nvidia-smi -mig 0`)"
        return [replace(whole, refused=f"MIG mode is on and it has no instance that may be used: {remedy}")]

    def _read_instances(self, gpu: _Gpu, whole: GpuReading, xids: list[tuple[int, int]]) -> list[GpuReading]:
        found: list[GpuReading] = []
        owners: dict[int, str] = {}  # of a GPU instance's memory, which its compute instances share
        for number in range(int(self._pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu.handle))):
            try:
                handle = self._pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, number)
            except self._pynvml.NVMLError_NotFound:
                continue  # numbers have gaps
            uuid = str(self._pynvml.nvmlDeviceGetUUID(handle))
            if not gpu.is_allowed and not is_allowed(gpu.blank.index, uuid, self._visible):
                continue
            memory_of = int(self._pynvml.nvmlDeviceGetGpuInstanceId(handle))
            name = str(self._pynvml.nvmlDeviceGetName(handle))
            own = tuple(xid for xid, instance in xids if instance in (memory_of, _WHOLE_GPU))
            reading = replace(whole, uuid=uuid, name=name, instance=number, new_xids=own)
            owner = owners.setdefault(memory_of, uuid)
            if owner != uuid:
                shared = f"its memory is also that of {owner} (compute instances of one GPU instance)"
                found.append(replace(reading, refused=f"{shared}: make it a GPU instance of its own"))
            else:
                found.append(self._read_memory(handle, reading))
        return found

    def _read_memory(self, handle: Any, reading: GpuReading) -> GpuReading:
        memory = self._pynvml.nvmlDeviceGetMemoryInfo(handle)
        return replace(
            reading,
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            used_by_pid=self._read_processes(handle),
        )

    def _is_partitioned(self, handle: Any) -> bool:
        try:
            current, _ = self._pynvml.nvmlDeviceGetMigMode(handle)
        except (self._pynvml.NVMLError_NotSupported, self._pynvml.NVMLError_FunctionNotFound):
            return False
        return bool(current == self._pynvml.NVML_DEVICE_MIG_ENABLE)

    def _read_remapping(self, handle: Any) -> tuple[bool, bool]:
        """Whether rows wait to be mapped out, and whether that has failed; neither before Ampere."""
        try:
            _, _, pending, failed = self._pynvml.nvmlDeviceGetRemappedRows(handle)
        except (self._pynvml.NVMLError_NotSupported, self._pynvml.NVMLError_FunctionNotFound):
            return False, False
        return bool(pending), bool(failed)

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
            for gpu in self._gpus:
                self._pynvml.nvmlDeviceRegisterEvents(
                    gpu.handle, self._pynvml.nvmlEventTypeXidCriticalError, self._events
                )
        except self._pynvml.NVMLError as error:
            self._events = None
            structlog.get_logger().warning("gpu_errors_not_watched", error=str(error))

    def _take_xids(self) -> dict[str, list[tuple[int, int]]]:
        """By GPU: number, and the GPU instance that it is of."""
        found: dict[str, list[tuple[int, int]]] = {}
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = self._pynvml.nvmlEventSetWait(self._events, 0)
                uuid = str(self._pynvml.nvmlDeviceGetUUID(event.device))
            except self._pynvml.NVMLError:
                break  # mostly NVML_ERROR_TIMEOUT: there is none
            found.setdefault(uuid, []).append((int(event.eventData), int(event.gpuInstanceId)))
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
    the beginning of its UUID, which may be a MIG instance's."""
    if visible is None:
        return True
    names = [name.strip() for name in visible.split(",")]
    return any(name == str(index) or (name[:4] in ("GPU-", _MIG_PREFIX) and uuid.startswith(name)) for name in names)
