"""The CUDA kernels on the CPU for tests: one emulator for the run, poisoned outputs, every thread order."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from worker.backends.cuda.device import Device, Place, align
from worker.backends.cuda_kernels import Launch
from worker.backends.kernels.emulation.emulator import EmulationError, KernelEmulator, ThreadOrder, build_emulator
from worker.backends.kernels.manifest import load_manifest

CACHE_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "kernels"
Array = npt.NDArray[Any]

DTYPES: dict[str, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
TABLE_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
#: Largest difference from float64, relative to the largest value of the result: rounding of the result's own type, and
#: for float32 of sums in another order.
TOLERANCE = {"f32": 3e-6, "bf16": 4.5e-3, "f16": 6e-4}
ACTIVATIONS = tuple(DTYPES)


#: ``cuda``: the same tests run the kernels on a GPU instead.
KERNELS_ON = "GLOWPLUG_KERNELS_ON"


#: Seed of the suite's inputs; 1 where nobody says, so that a test that fails once fails always.
SEED = "GLOWPLUG_KERNELS_SEED"


def seeded_rng() -> np.random.Generator:
    """Numbers of the run's seed, from their beginning."""
    return np.random.default_rng(int(os.environ.get(SEED, "1")))


class DeviceKernels:
    """Kernels on a device, launched as the emulator launches them: arrays go there before and come back after."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream, self._done = device.make_stream(), device.make_event()
        self._pinned = device.pin(1 << 24)
        self.kernels = frozenset(load_manifest().resources)
        self.launched: set[str] = set()
        self.num_launches = 0

    def launch(self, launch: Launch, order: ThreadOrder = ThreadOrder.ASCENDING) -> None:
        """Run ``launch``; array arguments hold the result afterwards. A device has an order of its own."""
        self.launched.add(launch.kernel)
        self.num_launches += 1
        places: dict[int, tuple[Place, Array]] = {}
        arguments = [self._move(argument, places) for argument in launch.arguments]
        self._device.launch(replace(launch, arguments=tuple(arguments)), self._stream)
        for place, array in places.values():
            pinned = self._pinned[: array.nbytes]
            self._device.copy_out(pinned, place, self._stream)
            self._wait()
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = pinned
            self._device.free(place)

    def _move(self, argument: Any, places: dict[int, tuple[Place, Array]]) -> Any:
        if not isinstance(argument, np.ndarray):
            return argument
        start = argument.ctypes.data
        if start not in places:  # an array that is passed twice stays one
            place = self._device.allocate(align(argument.nbytes)).part(0, argument.nbytes)
            pinned = self._pinned[: argument.nbytes]
            pinned[:] = argument.reshape(-1).view(np.uint8)
            self._device.copy_in(place, pinned, self._stream)
            self._wait()
            places[start] = (place, argument)
        return places[start][0]

    def _wait(self) -> None:
        self._device.record(self._done, self._stream)
        self._device.synchronise(self._done)


_building: list[threading.Thread] = []


def begin_building() -> None:
    """Start what takes fifteen seconds the first time, beside the tests that come before those that need it.

    What goes wrong is told by :func:`emulator`, which tries again.
    """

    def build() -> None:
        with contextlib.suppress(EmulationError, OSError):
            build_emulator(CACHE_FOLDER)

    _building.append(threading.Thread(target=build, name="emulator", daemon=True))
    _building[-1].start()


@functools.cache
def emulator() -> KernelEmulator | DeviceKernels:
    """The shipped kernels, compiled once for each content of the sources; on a GPU where the environment says so."""
    if os.environ.get(KERNELS_ON) == "cuda":
        from worker.backends.cuda.opening import open_device

        return DeviceKernels(open_device(0))
    for thread in _building:
        thread.join()
    return build_emulator(CACHE_FOLDER)


def poisoned(shape: tuple[int, ...] | int, dtype: Any = np.float32) -> Array:
    """An array of 0xFF bytes: NaN in every floating type, -1 in every integer."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


def run_in_every_order(make: Callable[[], tuple[Launch, tuple[Array, ...]]]) -> tuple[Array, ...]:
    """Launch what ``make`` gives, afresh for each thread order; its outputs, which must not depend on the order."""
    results = []
    for order in ThreadOrder:
        launch, outputs = make()
        emulator().launch(launch, order)
        results.append(outputs)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    return results[0]


def relative_error(result: Array, reference: Array) -> float:
    """Largest difference over the largest magnitude of the reference; a NaN is infinitely wrong."""
    result = result.astype(np.float64)
    if not np.isfinite(result).all():
        return float("inf")
    return float(np.abs(result - reference).max() / max(np.abs(reference).max(), 1e-30))


def draw(rng: np.random.Generator, shape: tuple[int, ...] | int, activation: str = "f32", scale: float = 1.0) -> Array:
    """Fresh normal numbers in the activation's dtype."""
    return np.asarray(rng.standard_normal(shape) * scale).astype(DTYPES[activation])
