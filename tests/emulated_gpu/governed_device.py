"""The emulated GPU of a worker, as the file in EMULATED_GPU says: ``capacity_bytes`` of memory, and ``lose``, the
process whose next launch is a sticky error (JSON).

Streams, events, copies, parking and memory are as in every other test of it; kernels are not run, and memory begins as
zeros, so that every token is the first of the vocabulary: what kernels compute is the conformance suite's, and would
take seconds here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from worker.backends.cuda.device import ByteArray, DeviceMemory, Place
from worker.backends.cuda.emulated_device import EmulatedDevice, EmulatedMemory
from worker.backends.cuda_kernels import Launch


class GovernedDevice(EmulatedDevice):
    """Its memory and its faults are in the hands of the test. While the stand-in of the driver's checkpoint calls has
    taken the process off its device, whatever is asked of it ends the process (a real one would stand still)."""

    def allocate(self, num_bytes: int) -> Place:
        _check_present()
        self.capacity_bytes = int(_orders()["capacity_bytes"])
        place = super().allocate(num_bytes)
        assert isinstance(place.memory, EmulatedMemory)
        assert place.memory.bytes is not None
        place.memory.bytes[:] = 0
        return place

    def read_memory(self) -> DeviceMemory:
        _check_present()
        return super().read_memory()

    def free(self, place: Place) -> None:
        _check_present()
        super().free(place)

    def register(self, memory: ByteArray) -> bool:
        _check_present()
        return super().register(memory)

    def launch(self, launch: Launch, stream: object) -> None:
        _check_present()
        if _orders()["lose"] == os.getpid():
            self.lose_after = 0
        super().launch(launch, stream)  # type: ignore[arg-type]


def _check_present() -> None:
    state = Path(os.environ.get("CHECKPOINT_STAND_IN", "/nonexistent")) / str(os.getpid())
    if state.exists() and state.read_text().strip() != "0":
        print(f"a call of the device by {os.getpid()}, which is off it", file=sys.stderr, flush=True)
        os._exit(99)


def _orders() -> dict[str, int]:
    found: dict[str, int] = json.loads(Path(os.environ["EMULATED_GPU"]).read_text())
    return found


def open_emulated(number: int, *_kernels: object) -> GovernedDevice:
    """Instead of CuPy's. Says which GPU this process may see."""
    print(f"emulated gpu {number} of {os.environ.get('CUDA_VISIBLE_DEVICES')} in {os.getpid()}", file=sys.stderr)
    return GovernedDevice(lambda launch: None)
