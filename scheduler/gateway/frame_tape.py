"""Many small frames kept one behind the other: half of what a list of them takes.

A gateway keeps the frames that a client has seen for as long as its stream is open, to give them back to a server that
lost them, and has thousands of streams.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

_LENGTH: Final = struct.Struct("<I")


class FrameTape:
    """Frames in the order in which they were appended."""

    __slots__ = ("_data", "_num_frames")

    def __init__(self) -> None:
        self._data = bytearray()
        self._num_frames = 0

    def __len__(self) -> int:
        return self._num_frames

    def __iter__(self) -> Iterator[bytes]:
        """Copies of the frames. Nothing may be appended meanwhile."""
        position = 0
        while position < len(self._data):
            (length,) = _LENGTH.unpack_from(self._data, position)
            position += _LENGTH.size
            yield bytes(self._data[position : position + length])
            position += length

    def append(self, frame: bytes) -> None:
        """Keep a copy of ``frame``."""
        self._data += _LENGTH.pack(len(frame)) + frame
        self._num_frames += 1
