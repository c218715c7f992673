"""Small pinned buffers for what goes to and from the device in each step: a ring, so that no step waits for another."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from worker.backends.cuda.device import ByteArray, Device, Event, Place, Stream, align

_NUM_BUFFERS: Final = 4
_FIRST_BYTES: Final = 1 << 18


class Transfers:
    """Copies between ordinary arrays and the device on one stream. Engine thread only."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._buffers: list[ByteArray] = [device.pin(_FIRST_BYTES) for _ in range(_NUM_BUFFERS)]
        self._events: list[Event] = [device.make_event() for _ in self._buffers]
        self._next = 0

    def take_in(self, num_bytes: int) -> ByteArray:
        """A pinned buffer whose former copy is done; fill it and give it to :meth:`send`."""
        self._next = (self._next + 1) % _NUM_BUFFERS
        self._device.synchronise(self._events[self._next])
        if self._buffers[self._next].nbytes < num_bytes:
            self._buffers[self._next] = self._device.pin(align(2 * num_bytes))
        return self._buffers[self._next][:num_bytes]

    def send(self, target: Place, pinned: ByteArray) -> None:
        """Queue the copy of what :meth:`take_in` gave last."""
        self._device.copy_in(target, pinned, self._stream)
        self._device.record(self._events[self._next], self._stream)

    def send_array(self, target: Place, array: npt.NDArray[Any]) -> None:
        """Queue the copy of an array's bytes; it may change at once."""
        pinned = self.take_in(array.nbytes)
        pinned[:] = array.reshape(-1).view(np.uint8)
        self.send(target, pinned)

    def receive(self, source: Place) -> ByteArray:
        """The bytes of ``source`` as everything queued before leaves them. Blocks; valid until the next call."""
        pinned = self.take_in(source.num_bytes)
        self._device.copy_out(pinned, source, self._stream)
        self._device.record(self._events[self._next], self._stream)
        self._device.synchronise(self._events[self._next])
        return pinned
