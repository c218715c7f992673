"""Small pinned buffers for what goes to and from the device in each step: a ring, so that no step waits for another.

They are made when a worker warms up, as the ring of weights is, and serve one model after the other.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from worker.backends.cuda.device import ByteArray, Device, Event, Place, Stream, align

_NUM_BUFFERS: Final = 4
#: Of each: 32 rows of masks over 256,000 tokens, or the logits of one. Page-locking more is left to rare steps.
_FIRST_BYTES: Final = 1 << 20


class PinnedBuffers:
    """The buffers, with the event of the latest copy from or to each."""

    def __init__(self, device: Device) -> None:
        self.buffers: list[ByteArray] = [device.pin(_FIRST_BYTES) for _ in range(_NUM_BUFFERS)]
        self.events: list[Event] = [device.make_event() for _ in self.buffers]


class Transfers:
    """Copies between ordinary arrays and the device on one stream. Engine thread only."""

    def __init__(self, device: Device, stream: Stream, pinned: PinnedBuffers) -> None:
        """``pinned`` is nobody else's meanwhile."""
        self._device = device
        self._stream = stream
        self._buffers, self._events = pinned.buffers, pinned.events
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
