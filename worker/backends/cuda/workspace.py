"""Device memory that steps share: grown when a larger step comes, and then every address in it is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from worker.backends.cuda.device import Device, Place

#: Areas are made of whole steps of so many bytes and a quarter larger than asked: few growths lead to the largest.
_SMALL_BYTES: Final = 1 << 16


class Workspace:
    """Named areas. ``before_growth`` is called before an area moves: nothing queued may touch it after that."""

    def __init__(self, device: Device, before_growth: Callable[[], None]) -> None:
        self._device = device
        self._before_growth = before_growth
        self._areas: dict[str, Place] = {}

    def take(self, name: str, num_bytes: int) -> Place:
        """The first ``num_bytes`` of an area; its content is undefined.

        Raises:
            OutOfDeviceMemory: it has to grow and cannot; the area is gone then, and made anew by the next call.
        """
        area = self._areas.get(name)
        if area is None or area.num_bytes < num_bytes:
            if area is not None:
                self._before_growth()
                self._device.free(self._areas.pop(name))
            area = self._areas[name] = self._device.allocate(_round(num_bytes))
        return area.part(0, num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all areas."""
        return sum(area.num_bytes for area in self._areas.values())

    def close(self) -> None:
        """Free every area. Requires: nothing queued touches them. Idempotent."""
        for area in self._areas.values():
            self._device.free(area)
        self._areas.clear()


def _round(num_bytes: int) -> int:
    """A quarter more for the next step, in whole small steps."""
    return -(-max(num_bytes * 5 // 4, 1) // _SMALL_BYTES) * _SMALL_BYTES
