"""Which backend a name means."""

from __future__ import annotations

from worker.backends.detection import CUDA
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, BackendError, ReadKernels


def make_backend(name: str, num_threads: int, read_kernels: ReadKernels | None = None) -> Backend:
    """The backend of that name. No device is touched, and CuPy not imported: that is :meth:`Backend.warm`'s.
    ``read_kernels`` gives the device code that a snapshot brings along, where the worker is for one already.

    Raises:
        BackendError: unknown name.
    """
    if name == "numpy":
        return NumpyBackend()
    if name == "numkong":
        return NumKongBackend(num_threads)
    if name == CUDA or name.startswith(f"{CUDA}:"):
        from worker.backends.cuda.opening import make_cuda_backend  # 5 ms that only such workers take

        return make_cuda_backend(_read_device_number(name), num_threads, read_kernels=read_kernels)
    raise BackendError(f"backend {name!r} is not known: expected numkong, numpy, cuda or cuda:1 (the GPU's number)")


def _read_device_number(name: str) -> int:
    digits = name.partition(":")[2] or "0"
    if not (digits.isascii() and digits.isdigit() and len(digits) < 4):
        raise BackendError(f"backend {name!r}: expected cuda or cuda:1 (the GPU's number)")
    return int(digits)
