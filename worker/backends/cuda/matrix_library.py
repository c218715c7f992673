"""cuBLAS by ctypes: a handle with a workspace of its own, and products that may be captured into graphs.

CuPy's wrapper sets the stream at every call and refuses to while that stream is captured, so it cannot be used for
decode graphs of more rows than the own kernels take. The library itself can be captured where its workspace is given
to it. Source: cuBLAS documentation, sections 2.1.12 "CUDA Graphs support" and 2.4.8 "cublasSetWorkspace".
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from worker.backends.cuda.device import DeviceError

_OP_N, _OP_T, _GEMM_DEFAULT = 0, 1, -1  # cublasOperation_t, cublasGemmAlgo_t
_COMPUTE_FLOAT32: Final = 68  # CUBLAS_COMPUTE_32F: without TF32
_DATA_TYPES: Final = {"f32": 0, "f16": 2, "bf16": 14}  # cudaDataType_t
_MAPS: Final = Path("/proc/self/maps")
#: cublasStatus_t. Source: cuBLAS documentation, section 2.2.2.
_STATUS_NAMES: Final = {
    1: "NOT_INITIALIZED",
    3: "ALLOC_FAILED",
    7: "INVALID_VALUE",
    8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
}


class MatrixLibraryError(DeviceError):
    """cuBLAS refused. ``code`` is its status."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"cuBLAS: {call}: {_STATUS_NAMES.get(code, 'status')} ({code})")
        self.code = code


class MatrixLibrary:
    """One handle. Any thread, one at a time; queues only."""

    def __init__(self, library: Any, workspace: int, workspace_bytes: int) -> None:
        """``library`` is libcublas, see :func:`load_library`. The workspace is device memory of the caller's, which
        lives as long; the present device is the handle's.

        Raises:
            MatrixLibraryError: cuBLAS cannot be used on this device.
        """
        self._library = library
        self._workspace = (ctypes.c_void_p(workspace), ctypes.c_size_t(workspace_bytes))
        self._scalars = (ctypes.c_float * 2)(0.0, 1.0)  # what alpha and beta point to
        self._lock = threading.Lock()  # a handle serves one thread at a time
        self._stream: int | None = None
        handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(handle))
        self._handle = handle

    def multiply(
        self,
        *,
        stored: str,
        out_type: str,
        sizes: tuple[int, int, int],
        addresses: tuple[int, int, int],
        out_stride: int,
        adds: bool,
        stream: int,
    ) -> None:
        """Queue ``out [R, N] (+)= x [R, K] @ weights [N, K].T``. ``sizes`` is (R, N, K), ``addresses`` are
        (out, x, weights).

        cuBLAS counts columns first: ``out.T [N, R] = weights [N, K] @ x.T``.

        Raises:
            MatrixLibraryError: it refuses these sizes, types or addresses.
        """
        (num_rows, num_outputs, width), (out, x, weights) = sizes, addresses
        kind, out_kind = ctypes.c_int(_DATA_TYPES[stored]), ctypes.c_int(_DATA_TYPES[out_type])
        with self._lock:
            if stream != self._stream:  # which resets the workspace
                self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
                self._call("cublasSetWorkspace_v2", self._handle, *self._workspace)
                self._stream = stream
            self._call(
                *("cublasGemmEx", self._handle, ctypes.c_int(_OP_T), ctypes.c_int(_OP_N)),
                *map(ctypes.c_int, (num_outputs, num_rows, width)),
                *(self._scalar(1), ctypes.c_void_p(weights), kind, ctypes.c_int(width)),
                *(ctypes.c_void_p(x), kind, ctypes.c_int(width), self._scalar(1 if adds else 0)),
                *(ctypes.c_void_p(out), out_kind, ctypes.c_int(out_stride)),
                *(ctypes.c_int(_COMPUTE_FLOAT32), ctypes.c_int(_GEMM_DEFAULT)),
            )

    def close(self) -> None:
        """Destroy the handle. Requires: nothing queued uses it."""
        self._call("cublasDestroy_v2", self._handle)

    def _scalar(self, value: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(ctypes.addressof(self._scalars) + ctypes.sizeof(ctypes.c_float) * value)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise MatrixLibraryError(name, code)


def load_library(major: int) -> Any:
    """libcublas of CUDA ``major``: one that is loaded, a wheel's or a toolkit's. Calls release the interpreter's lock.

    Raises:
        DeviceError: there is none; the message says what to install.
    """
    tried = []
    for path in _list_libraries(major):
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path}: {error}")
    raise DeviceError(
        f"no cuBLAS of CUDA {major}: install the toolkit's, or pip install "
        f"{'nvidia-cublas' if major >= 13 else 'nvidia-cublas-cu12'} ({'; '.join(tried)})"
    )


def _list_libraries(major: int, maps: Path = _MAPS) -> Iterator[str]:
    """Where it may be, best first."""
    soname = f"libcublas.so.{major}"
    if maps.exists():
        for line in maps.read_text().splitlines():
            path = line.rpartition(" ")[2]
            if path.rpartition("/")[2].startswith(soname):
                yield path
                break
    try:  # NVIDIA's own finder of libraries in wheels, conda and toolkits; comes with CuPy from version 14 on
        finder = importlib.import_module("cuda.pathfinder")
        yield str(finder.load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception:  # not installed, or has not found it: the loader's own path is left
        pass
    yield soname
    yield f"/usr/local/cuda/lib64/{soname}"
