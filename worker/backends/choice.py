"""Which backend a name means."""

from __future__ import annotations

from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, BackendError


def make_backend(name: str, num_threads: int) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: unknown name.
    """
    if name == "numpy":
        return NumpyBackend()
    if name == "numkong":
        return NumKongBackend(num_threads)
    raise BackendError(f"backend {name!r} is not known: expected numkong or numpy")
