"""Weights on their way to the device: read, hashed where the copy engine reads them, copied; compute follows by event.

========= ============================================== ==========================================================
 thread    does, for each piece in order of use           waits for
========= ============================================== ==========================================================
reader    take the next piece and its ring slot; copy    the slot's former copy (event); verified bytes where the
          the bytes in; hash them *there*                source is still being filled
reader    queue the copy, record the piece's event       its turn: pieces are queued in order
engine    make the compute stream wait for a piece       the piece's copy to be queued (not done)
========= ============================================== ==========================================================

Pieces are queued in order on one stream, so that the event of a piece stands for all before it. A piece whose bytes
are not the signed ones is never copied, nor is any after it. Where the source itself is page-locked (a parked model),
the ring is left out: the copy engine reads the source, and that is what is hashed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from snapshots.chunks import DIGEST_BYTES, digest_chunk
from snapshots.errors import BlobCorrupt
from snapshots.manifest import WEIGHTS
from worker.backends.cuda.device import ByteArray, Device, Event, Place, Stream
from worker.backends.cuda.weight_image import Piece
from worker.backends.protocol import BackendError

#: Nobody waits longer than this for a piece: its reader is gone.
STALL_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """``num_slots`` pieces of at most ``slot_bytes`` are under way at once; ``num_threads`` read and hash them.

    Defaults are a guess for PCIe 5 with a hash rate of 8 GB/s a core; ``gpu-check`` measures the table.
    """

    num_threads: int = 8
    num_slots: int = 16
    slot_bytes: int = 8 * 1024 * 1024
    verifies: bool = True

    @classmethod
    def for_cores(cls, num_cores: int) -> StreamSettings:
        """All cores but two read and hash, 12 at most: the engine and the loop need one each."""
        return cls(num_threads=max(2, min(12, num_cores - 2)))


class PinnedRing:
    """Page-locked slots, made once when a worker warms up, used by one stream of weights after the other."""

    def __init__(self, device: Device, settings: StreamSettings) -> None:
        pinned = device.pin(settings.num_slots * settings.slot_bytes)
        self.slots = [
            pinned[i * settings.slot_bytes : (i + 1) * settings.slot_bytes] for i in range(settings.num_slots)
        ]
        self.events = [device.make_event() for _ in self.slots]  # of the latest copy out of each
        self._user: WeightStream | None = None

    def claim(self, user: WeightStream) -> None:
        """Make ``user`` the only one that fills slots: waits until the former's readers have ended."""
        if self._user is not None:
            self._user.join()
        self._user = user


class WeightStream:
    """One journey of all pieces. :meth:`start` it once; :meth:`close` before what it copies to is freed."""

    def __init__(
        self,
        device: Device,
        ring: PinnedRing,
        pieces: list[Piece],
        image: Place,
        settings: StreamSettings,
        *,
        is_blob_pinned: bool = False,
    ) -> None:
        self._device = device
        self._ring = ring
        self._pieces = pieces
        self._image = image
        self._settings = settings
        self._is_blob_pinned = is_blob_pinned
        self._stream: Stream = device.make_stream()
        self._changed = threading.Condition()
        self._num_taken = 0  # the four below: under the condition's lock
        self._num_queued = 0
        self._error: Exception | None = None
        self._is_stopped = False
        self._events: list[Event] = []  # of pieces that are queued
        self._threads: list[threading.Thread] = []
        self._begun_s = self._queued_s = 0.0
        slot_bytes = len(ring.slots[0])
        largest = max((piece.source.nbytes for piece in pieces if not self._is_direct(piece)), default=0)
        if largest > slot_bytes:
            raise BackendError(f"weights come in pieces of {largest} bytes, the pinned ring's slots have {slot_bytes}")

    def start(self) -> None:
        """Start the readers, after those of the ring's former stream."""
        self._ring.claim(self)
        self._begun_s = time.monotonic()
        for index in range(min(self._settings.num_threads, len(self._pieces))):
            self._threads.append(threading.Thread(target=self._read, name=f"weights-{index}", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def is_queued(self) -> bool:
        """Whether every copy is queued, so that no event need be waited for one by one."""
        return self._num_queued == len(self._pieces)

    @property
    def queued_ms(self) -> float:
        """Milliseconds from :meth:`start` until the last copy was queued; 0: not yet."""
        return (self._queued_s - self._begun_s) * 1000 if self._queued_s else 0.0

    def wait_for(self, last_piece: int, stream: Stream) -> None:
        """What is queued on ``stream`` from now on finds pieces up to ``last_piece`` on the device. Blocks until their
        copies are queued.

        Raises:
            BlobCorrupt: one of them is not what was signed.
            BackendError: its reader is gone.
        """
        if last_piece < 0:
            return
        with self._changed:
            is_queued = self._changed.wait_for(
                lambda: self._num_queued > last_piece or self._error is not None or self._is_stopped, STALL_S
            )
            if self._num_queued <= last_piece:
                if self._error is not None:
                    raise self._error
                reason = "was stopped" if is_queued else f"brought no piece for {STALL_S:g} s"
                raise BackendError(f"the stream of weights {reason}")
            event = self._events[last_piece]
        self._device.wait(stream, event)

    def synchronise(self) -> None:
        """Block until all is on the device.

        Raises:
            BlobCorrupt: see :meth:`wait_for`.
        """
        self.wait_for(len(self._pieces) - 1, self._stream)
        if self._events:
            self._device.synchronise(self._events[-1])

    def join(self) -> None:
        """Wait until its readers have ended: all is queued, or they were stopped, or one has failed."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def close(self) -> None:
        """Stop the readers and wait for what they queued. Idempotent."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self.join()
        if self._events:
            self._device.synchronise(self._events[-1])

    # --- reader threads ---------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while (index := self._take()) is not None:
                source = self._bring(index)
                self._queue(index, source)
        except Exception as error:  # whatever it is, the engine's thread must hear of it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _is_direct(self, piece: Piece) -> bool:
        """Whether the copy engine reads the source itself."""
        return self._is_blob_pinned and piece.is_signed

    def _take(self) -> int | None:
        with self._changed:
            if self._num_taken == len(self._pieces) or self._is_stopped or self._error is not None:
                return None
            self._num_taken += 1
            return self._num_taken - 1

    def _bring(self, index: int) -> ByteArray:
        """The piece's bytes in page-locked memory, checked there."""
        piece = self._pieces[index]
        if piece.wait_verified is not None:
            piece.wait_verified()
        if self._is_direct(piece):
            pinned = piece.source
        else:
            pinned = self._claim_slot(index)[: piece.source.nbytes]
            np.copyto(pinned, piece.source)
        if self._settings.verifies and piece.is_signed:
            _verify(piece, pinned)
        return pinned

    def _claim_slot(self, index: int) -> ByteArray:
        """The slot of piece ``index``, once the copy of the piece before it in that slot is done."""
        num_slots = len(self._ring.slots)
        former = index - num_slots
        with self._changed:
            self._wait_turn(lambda: self._num_queued > former)
        self._device.synchronise(self._ring.events[index % num_slots])
        return self._ring.slots[index % num_slots]

    def _queue(self, index: int, source: ByteArray) -> None:
        piece, event = self._pieces[index], self._device.make_event()
        with self._changed:
            self._wait_turn(lambda: self._num_queued == index)
            self._device.copy_in(self._image.part(piece.offset, source.nbytes), source, self._stream)
            self._device.record(event, self._stream)
            if not self._is_direct(piece):
                self._device.record(self._ring.events[index % len(self._ring.slots)], self._stream)
            self._events.append(event)
            self._num_queued += 1
            if self.is_queued:
                self._queued_s = time.monotonic()
            self._changed.notify_all()

    def _wait_turn(self, is_turn: Callable[[], bool]) -> None:
        """Under the lock: wait for ``is_turn``, or end this thread where the stream was stopped or has failed."""
        self._changed.wait_for(lambda: is_turn() or self._error is not None or self._is_stopped)
        if self._error is not None or self._is_stopped:
            raise BackendError("the stream of weights was stopped")


def _verify(piece: Piece, pinned: ByteArray) -> None:
    """Compare every chunk of ``pinned`` with what was signed. Releases the interpreter's lock while it hashes.

    Raises:
        BlobCorrupt: one differs.
    """
    for start in range(0, pinned.nbytes, piece.chunk_bytes):
        first = start // piece.chunk_bytes * DIGEST_BYTES
        found = digest_chunk(pinned[start : start + piece.chunk_bytes].data)
        if found != piece.digests[first : first + DIGEST_BYTES]:
            raise BlobCorrupt(WEIGHTS, f"the chunk at byte {piece.offset + start} is not what was signed")
