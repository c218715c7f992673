"""Writes to the sockets of streams take turns, and hardly more than a share of the gateway's time.

A write costs as much as all else that a gateway does for a token, and no more for ten tokens than for one. So a stream
that has something to write stands in line. Its turn comes at once while there is time, and later the busier the gateway
is; what it is given meanwhile goes out in the same write. A gateway at its limit thus delivers in larger pieces, some
tens of milliseconds late, where it would otherwise fall behind without end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

#: Of the loop's time, over more than an instant.
MAX_SHARE: Final = 0.3
BURST_S: Final = 0.005  # of time may be owed before there is a pause
MAX_PAUSE_S: Final = 0.1
WRITES_AT_ONCE: Final = 64  # then others may use the loop


class PacedWrites:
    """The line in which streams wait to write. One a gateway; event loop only."""

    def __init__(self, *, max_share: float = MAX_SHARE, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_share = max_share
        self._clock = clock
        self._line: deque[Callable[[], None]] = deque()
        self._num_left = 0  # of those who were in the line when the present round began
        self._next: asyncio.Handle | None = None
        self._owed_until_s = 0.0  # when what was spent on writing is within its share again, by the clock

    def ask(self, write: Callable[[], None]) -> None:
        """Call ``write`` once, soon, after those who asked before. What it raises goes to the loop's handler."""
        self._line.append(write)
        if self._next is None:
            self._begin_round()

    def _begin_round(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = min(self._owed_until_s - self._clock() - BURST_S, MAX_PAUSE_S)
        self._next = loop.call_later(pause_s, self._write) if pause_s > 0 else loop.call_soon(self._write)

    def _write(self) -> None:
        began_s = self._clock()
        if self._num_left == 0:
            self._num_left = len(self._line)
        num_writes = min(WRITES_AT_ONCE, self._num_left)
        self._num_left -= num_writes
        self._next = asyncio.get_running_loop().call_soon(self._write) if self._num_left else None
        try:
            for _ in range(num_writes):
                self._line.popleft()()
        finally:
            now_s = self._clock()
            owed_until_s = max(self._owed_until_s, began_s) + (now_s - began_s) / self._max_share
            # A process that stood still for a while must not owe it all.
            self._owed_until_s = min(owed_until_s, now_s + BURST_S + MAX_PAUSE_S)
            if self._line and self._next is None:
                self._begin_round()
