"""Opens a GPU for a worker: the kernels that run on it, and the device behind the protocol. CuPy is imported then."""

from __future__ import annotations

import time

import structlog

from worker.backends.cuda.cuda_backend import CudaBackend
from worker.backends.cuda.device import Device, DeviceError
from worker.backends.cuda.weight_stream import StreamSettings
from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan
from worker.backends.kernels.build import build_kernels
from worker.backends.kernels.manifest import StaleKernelsError, load_manifest, verify_kernels
from worker.backends.kernels.nvrtc import KernelBuildError
from worker.backends.numkong_cpu import NumKongBackend


def make_cuda_backend(number: int, num_threads: int, settings: StreamSettings | None = None) -> CudaBackend:
    """The backend of GPU ``number``; encoders of such a worker run on ``num_threads`` cores."""

    def bind_encoder(plan: EncoderPlan) -> BoundEncoder:
        return NumKongBackend(num_threads).bind_encoder(plan)

    settings = settings or StreamSettings.for_cores(num_threads)
    return CudaBackend(lambda: open_device(number), settings, bind_encoder=bind_encoder)


def open_device(number: int) -> Device:
    """The device, with its context and kernels.

    Raises:
        DeviceError: CuPy is not installed, or there is no such device, driver or kernel.
    """
    try:
        from worker.backends.cuda.cupy_device import CupyDevice
    except ImportError as error:
        raise DeviceError(
            f"the cuda backend needs CuPy: pip install 'glowplug[gpu-cuda12]' or 'glowplug[gpu-cuda13]' ({error})"
        ) from error
    return CupyDevice(number, load_kernels)


def load_kernels(architecture: int) -> bytes:
    """A fatbin that runs on compute capability ``architecture`` (90 for 9.0), its bytes and sources verified.

    Where the shipped one does not, the kernels are compiled, once a worker, with a line in the log.

    Raises:
        DeviceError: the fatbin is not of these sources, or nothing can compile for that device.
    """
    try:
        manifest = load_manifest()
        if manifest.runs_on(architecture):
            return verify_kernels().read_bytes()
        begin_s = time.monotonic()
        built = build_kernels((architecture,))
    except (StaleKernelsError, KernelBuildError) as error:
        raise DeviceError(f"no kernels for compute capability {architecture / 10:.1f}: {error}") from error
    structlog.get_logger().warning(
        "kernels_compiled", architecture=architecture, elapsed_ms=round((time.monotonic() - begin_s) * 1000)
    )
    return built.fatbin
