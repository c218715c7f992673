"""Checks of the host: kernel, limits, memory, processor, clock, disk, GPU. They read and probe; they change nothing."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from worker.backends.cores import count_usable_cores
from worker.diagnosis.findings import Finding
from worker.gpu_monitor import REMAP_PENDING, GpuSource, describe_state
from worker.nvml import GpuReading, open_nvml

GIB: Final = 1024**3
MIN_FILES: Final = 4096
MIN_DISK_BYTES: Final = 2 * GIB
MIN_MEMORY_BYTES: Final = 2 * GIB
MIN_KERNEL: Final = (5, 14)  # MADV_POPULATE_READ
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
SEALS: Final = 0x0E  # write, grow, shrink
MADV_POPULATE_READ: Final = 22
SANE_YEAR: Final = 2024
MIN_ARCHITECTURE: Final = 80


def check_kernel() -> Iterator[Finding]:
    """Version, and the three features that wakes rest on, each tried."""
    release = platform.release()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if sys.platform != "linux":
        yield Finding("kernel", "fail", sys.platform, "glowplug needs Linux")
        return
    if version < MIN_KERNEL:
        yield Finding("kernel", "warn", release, "use Linux 5.14 or newer: older ones fault weights in page by page")
    else:
        yield Finding("kernel", "ok", release)
    yield _check_sealing()
    yield _check_populate()


def _check_sealing() -> Finding:
    try:
        fd = os.memfd_create("glowplug-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, 4096)
            fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
            sealed = fcntl.fcntl(fd, F_GET_SEALS) & SEALS == SEALS
        finally:
            os.close(fd)
    except OSError as error:
        return Finding("memfd sealing", "fail", str(error), "allow memfd_create and F_ADD_SEALS (seccomp, container)")
    if not sealed:
        return Finding("memfd sealing", "fail", "seals do not hold", "run on a kernel that honours F_ADD_SEALS")
    return Finding("memfd sealing", "ok", "write, grow and shrink are sealed")


def _check_populate() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, 4096, 1, 0x22, -1, 0)  # PROT_READ, private and anonymous
    status = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), MADV_POPULATE_READ)
    error = ctypes.get_errno()
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4096))
    if status != 0:
        return Finding("MADV_POPULATE", "warn", os.strerror(error), "use Linux 5.14 or newer: quicker wakes from disk")
    return Finding("MADV_POPULATE", "ok", "works")


def check_limits() -> Iterator[Finding]:
    """Descriptors (each client is one), locked and shared memory, huge pages."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < MIN_FILES:
        remedy = f"raise the hard limit to {MIN_FILES} or more: LimitNOFILE= in systemd, or ulimit -Hn"
        yield Finding("open files", "fail" if hard < 256 else "warn", f"{soft} (hard {hard})", remedy)
    else:
        yield Finding("open files", "ok", f"{soft} (hard {hard})")
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        yield Finding("address space", "warn", f"{address_space} bytes", "ulimit -v unlimited: KV caches reserve space")
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        yield Finding("huge pages", "warn", "unknown", "transparent huge pages speed KV memory up")
    else:
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(
            "huge pages", "warn" if setting == "never" else "ok", setting, remedy if setting == "never" else ""
        )


def check_memory() -> Iterator[Finding]:
    """What is there and what is free."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    seen = f"{free / GIB:.1f} GiB available of {total / GIB:.1f}"
    if free < MIN_MEMORY_BYTES:
        yield Finding("memory", "warn", seen, "a worker reserves kv_budget_bytes (2 GiB): lower it, or free memory")
    else:
        yield Finding("memory", "ok", seen)


def check_processor() -> Iterator[Finding]:
    """Cores, and what NumKong can use of them."""
    yield Finding("cores", "ok", str(count_usable_cores()))
    try:
        import numkong
    except ImportError as error:
        yield Finding("NumKong", "fail", str(error), "pip install numkong, or GLOWPLUG_BACKEND=numpy (slow)")
        return
    found = sorted(name for name, is_there in numkong.get_capabilities().items() if is_there and name != "serial")
    if not found:
        yield Finding("NumKong", "warn", "serial only", "no vector instructions found: expect slow answers")
        return
    amx = "AMX" if any("amx" in name for name in found) else "no AMX"
    yield Finding("NumKong", "ok", f"{amx}; {', '.join(found)}")


def check_clock() -> Iterator[Finding]:
    """Ages of keys and log lines use the wall clock; who runs what does not."""
    year = time.gmtime().tm_year
    seen = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if year < SANE_YEAR:
        yield Finding("clock", "fail", seen, "set the clock (NTP): API keys expire by it")
    else:
        yield Finding("clock", "ok", seen)


def check_disk(state_dir: Path) -> Iterator[Finding]:
    """Room and rights where snapshots, keys and queue are."""
    folder = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    if not os.access(folder, os.W_OK):
        remedy = f"chown it, or choose another --state-dir than {state_dir}"
        yield Finding("disk", "fail", f"{folder} cannot be written", remedy)
        return
    free = shutil.disk_usage(folder).free
    seen = f"{free / GIB:.1f} GiB free at {folder}"
    if free < MIN_DISK_BYTES:
        yield Finding("disk", "warn", seen, "free some: `glowplug gc` deletes blobs that no snapshot names")
    else:
        yield Finding("disk", "ok", seen)


def check_gpu(open_driver: Callable[[], GpuSource | None] = open_nvml) -> Iterator[Finding]:
    """GPUs as the driver's library tells of them, and whether the backend for them is there."""
    driver = open_driver()
    if driver is None:
        if Path("/dev/nvidiactl").exists():
            remedy = "install its library (libnvidia-ml.so.1), and glowplug[gpu-cuda12] or glowplug[gpu-cuda13]"
            yield Finding("GPU", "warn", "a device, but its driver cannot be asked", remedy)
        else:
            yield Finding("GPU", "ok", "none; the CPU backend is used")
        return
    try:
        readings = driver.read()
    finally:
        driver.close()
    for gpu in readings:
        yield _describe_gpu(gpu)
    if readings and importlib.util.find_spec("cupy") is None:
        remedy = "pip install 'glowplug[gpu-cuda12]' or 'glowplug[gpu-cuda13]'"
        yield Finding("GPU backend", "warn", "CuPy is not installed: models run on the CPU", remedy)


def _describe_gpu(gpu: GpuReading) -> Finding:
    memory = f"{(gpu.total_bytes - gpu.free_bytes) / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB used"
    instance = "" if gpu.instance < 0 else f":{gpu.instance}"
    version = f"compute capability {gpu.architecture / 10:.1f}, driver {gpu.driver}"
    seen = f"{gpu.index}{instance}: {gpu.name}, {version}, {memory}"
    cause, _, remedy = describe_state(gpu).partition(": ")
    if cause:
        return Finding("GPU", "fail", f"{seen}; {cause}; no worker is sent there", remedy)
    if gpu.remap_pending:
        return Finding("GPU", "warn", f"{seen}; {REMAP_PENDING}", "nvidia-smi --gpu-reset")
    if gpu.uncorrected_ecc:
        told = f"{seen}; {gpu.uncorrected_ecc} uncorrected memory errors"
        return Finding("GPU", "warn", told, "nvidia-smi --gpu-reset maps bad rows out; replace a card that goes on")
    if gpu.architecture < MIN_ARCHITECTURE:
        return Finding("GPU", "warn", seen, "the GPU backend needs Ampere (8.0) or newer: GLOWPLUG_BACKEND=numkong")
    return Finding("GPU", "ok", seen)
