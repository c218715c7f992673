"""The one file that imports CuPy: the device protocol on the CUDA runtime.

Only CuPy's thin wrappers are used (runtime, driver, cuBLAS): they release the interpreter's lock and compile nothing.
No CuPy array, elementwise operation or reduction: those go through NVRTC when they are first used. Memory comes from
``cudaMalloc`` directly, so that what is freed is free to every process.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

import cupy
import numpy as np
from cupy.cuda import function, runtime

from worker.backends.cuda.device import (
    ByteArray,
    DeviceError,
    DeviceLost,
    DeviceMemory,
    MatrixProduct,
    OutOfDeviceMemory,
    Place,
    align,
)
from worker.backends.cuda_kernels import Launch

_HOST_TO_DEVICE: Final = 1  # cudaMemcpyKind
_DEVICE_TO_HOST: Final = 2
_DEVICE_TO_DEVICE: Final = 3
_HOST_REGISTER_READ_ONLY: Final = 8
_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking
_DISABLE_TIMING: Final = 2  # cudaEventDisableTiming
_OUT_OF_MEMORY: Final = 2  # cudaErrorMemoryAllocation
#: cudaError codes after which a context answers nothing else. Source: CUDA Runtime API, "Data types", cudaError.
STICKY_CODES: Final = frozenset({214, 700, 702, 708, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
#: cublasOperation_t, cublasGemmAlgo_t and cudaDataType_t.
_OP_N, _OP_T, _GEMM_DEFAULT = 0, 1, -1
#: float32 as cublasComputeType_t, and as the cudaDataType_t that cuBLAS took before version 11: which of them CuPy
#: hands on depends on its version, so the first product finds out.
_COMPUTE_FLOAT32: Final = (68, 0)
_DATA_TYPES: Final = {"f32": 0, "f16": 2, "bf16": 14}


class CupyMemory:
    """An allocation of the driver's."""

    __slots__ = ("address", "num_bytes")

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes


class CupyDevice:
    """One GPU, by its number as CUDA counts. Opening it creates the context, loads the kernels and cuBLAS."""

    def __init__(self, number: int, load_kernels: Callable[[int], bytes]) -> None:
        """``load_kernels`` gives a fatbin for a compute capability.

        Raises:
            DeviceError: no such device, no driver, or nothing in the fatbin runs on it.
        """
        self._number = number
        self._local = threading.local()  # the current device is a thread's
        self._pinned: list[int] = []
        self._memories: set[CupyMemory] = set()
        self._functions: dict[str, Any] = {}
        self._is_closed = False
        try:
            self._enter()
            runtime.free(0)  # creates the context
            properties = runtime.getDeviceProperties(number)
            self.architecture = int(properties["major"]) * 10 + int(properties["minor"])
            self.num_processors = int(properties["multiProcessorCount"])
            self.name = properties["name"].decode()
            self._module = function.Module()
            self._module.load(load_kernels(self.architecture))
            from cupy_backends.cuda.libs import cublas  # loads libcublas: 100 ms that only such a worker takes

            self._cublas = cublas
            self._handle = cublas.create()
        except DeviceError:
            raise
        except Exception as error:
            raise DeviceError(f"GPU {number} cannot be used: {type(error).__name__}: {error}") from error
        self._scalars = (ctypes.c_float * 2)(0.0, 1.0)  # alpha and beta, which cuBLAS reads by address
        self._multiplying = threading.Lock()  # a handle serves one thread at a time
        self._compute_type = self._find_compute_type()

    # --- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, num_bytes: int) -> Place:
        self._enter()
        try:
            address = runtime.malloc(align(num_bytes))
        except runtime.CUDARuntimeError as error:
            self._raise(error, f"{num_bytes} bytes of device memory")
        memory = CupyMemory(address, align(num_bytes))
        self._memories.add(memory)
        return Place(memory, 0, num_bytes)

    def free(self, place: Place) -> None:
        memory = place.memory
        assert isinstance(memory, CupyMemory)
        self._memories.discard(memory)
        self._call(runtime.free, memory.address)

    def pin(self, num_bytes: int) -> ByteArray:
        self._enter()
        try:
            address = runtime.hostAlloc(num_bytes, 0)
        except runtime.CUDARuntimeError as error:
            self._raise(error, f"{num_bytes} bytes of page-locked memory")
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def register(self, memory: ByteArray) -> bool:
        self._enter()
        for flags in (_HOST_REGISTER_READ_ONLY, 0):  # the first is not offered by every platform
            try:
                runtime.hostRegister(memory.ctypes.data, memory.nbytes, flags)
                return True
            except runtime.CUDARuntimeError as error:
                if error.status in STICKY_CODES:
                    self._raise(error, "page-locking")
        return False

    def unregister(self, memory: ByteArray) -> None:
        self._call(runtime.hostUnregister, memory.ctypes.data)

    def read_memory(self) -> DeviceMemory:
        free_bytes, total_bytes = self._call(runtime.memGetInfo)
        return DeviceMemory(int(free_bytes), int(total_bytes))

    # --- streams and events -----------------------------------------------------------------------------------------

    def make_stream(self) -> Any:
        self._enter()
        return cupy.cuda.Stream(non_blocking=True)

    def make_event(self) -> Any:
        self._enter()
        return cupy.cuda.Event(block=False, disable_timing=True)

    def record(self, event: Any, stream: Any) -> None:
        self._call(runtime.eventRecord, event.ptr, stream.ptr)

    def wait(self, stream: Any, event: Any) -> None:
        self._call(runtime.streamWaitEvent, stream.ptr, event.ptr)

    def synchronise(self, event: Any) -> None:
        self._call(runtime.eventSynchronize, event.ptr)

    # --- work -------------------------------------------------------------------------------------------------------

    def copy_in(self, target: Place, source: ByteArray, stream: Any) -> None:
        self._copy(_address(target), source.ctypes.data, target.num_bytes, _HOST_TO_DEVICE, stream)

    def copy_out(self, target: ByteArray, source: Place, stream: Any) -> None:
        self._copy(target.ctypes.data, _address(source), source.num_bytes, _DEVICE_TO_HOST, stream)

    def copy(self, target: Place, source: Place, stream: Any) -> None:
        self._copy(_address(target), _address(source), source.num_bytes, _DEVICE_TO_DEVICE, stream)

    def fill(self, target: Place, value: int, stream: Any) -> None:
        self._call(runtime.memsetAsync, _address(target), value, target.num_bytes, stream.ptr)

    def launch(self, launch: Launch, stream: Any) -> None:
        kernel = self._functions.get(launch.kernel)
        if kernel is None:
            kernel = self._functions[launch.kernel] = self._call(self._module.get_function, launch.kernel)
        # Pointers travel as int64: CuPy passes a NumPy scalar's bytes as they are.
        arguments = tuple(
            np.int64(_address(a)) if isinstance(a, Place) else np.int64(0) if a is None or type(a) is int else a
            for a in launch.arguments
        )
        self._enter()
        try:
            kernel(launch.grid, launch.block, arguments, shared_mem=launch.shared_bytes, stream=stream)
        except Exception as error:  # CUDADriverError; its codes are the runtime's
            self._raise(error, f"kernel {launch.kernel}")

    def multiply(self, product: MatrixProduct, stream: Any) -> None:
        """cuBLAS counts columns first: ``out.T [N, R] = weights [N, K] @ x.T``."""
        self._enter()
        stored = _DATA_TYPES[product.activation]
        out = _DATA_TYPES["f32" if product.out_is_float32 else product.activation]
        one, beta = self._scalar(1), self._scalar(1 if product.adds else 0)
        with self._multiplying, stream:
            self._call(
                self._cublas.gemmEx,
                *(self._handle, _OP_T, _OP_N, product.num_outputs, product.num_rows, product.width, one),
                *(_address(product.weights), stored, product.width, _address(product.x), stored, product.width),
                *(beta, _address(product.out), out, product.out_stride, self._compute_type, _GEMM_DEFAULT),
            )

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """In relaxed mode: other threads may allocate meanwhile."""
        self._enter()
        stream.begin_capture()
        try:
            enqueue()
        except BaseException:
            try:
                stream.end_capture()
            except Exception:  # an invalidated capture; what led to it is what is raised
                pass
            raise
        return self._call(stream.end_capture)

    def replay(self, graph: Any, stream: Any) -> None:
        self._call(runtime.graphLaunch, graph.graphExec, stream.ptr)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._call(runtime.deviceSynchronize)
        for memory in self._memories:
            self._call(runtime.free, memory.address)
        for address in self._pinned:
            self._call(runtime.freeHost, address)
        self._memories.clear()
        self._pinned.clear()
        self._call(self._cublas.destroy, self._handle)

    # --- calls ------------------------------------------------------------------------------------------------------

    def _copy(self, target: int, source: int, num_bytes: int, kind: int, stream: Any) -> None:
        if num_bytes:
            self._call(runtime.memcpyAsync, target, source, num_bytes, kind, stream.ptr)

    def _enter(self) -> None:
        """Make the device this thread's, once."""
        if not getattr(self._local, "has_entered", False):
            runtime.setDevice(self._number)
            self._local.has_entered = True

    def _call(self, called: Callable[..., Any], *arguments: Any) -> Any:
        self._enter()
        try:
            return called(*arguments)
        except Exception as error:  # CUDARuntimeError, CUDADriverError, CUBLASError
            self._raise(error, getattr(called, "__name__", "a call"))

    def _find_compute_type(self) -> int:
        """The number for float32 arithmetic that this CuPy understands, by a product of a few bytes."""
        place, stream = self.allocate(4096), self.make_stream()
        self.fill(place, 0, stream)
        out, x, weights = (place.part(i * 1024, 1024) for i in range(3))
        product = MatrixProduct("f32", out, x, weights, num_rows=16, num_outputs=16, width=16, out_stride=16)
        for self._compute_type in _COMPUTE_FLOAT32:
            try:
                self.multiply(product, stream)
                break
            except DeviceLost:
                raise
            except DeviceError as error:
                refused = error
        else:
            raise refused
        self._call(runtime.streamSynchronize, stream.ptr)
        self.free(place)
        return self._compute_type

    def _scalar(self, value: int) -> int:
        return ctypes.addressof(self._scalars) + ctypes.sizeof(ctypes.c_float) * value

    def _raise(self, error: Exception, what: str) -> NoReturn:
        raise classify(error, f"GPU {self._number}: {what}") from error


def classify(error: Exception, what: str) -> DeviceError:
    """The error of our own for one of CuPy's, by its CUDA code."""
    status = getattr(error, "status", 0)
    if status == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(f"{what}: {error}")
    if status in STICKY_CODES:
        return DeviceLost(f"{what}: {error}: this process cannot use the device any more")
    return DeviceError(f"{what}: {error}")


def _address(place: Place) -> int:
    memory = place.memory
    assert isinstance(memory, CupyMemory)
    return memory.address + place.offset
