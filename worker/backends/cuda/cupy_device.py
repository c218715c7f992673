"""The one file that imports CuPy: the device protocol on the CUDA runtime.

Only CuPy's thin wrappers are used (runtime, driver): they release the interpreter's lock and compile nothing.
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
    CaptureRefused,
    DeviceError,
    DeviceLost,
    DeviceMemory,
    MatrixProduct,
    OutOfDeviceMemory,
    Place,
    align,
)
from worker.backends.cuda.matrix_library import MatrixLibrary, MatrixLibraryError, load_library
from worker.backends.cuda_kernels import Launch

_HOST_TO_DEVICE: Final = 1  # cudaMemcpyKind
_DEVICE_TO_HOST: Final = 2
_DEVICE_TO_DEVICE: Final = 3
_HOST_REGISTER_READ_ONLY: Final = 8
_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking
_DISABLE_TIMING: Final = 2  # cudaEventDisableTiming
_OUT_OF_MEMORY: Final = 2  # cudaErrorMemoryAllocation
#: What cuBLAS asks for. Source: cuBLAS documentation, section 2.4.8.
_WORKSPACE_BYTES: Final = {True: 32 << 20, False: 8 << 20}  # by: Hopper or newer
#: cublasStatus_t as CUDA's codes: ALLOC_FAILED is out of memory, EXECUTION_FAILED what ran before has failed.
_CUBLAS_CODES: Final = {3: _OUT_OF_MEMORY, 13: 719}
#: CUresult codes of an image that this driver cannot use: invalid, no code for the device, PTX invalid or too new.
_REFUSED_IMAGES: Final = frozenset({200, 209, 218, 222, 300})
#: cudaError codes after which a context answers nothing else. Source: CUDA Runtime API, "Data types", cudaError.
STICKY_CODES: Final = frozenset({214, 700, 702, 708, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})


class CupyMemory:
    """An allocation of the driver's."""

    __slots__ = ("address", "num_bytes")

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes


class CupyDevice:
    """One GPU, by its number as CUDA counts. Opening it creates the context, loads the kernels and cuBLAS."""

    def __init__(
        self, number: int, load_kernels: Callable[[int], bytes], compile_kernels: Callable[[int], bytes] | None = None
    ) -> None:
        """``load_kernels`` gives a fatbin for a compute capability, ``compile_kernels`` what is tried once where this
        driver refuses that one.

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
            self._module = self._load_module(load_kernels, compile_kernels)
            self._matrices = self._open_matrix_library()
        except DeviceError:
            raise
        except Exception as error:
            raise DeviceError(f"GPU {number} cannot be used: {type(error).__name__}: {error}") from error

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
        self._enter()
        try:
            self._matrices.multiply(
                stored=product.activation,
                out_type="f32" if product.out_is_float32 else product.activation,
                sizes=(product.num_rows, product.num_outputs, product.width),
                addresses=(_address(product.out), _address(product.x), _address(product.weights)),
                out_stride=product.out_stride,
                adds=product.adds,
                stream=stream.ptr,
            )
        except MatrixLibraryError as error:
            self._raise(error, f"product of {product.num_rows} rows of {product.width} by {product.num_outputs}")

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """In relaxed mode: other threads may allocate meanwhile."""
        self._call(stream.begin_capture)
        try:
            enqueue()
        except BaseException as error:
            try:
                stream.end_capture()
            except Exception:  # an invalidated capture; what led to it is what is raised
                pass
            # cuBLAS says of what cannot be captured that it failed to execute. Nothing ran: had the device been lost
            # before, the next call would say so.
            is_cublas = isinstance(error.__cause__, MatrixLibraryError)
            if isinstance(error, DeviceError) and (is_cublas or not isinstance(error, DeviceLost)):
                raise CaptureRefused(str(error)) from error
            raise
        try:
            return self._call(stream.end_capture)
        except DeviceLost:
            raise
        except DeviceError as error:
            raise CaptureRefused(str(error)) from error

    def replay(self, graph: Any, stream: Any) -> None:
        self._call(runtime.graphLaunch, graph.graphExec, stream.ptr)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._call(runtime.deviceSynchronize)
        self._call(self._matrices.close)
        for memory in self._memories:
            self._call(runtime.free, memory.address)
        for address in self._pinned:
            self._call(runtime.freeHost, address)
        self._memories.clear()
        self._pinned.clear()

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

    def _load_module(self, load: Callable[[int], bytes], compile_anew: Callable[[int], bytes] | None) -> Any:
        module = function.Module()
        try:
            module.load(load(self.architecture))
        except Exception as error:  # CUDADriverError
            if compile_anew is None or getattr(error, "status", 0) not in _REFUSED_IMAGES:
                raise
            module = function.Module()
            module.load(compile_anew(self.architecture))
        return module

    def _open_matrix_library(self) -> MatrixLibrary:
        """The handle's first product would load code and take a workspace: warm-up makes one of each type."""
        workspace = self.allocate(_WORKSPACE_BYTES[self.architecture >= 90])
        library = load_library(runtime.runtimeGetVersion() // 1000)
        return MatrixLibrary(library, _address(workspace), workspace.num_bytes)

    def _raise(self, error: Exception, what: str) -> NoReturn:
        raise classify(error, f"GPU {self._number}: {what}") from error


def classify(error: Exception, what: str) -> DeviceError:
    """The error of our own for one of CuPy's, by its CUDA code."""
    status = getattr(error, "status", 0)
    if isinstance(error, MatrixLibraryError):
        status = _CUBLAS_CODES.get(error.code, 0)
    if status == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(f"{what}: {error}")
    if status in STICKY_CODES:
        return DeviceLost(f"{what}: {error}: this process cannot use the device any more")
    return DeviceError(f"{what}: {error}")


def _address(place: Place) -> int:
    memory = place.memory
    assert isinstance(memory, CupyMemory)
    return memory.address + place.offset
