"""A GPU on the CPU, for tests: real kernels, and no order but that of streams and events.

Nothing runs when it is queued. When somebody waits, or at random moments, heads of streams are run in an order drawn
from a seed: mostly one stream is preferred to all others until the dice say otherwise. So a missing wait shows: what
should have been waited for has not happened, and memory is 0xFF until it is written. Besides, the device notices at
once where a CUDA device would silently do wrong: host memory that changes while a copy from it is queued, memory
freed while queued work touches it, copies from memory that is not pinned, allocation and waiting within a capture.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from worker.backends.cuda.device import (
    DTYPES,
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

POISON: Final = 0xFF
#: Chances, at each choice, that another order of streams is drawn, and, at each call, that queued work runs at once.
_REDRAW: Final = 0.05
_EAGER: Final = 0.1


class StreamOrderError(DeviceError):
    """The backend did what gives wrong results on a device."""


class EmulatedMemory:
    """An allocation; ``bytes`` is None once it is freed."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.bytes: ByteArray | None = np.full(num_bytes, POISON, np.uint8)


@dataclass(slots=True, eq=False)
class EmulatedEvent:
    """Marks are numbered; ``passed`` is the newest that was reached."""

    recorded: int = 0
    passed: int = 0


@dataclass(frozen=True, slots=True)
class _Work:
    run: Callable[[], None]
    touches: tuple[EmulatedMemory, ...] = ()
    event: EmulatedEvent | None = None  # with mark: may run when that is passed
    mark: int = 0

    @property
    def may_run(self) -> bool:
        return self.event is None or self.event.passed >= self.mark


@dataclass(slots=True, eq=False)
class EmulatedStream:
    """Work in order."""

    queue: deque[_Work]
    priority: float = 0.0


class EmulatedDevice:
    """See the module. ``run_kernel`` runs a launch whose buffers are arrays (``KernelEmulator.launch``).

    ``lose_after``: launches until a sticky error; below 0: none. Any thread; one lock.
    """

    def __init__(
        self,
        run_kernel: Callable[[Launch], None],
        *,
        seed: int = 0,
        capacity_bytes: int = 1 << 30,
        architecture: int = 80,
        num_processors: int = 4,
    ) -> None:
        self._run_kernel = run_kernel
        self._random = np.random.default_rng(seed)
        self.capacity_bytes = capacity_bytes
        self.architecture = architecture
        self.num_processors = num_processors
        self._streams: list[EmulatedStream] = []
        self._pinned: list[ByteArray] = []
        self._memories: set[EmulatedMemory] = set()
        self._capturing: tuple[EmulatedStream, list[_Work]] | None = None
        self._lock = threading.RLock()
        self._fault: DeviceError | None = None
        self.lose_after = -1
        self.num_launches = 0
        self.num_replays = 0

    # --- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, num_bytes: int) -> Place:
        with self._lock:
            self._require_outside_capture("an allocation")
            free_bytes = self.read_memory().free_bytes
            if align(num_bytes) > free_bytes:
                raise OutOfDeviceMemory(f"no {num_bytes} bytes of device memory: {free_bytes} are free")
            memory = EmulatedMemory(align(num_bytes))
            self._memories.add(memory)
            return Place(memory, 0, num_bytes)

    def free(self, place: Place) -> None:
        with self._lock:
            memory = _memory_of(place)
            if any(memory in work.touches for stream in self._streams for work in stream.queue):
                self._fail("memory is freed while queued work touches it")
            if memory.bytes is None:
                self._fail("memory is freed twice")
            memory.bytes = None
            self._memories.discard(memory)

    def pin(self, num_bytes: int) -> ByteArray:
        with self._lock:
            self._pinned.append(np.full(num_bytes, POISON, np.uint8))
            return self._pinned[-1]

    def register(self, memory: ByteArray) -> bool:
        with self._lock:
            self._pinned.append(memory)
            return True

    def unregister(self, memory: ByteArray) -> None:
        with self._lock:
            self._pinned = [other for other in self._pinned if other is not memory]

    def read_memory(self) -> DeviceMemory:
        used_bytes = sum(memory.num_bytes for memory in self._memories)
        return DeviceMemory(self.capacity_bytes - used_bytes, self.capacity_bytes)

    # --- streams and events -----------------------------------------------------------------------------------------

    def make_stream(self) -> EmulatedStream:
        with self._lock:
            self._streams.append(EmulatedStream(deque()))
            self._redraw()
            return self._streams[-1]

    def make_event(self) -> EmulatedEvent:
        return EmulatedEvent()

    def record(self, event: EmulatedEvent, stream: EmulatedStream) -> None:
        with self._lock:
            event.recorded += 1
            mark = event.recorded

            def passed() -> None:
                event.passed = mark

            self._queue(stream, _Work(passed))

    def wait(self, stream: EmulatedStream, event: EmulatedEvent) -> None:
        with self._lock:
            if event.recorded:
                self._queue(stream, _Work(lambda: None, event=event, mark=event.recorded))

    def synchronise(self, event: EmulatedEvent) -> None:
        with self._lock:
            self._require_outside_capture("waiting")
            self._require_alive()
            mark = event.recorded
            while event.passed < mark:
                self._run_one()
            self._require_alive()

    # --- work -------------------------------------------------------------------------------------------------------

    def copy_in(self, target: Place, source: ByteArray, stream: EmulatedStream) -> None:
        self._require_sizes(target.num_bytes, source.nbytes)
        self._require_pinned(source)
        expected = source.tobytes()

        def run() -> None:
            if source.tobytes() != expected:
                self._fail("pinned memory changed before the copy from it ran")
            _view(target)[:] = source

        self._enqueue(stream, run, target)

    def copy_out(self, target: ByteArray, source: Place, stream: EmulatedStream) -> None:
        self._require_sizes(target.nbytes, source.num_bytes)
        self._require_pinned(target)
        target[:] = POISON

        def run() -> None:
            target[:] = _view(source)

        self._enqueue(stream, run, source)

    def copy(self, target: Place, source: Place, stream: EmulatedStream) -> None:
        self._require_sizes(target.num_bytes, source.num_bytes)

        def run() -> None:
            _view(target)[:] = _view(source)

        self._enqueue(stream, run, target, source)

    def fill(self, target: Place, value: int, stream: EmulatedStream) -> None:
        self._enqueue(stream, lambda: _view(target).fill(value), target)

    def launch(self, launch: Launch, stream: EmulatedStream) -> None:
        with self._lock:
            self.num_launches += 1
            if 0 <= self.lose_after < self.num_launches:
                self._fault = self._fault or DeviceLost("an illegal address, as CUDA would say: start the worker anew")
            self._require_alive()

        def run() -> None:
            views = tuple(_view(a) if isinstance(a, Place) else a for a in launch.arguments)
            self._run_kernel(replace(launch, arguments=views))

        self._enqueue(stream, run, *(a for a in launch.arguments if isinstance(a, Place)))

    def multiply(self, product: MatrixProduct, stream: EmulatedStream) -> None:
        self._enqueue(stream, lambda: _multiply(product), product.out, product.x, product.weights)

    def capture(self, stream: EmulatedStream, enqueue: Callable[[], None]) -> list[_Work]:
        with self._lock:
            self._require_outside_capture("a capture")
            recorded: list[_Work] = []
            self._capturing = (stream, recorded)
            try:
                enqueue()
            finally:
                self._capturing = None
            return recorded

    def replay(self, graph: list[_Work], stream: EmulatedStream) -> None:
        with self._lock:
            self.num_replays += 1
            for work in graph:
                self._queue(stream, work)

    def close(self) -> None:
        with self._lock:
            self._streams.clear()
            self._pinned.clear()
            self._memories.clear()

    # --- order ------------------------------------------------------------------------------------------------------

    def _enqueue(self, stream: EmulatedStream, run: Callable[[], None], *places: Place) -> None:
        with self._lock:
            self._require_alive()
            self._queue(stream, _Work(run, tuple(_memory_of(place) for place in places)))

    def _queue(self, stream: EmulatedStream, work: _Work) -> None:
        if self._capturing is not None and self._capturing[0] is stream:
            self._capturing[1].append(work)
            return
        stream.queue.append(work)
        if self._random.random() < _EAGER:
            for _ in range(self._random.integers(1, 8)):
                if any(s.queue and s.queue[0].may_run for s in self._streams):
                    self._run_one()

    def _run_one(self) -> None:
        if self._random.random() < _REDRAW:
            self._redraw()
        ready = [stream for stream in self._streams if stream.queue and stream.queue[0].may_run]
        if not ready:
            self._fail("the host waits for what no stream will reach")
        work = max(ready, key=lambda stream: stream.priority).queue.popleft()
        if any(memory.bytes is None for memory in work.touches):
            self._fail("queued work touches memory that was freed")
        work.run()

    def _redraw(self) -> None:
        for stream in self._streams:
            stream.priority = float(self._random.random())

    # --- rules ------------------------------------------------------------------------------------------------------

    def _fail(self, message: str) -> None:
        self._fault = StreamOrderError(message)
        raise self._fault

    def _require_alive(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _require_outside_capture(self, what: str) -> None:
        if self._capturing is not None:
            self._fail(f"{what} within a capture")

    def _require_sizes(self, one: int, other: int) -> None:
        if one != other:
            self._fail(f"a copy of {other} bytes to {one}")

    def _require_pinned(self, array: ByteArray) -> None:
        if array.dtype != np.uint8 or not array.flags.c_contiguous:
            self._fail("a copy of what is not plain bytes")
        start = array.ctypes.data
        if not any(_holds(pinned, start, start + array.nbytes) for pinned in self._pinned):
            self._fail("a copy from or to host memory that is not pinned")


def _holds(pinned: ByteArray, start: int, end: int) -> bool:
    first = pinned.ctypes.data
    return bool(first <= start and end <= first + pinned.nbytes)


def _memory_of(place: Place) -> EmulatedMemory:
    if not isinstance(place.memory, EmulatedMemory):
        raise StreamOrderError("memory of another device")
    return place.memory


def _view(place: Place) -> ByteArray:
    memory = _memory_of(place).bytes
    if memory is None:
        raise StreamOrderError("memory was freed")
    return memory[place.offset : place.offset + place.num_bytes]


def _multiply(product: MatrixProduct) -> None:
    """The vendor's library, as NumPy in float32."""
    dtype = DTYPES[product.activation]
    x = _matrix(product.x, dtype, product.num_rows, product.width, product.width)
    weights = _matrix(product.weights, dtype, product.num_outputs, product.width, product.width)
    out_dtype = np.float32 if product.out_is_float32 else dtype
    out = _matrix(product.out, out_dtype, product.num_rows, product.num_outputs, product.out_stride)
    result = x.astype(np.float32) @ weights.astype(np.float32).T
    out[:] = out + result if product.adds else result


def _matrix(place: Place, dtype: Any, num_rows: int, num_columns: int, stride: int) -> Any:
    flat = _view(place).view(dtype)
    return np.lib.stride_tricks.as_strided(
        flat[: (num_rows - 1) * stride + num_columns],
        (num_rows, num_columns),
        (stride * flat.itemsize, flat.itemsize),
    )
