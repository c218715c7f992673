"""What the GPU backend needs of a device: memory, streams, events, copies, launches and graphs, in CUDA's own order.

Two implementations: :class:`~worker.backends.cuda.cupy_device.CupyDevice`, and
:class:`~worker.backends.cuda.emulated_device.EmulatedDevice`, which runs the same kernels on the CPU and executes what
is queued in an adversarial order that only streams and events bind. All queueing calls return at once; what they
touch must stay valid until it has run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from worker.backends.cuda_kernels import Activation, Launch
from worker.backends.protocol import BackendError, BackendFull, BackendLost

ByteArray = npt.NDArray[np.uint8]
Stream = Any  # handles: whatever the device gives
Event = Any
Graph = Any

#: Alignment of allocations and of arrays within them, bytes.
ALIGNMENT: Final = 256

#: NumPy types and bytes of an element, by activation type.
DTYPES: Final[dict[Activation, Any]] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
ACTIVATION_BYTES: Final[dict[Activation, int]] = {"f32": 4, "bf16": 2, "f16": 2}


class DeviceError(BackendError):
    """The device refused or failed; the message says what was asked of it."""


class OutOfDeviceMemory(DeviceError, BackendFull):
    """An allocation did not fit. The device goes on: make room, or refuse."""


class DeviceLost(DeviceError, BackendLost):
    """A *sticky* error: every later call of this process fails too. Only a new process helps."""


class CaptureRefused(DeviceError):
    """A graph could not be made of what was queued; the device goes on, and so do single commands."""


class Memory(Protocol):
    """An allocation of device memory."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Place:
    """``num_bytes`` of an allocation from ``offset`` on; what kernels get as a pointer."""

    memory: Memory
    offset: int
    num_bytes: int

    def part(self, offset: int, num_bytes: int) -> Place:
        """A piece of it.

        Raises:
            DeviceError: not inside.
        """
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.num_bytes:
            raise DeviceError(f"bytes {offset} to {offset + num_bytes} of a place of {self.num_bytes}")
        return Place(self.memory, self.offset + offset, num_bytes)


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """``out [R, N] (+)= x [R, K] @ weights [N, K].T`` in float32 arithmetic. ``x`` and ``weights`` are of the
    activation type, ``out`` of it or float32; rows of ``out`` are ``out_stride`` elements apart."""

    activation: Activation
    out: Place
    x: Place
    weights: Place
    num_rows: int
    num_outputs: int
    width: int
    out_stride: int
    out_is_float32: bool = False
    adds: bool = False  # to what ``out`` holds; float32 only


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device as its driver counts them, all processes."""

    free_bytes: int
    total_bytes: int


class Device(Protocol):
    """One GPU as one process sees it. Any thread, except that :meth:`capture` excludes other calls of its thread."""

    @property
    def architecture(self) -> int:
        """Compute capability, 90 for 9.0."""

    @property
    def num_processors(self) -> int:
        """Multiprocessors."""

    def allocate(self, num_bytes: int) -> Place:
        """Device memory, of undefined content, aligned to :data:`ALIGNMENT`.

        Raises:
            OutOfDeviceMemory: it does not fit.
        """

    def free(self, place: Place) -> None:
        """Return a whole allocation to the driver. Requires: nothing that is queued touches it."""

    def pin(self, num_bytes: int) -> ByteArray:
        """Page-locked host memory, freed with the device. About 0.4 s a GiB: never on a request's path.

        Raises:
            OutOfDeviceMemory: the host has no such memory to lock.
        """

    def register(self, memory: ByteArray) -> bool:
        """Page-lock existing host memory for reading; False: refused, copy through a pinned buffer then."""

    def unregister(self, memory: ByteArray) -> None:
        """Undo :meth:`register`. Requires: nothing that is queued reads it."""

    def make_stream(self) -> Stream:
        """A stream that waits for no other."""

    def make_event(self) -> Event:
        """An event that was never recorded: nobody waits for such a one."""

    def record(self, event: Event, stream: Stream) -> None:
        """Mark this place of ``stream``; replaces an earlier mark."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on ``stream`` from now on runs after the event's present mark."""

    def synchronise(self, event: Event) -> None:
        """Block until the event's present mark has been passed.

        Raises:
            DeviceLost: what ran before it failed.
        """

    def copy_in(self, target: Place, source: ByteArray, stream: Stream) -> None:
        """Queue a copy from pinned host memory, which must keep its content until then."""

    def copy_out(self, target: ByteArray, source: Place, stream: Stream) -> None:
        """Queue a copy to pinned host memory, whose content is undefined until then."""

    def copy(self, target: Place, source: Place, stream: Stream) -> None:
        """Queue a copy on the device; the two do not overlap."""

    def fill(self, target: Place, value: int, stream: Stream) -> None:
        """Queue setting every byte to ``value``."""

    def launch(self, launch: Launch, stream: Stream) -> None:
        """Queue a kernel; its buffers are places, or 0."""

    def multiply(self, product: MatrixProduct, stream: Stream) -> None:
        """Queue a matrix product of the vendor's library."""

    def capture(self, stream: Stream, enqueue: Callable[[], None]) -> Graph:
        """What ``enqueue`` queues on ``stream``, as a graph instead; nothing of it runs, and it allocates nothing.

        Raises:
            CaptureRefused: no graph can be made of it.
        """

    def replay(self, graph: Graph, stream: Stream) -> None:
        """Queue all that was captured, with the addresses that it had."""

    def read_memory(self) -> DeviceMemory:
        """Free and total memory now."""

    def close(self) -> None:
        """Free all that is left. Idempotent."""


def align(num_bytes: int) -> int:
    """``num_bytes`` rounded up to :data:`ALIGNMENT`, at least one."""
    return max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT
