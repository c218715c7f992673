"""Opens a GPU for a worker: the kernels that run on it, and the device behind the protocol. CuPy is imported then."""

from __future__ import annotations

import time

import structlog

from worker.backends.cuda.cuda_backend import CudaBackend
from worker.backends.cuda.device import Device, DeviceError
from worker.backends.cuda.weight_stream import StreamSettings
from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan
from worker.backends.kernels.build import choose_compiler
from worker.backends.kernels.manifest import (
    FATBIN,
    StaleKernelsError,
    load_manifest,
    name_in_snapshots,
    verify_kernels,
)
from worker.backends.kernels.nvrtc import KernelBuildError
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.protocol import ReadKernels


def make_cuda_backend(
    number: int,
    num_threads: int,
    settings: StreamSettings | None = None,
    *,
    read_kernels: ReadKernels | None = None,
) -> CudaBackend:
    """The backend of GPU ``number``; encoders of such a worker run on ``num_threads`` cores. ``read_kernels``: see
    :func:`load_kernels`."""

    def bind_encoder(plan: EncoderPlan) -> BoundEncoder:
        return NumKongBackend(num_threads).bind_encoder(plan)

    settings = settings or StreamSettings.for_cores(num_threads)
    return CudaBackend(lambda: open_device(number, read_kernels), settings, bind_encoder=bind_encoder)


def open_device(number: int, read_kernels: ReadKernels | None = None) -> Device:
    """The device, with its context and kernels; ``read_kernels``: see :func:`load_kernels`.

    Raises:
        DeviceError: CuPy is not installed, or there is no such device, driver or kernel.
    """
    try:
        from worker.backends.cuda.cupy_device import CupyDevice
    except ImportError as error:
        raise DeviceError(
            f"the cuda backend needs CuPy: pip install 'glowplug[gpu-cuda12]' or 'glowplug[gpu-cuda13]' ({error})"
        ) from error
    return CupyDevice(number, lambda architecture: load_kernels(architecture, read_kernels), compile_kernels)


def load_kernels(architecture: int, read_kernels: ReadKernels | None = None) -> bytes:
    """A fatbin or cubin that runs on compute capability ``architecture`` (90 for 9.0), its bytes and sources verified.

    What ships is taken where it has machine code for the device. Else, in this order: code of the same sources that the
    worker's snapshot brings along (``read_kernels``), signed with it; the shipped PTX, which the driver compiles;
    compiling here, once a worker. The last and the first tell so in the log.

    Raises:
        DeviceError: the fatbin is not of these sources, or nothing can compile for that device.
    """
    try:
        manifest = load_manifest()
        if read_kernels is not None and manifest.needs_driver_compiler(architecture):
            found = read_kernels((f"sm_{architecture}", FATBIN)).get(name_in_snapshots(manifest))
            if found is not None:
                verify_kernels()  # the sources are those of the name
                structlog.get_logger().info("kernels_of_snapshot", architecture=architecture, size_bytes=len(found))
                return found
        if manifest.runs_on(architecture):
            return verify_kernels().read_bytes()
    except StaleKernelsError as error:
        raise DeviceError(f"no kernels for compute capability {architecture / 10:.1f}: {error}") from error
    return compile_kernels(architecture)


def compile_kernels(architecture: int) -> bytes:
    """The kernels for ``architecture``, compiled now, with a line in the log: what ships is for other devices, or the
    driver refuses it (an older one cannot read its compression, or its PTX).

    Raises:
        DeviceError: no compiler is installed, or it does not know the device.
    """
    begin_s = time.monotonic()
    try:
        _, compile_target = choose_compiler("auto")
        code = compile_target(f"sm_{architecture}").code
    except KernelBuildError as error:
        raise DeviceError(
            f"what ships has no kernels that this driver takes for compute capability {architecture / 10:.1f}, and "
            f"none could be compiled: {error}"
        ) from error
    structlog.get_logger().warning(
        "kernels_compiled", architecture=architecture, elapsed_ms=round((time.monotonic() - begin_s) * 1000)
    )
    return code
